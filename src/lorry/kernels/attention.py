"""The attention kernels behind tensors: which inputs it takes, forward and backward over a packed
batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorry.kernels.build import call_kernel, kernel_status

# Widths that the kernel of bfloat16 products is compiled for: multiples of a tile's 32 columns.
BFLOAT16_WIDTHS = (32, 64, 96, 128)
# Widths up to here the kernel on vectors takes: what it works on stays near the core.
MAX_HEAD_DIM = 256


def supports_attention(q: Tensor, k: Tensor) -> bool:
    """Whether a kernel can attend q [T,H,D] to k [T,G,D]: float32 or bfloat16 on a CPU where kernels
    run.
    """
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16)
        and k.dtype == q.dtype
        and q.shape[2] <= MAX_HEAD_DIM
        # whole groups of query heads: each shares one key/value head
        and q.shape[1] % k.shape[1] == 0
        and kernel_status().active
    )


def attends_in_bfloat16(q: Tensor) -> bool:
    """Whether q [T,H,D] is attended to in products of bfloat16, on matrix tiles or in dot products; else it
    is widened to float32 vectors."""
    return (
        q.dtype == torch.bfloat16
        and q.shape[2] in BFLOAT16_WIDTHS
        and kernel_status().attention in ("tiles", "dots")
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
    _call_with_scratch("forward", (q, k, v, o, lse), starts, scale)
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
    _call_with_scratch("backward", (q, k, v, o, lse, grad, dq, dk, dv), starts, scale)
    return dq, dk, dv


def _call_with_scratch(
    direction: str, tensors: Sequence[Tensor], starts: Tensor, scale: float
) -> None:
    """The kernel's scratch space is a tensor, so that torch's allocator says it when memory runs
    out.
    """
    q, k = tensors[:2]
    (tokens, heads, width), groups, segments = q.shape, k.shape[1], len(starts) - 1
    of_bfloat16 = attends_in_bfloat16(q)
    kernel = "attention" if of_bfloat16 else "attention_vectors"
    sizes = (starts, segments, tokens, heads, groups, width)
    # two calls: the kernel says what it needs, torch allocates it
    size = call_kernel(f"{kernel}_space", *sizes, int(direction == "backward"))
    # 64 bytes more, so that the next line can start at a cache line
    space = torch.empty(size + 64, dtype=torch.uint8)
    space = space[-space.data_ptr() % 64 :]
    # one kernel is of bfloat16 alone, the other is told what it reads
    form = () if of_bfloat16 else (int(q.dtype == torch.bfloat16),)
    call_kernel(f"{kernel}_{direction}", *tensors, *sizes, scale, space, *form)
