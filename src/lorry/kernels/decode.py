"""The kernels of generation behind tensors: products of a few rows, the cache's memory, attention
over it, the choice of a token.

All take bfloat16 and float32; which one is part of the kernel's name. T tokens, B rows, G key/value
heads, H heads, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorry.kernels.build import call_kernel, kernel_status, load_library
from lorry.kernels.packed import most_packed_rows

KERNEL_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "float"}
# rows; above it torch's products, which rearrange the weights first, are as fast: on matrix tiles, and in
# vector registers (AVX-512: 1.4x of torch's at 32 rows, 1.05x at 64, 0.9x at 128, float32 and bfloat16; Zen 5 in
# bfloat16 dot products 1.24x at 32, 1.08x at 64, 0.9x at 96, in float32 against `kernels.matmul` 1.06x, 0.92x, 0.86x)
MAX_TILED_ROWS, MAX_FEW_ROWS = 192, 64


def supports_decode(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels serve tensors of this kind."""
    return dtype in KERNEL_SUFFIXES and device.type == "cpu" and load_library() is not None


def supports_product(weight: Tensor) -> bool:
    """Whether `linear_product` takes this weight [O,I]: bfloat16 or float32, in rows."""
    return (
        weight.is_contiguous()
        and weight.dim() == 2
        and supports_decode(weight.dtype, weight.device)
    )


def linear_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T,I] -> x W^T + b [T,O], summed in fp32 and rounded once; a row's result does not depend
    on the other rows.
    """
    rows, outputs = x.shape[0], weight.shape[0]
    y = x.new_empty(rows, outputs)
    call_kernel(
        f"few_rows_{KERNEL_SUFFIXES[weight.dtype]}",
        x.contiguous(),
        weight,
        bias,
        y,
        rows,
        weight.shape[1],
        outputs,
    )
    return y


def add_low_rank_terms(description: Tensor, x: Tensor, ys: Sequence[Tensor]) -> None:
    """Add to ys, a linear's outputs [T,O] each, contiguous, what low-rank terms make of x [T,I]: y of a row +=
    scale * B (gates * scales * A x), what A makes rounded and so again at every factor. description: int64, as
    `models.decoder.low_rank` makes it."""
    outputs = torch.tensor([word for y in ys for word in (y.data_ptr(), y.shape[1])])
    call_kernel(
        f"low_rank_{KERNEL_SUFFIXES[x.dtype]}",
        description,
        x.contiguous(),
        outputs,
        len(ys),
        *x.shape,
    )


def most_few_rows(dtype: torch.dtype, *, packed: bool = False) -> int:
    """Rows up to which the products here are no slower than torch's. ``packed``: of matrices of few bits,
    which no kernel multiplies on matrix tiles."""
    if dtype == torch.bfloat16 and kernel_status().amx:
        return most_packed_rows() if packed else MAX_TILED_ROWS
    return MAX_FEW_ROWS


def decode_layers(
    description: Tensor,
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    table: Tensor,
    rows: Tensor,
    positions: Tensor,
    lengths: Tensor,
) -> None:
    """x [T,D] -> all layers' result, in its place. description: as `models.decoder.step` makes it; cos,
    sin fp32 [T, dim/2]; table, rows [T], positions [T] as `store_kv`, lengths as `attend_to_cache`,
    int64."""
    call_kernel(
        f"decode_layers_{KERNEL_SUFFIXES[x.dtype]}",
        description,
        x,
        cos,
        sin,
        table,
        rows,
        positions,
        lengths,
        x.shape[0],
    )


def store_kv(
    k: Tensor, v: Tensor, table: Tensor, rows: Tensor, positions: Tensor, layer: int
) -> None:
    """Put k and v [T,G,D] of tokens at (row, position), [T] int64 each; table [B,2]: see
    `models.decoder.cache.RowKVCache`.
    """
    call_kernel(
        f"store_{KERNEL_SUFFIXES[k.dtype]}",
        k.contiguous(),
        v.contiguous(),
        table,
        rows,
        positions,
        layer,
        *k.shape,
    )


def attend_to_cache(q: Tensor, table: Tensor, lengths: Tensor, layer: int, groups: int) -> Tensor:
    """q [B,H,D] -> [B,H,D]: row b attends to its own first lengths[b] tokens in the cache, in fp32,
    softmax scale D^-1/2.
    """
    o = torch.empty_like(q)
    rows, heads, width = q.shape
    call_kernel(
        f"attend_{KERNEL_SUFFIXES[q.dtype]}",
        q.contiguous(),
        o,
        table,
        lengths,
        layer,
        rows,
        heads,
        groups,
        width,
        width**-0.5,
    )
    return o


def argmax_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits [B,V] -> (index of each row's largest, the first of several, [B] int64; its value [B]
    fp32, NaN where any is).
    """
    tokens = torch.empty(logits.shape[0], dtype=torch.int64)
    values = torch.empty(logits.shape[0], dtype=torch.float32)
    call_kernel(
        f"largest_{KERNEL_SUFFIXES[logits.dtype]}",
        logits.contiguous(),
        tokens,
        values,
        *logits.shape,
    )
    return tokens, values


def sample_rows(logits: Tensor, numbers: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """logits [B,V], numbers [B] float64 in [0,1) -> (for each row the token at which the cumulative
    distribution of softmax(logits / temperature) passes its number, [B] int64; the largest logit
    [B] fp32, NaN where any is).
    """
    tokens = torch.empty(logits.shape[0], dtype=torch.int64)
    values = torch.empty(logits.shape[0], dtype=torch.float32)
    call_kernel(
        f"draw_{KERNEL_SUFFIXES[logits.dtype]}",
        logits.contiguous(),
        numbers,
        tokens,
        values,
        *logits.shape,
        # a factor: one division for the batch, not one for each logit
        1.0 / temperature,
    )
    return tokens, values
