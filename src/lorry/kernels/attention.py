"""The attention kernel behind tensors: which inputs it takes, forward and backward over a packed
batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorry.kernels.build import call_kernel, kernel_status

# Widths the C++ is compiled for: multiples of a tile's 32 bf16 columns.
HEAD_WIDTHS = (32, 64, 96, 128)


def supports_attention(q: Tensor, k: Tensor) -> bool:
    """Whether the kernel can attend q [T,H,D] to k [T,G,D]: bfloat16 on a CPU with matrix tiles, a
    usual head width.
    """
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and q.shape[2] in HEAD_WIDTHS
        # whole groups of query heads: each shares one key/value head
        and q.shape[1] % k.shape[1] == 0
        and kernel_status().amx
    )


def build_cu_seqlens(segments: Sequence[tuple[int, int]]) -> Tensor:
    """[S+1] int64: where each of the adjoining segments begins, and where the last ends."""
    return torch.tensor([segments[0][0], *(stop for _, stop in segments)], dtype=torch.int64)


def run_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """q [T,H,D], k and v [T,G,D], contiguous -> (o [T,H,D], log-sum-exp [H,T] fp32, in powers of
    two).
    """
    t, heads = q.shape[:2]
    o, lse = torch.empty_like(q), torch.empty(heads, t, dtype=torch.float32)
    _call_with_scratch("attention_forward", (q, k, v, o, lse), starts, scale)
    return o, lse


def run_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    starts: Tensor,
    scale: float,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of `run_attention` for the gradient ``grad`` [T,H,D] of o;
    probabilities are recomputed.
    """
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _call_with_scratch("attention_backward", (q, k, v, o, lse, grad, dq, dk, dv), starts, scale)
    return dq, dk, dv


def _call_with_scratch(name: str, tensors: Sequence[Tensor], starts: Tensor, scale: float) -> None:
    """The kernel's scratch space is a tensor, so that torch's allocator says it when memory runs
    out.
    """
    (tokens, heads, width), groups, segments = (
        tensors[0].shape,
        tensors[1].shape[1],
        len(starts) - 1,
    )
    # two calls: the kernel says what it needs, torch allocates it
    size = call_kernel(
        "attention_space", starts, segments, heads, groups, width, int(name == "attention_backward")
    )
    # 64 bytes more, so that the next line can start at a cache line
    space = torch.empty(size + 64, dtype=torch.uint8)
    space = space[-space.data_ptr() % 64 :]
    call_kernel(name, *tensors, starts, segments, tokens, heads, groups, width, scale, space)
