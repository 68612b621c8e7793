"""The attention kernel behind tensors: which inputs it takes, forward and backward over a packed batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorry.kernels.build import call, status

WIDTHS = (32, 64, 96, 128)


def takes(q: Tensor, k: Tensor) -> bool:
    """Whether the kernel can attend q [T,H,D] to k [T,G,D]: bfloat16 on a CPU with matrix tiles, a usual head width."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and q.shape[2] in WIDTHS
        and q.shape[1] % k.shape[1] == 0
        and status().amx
    )


def starts_of(segments: Sequence[tuple[int, int]]) -> Tensor:
    """[S+1] int64: where each of the adjoining segments begins, and where the last ends."""
    return torch.tensor([segments[0][0], *(stop for _, stop in segments)], dtype=torch.int64)


def forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [T,H,D], k and v [T,G,D], contiguous -> (o [T,H,D], log-sum-exp [H,T] fp32, in powers of two)."""
    t, heads = q.shape[:2]
    o, lse = torch.empty_like(q), torch.empty(heads, t, dtype=torch.float32)
    _call("attention_forward", (q, k, v, o, lse, starts), starts, q, k, scale)
    return o, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, starts: Tensor, scale: float, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of `forward` for the gradient ``grad`` [T,H,D] of o; probabilities are recomputed."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _call("attention_backward", (q, k, v, o, lse, grad, dq, dk, dv, starts), starts, q, k, scale)
    return dq, dk, dv


def _call(name: str, tensors: Sequence[Tensor], starts: Tensor, q: Tensor, k: Tensor, scale: float) -> None:
    call(name, *tensors, len(starts) - 1, *q.shape[:2], k.shape[1], q.shape[2], scale)
