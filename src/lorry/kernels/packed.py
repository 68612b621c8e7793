"""Matrices of 4, 8 and 16 bits opened to what they compute with, and multiplied with a few rows as they are
packed; compiled for float32 and bfloat16 on a CPU.

`adapters/quantization` says how they are packed, and has the same in plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorry.kernels.build import call_kernel, kernel_status, load_library

# rows up to which a product reads packed bytes; with more, opening the matrix once for torch's product costs
# less: on Intel's model 207, and where dot products of bfloat16 are fast (Zen 5: 8 rows of Q4_1, Q8_0, NF4 and
# int8 took 0.4 to 0.6 of that in bfloat16 and float32, 16 rows 0.8 to 1.2 of it in bfloat16)
MAX_PACKED_ROWS, MAX_DOTTED_ROWS = 4, 12


@dataclass(frozen=True, slots=True)
class PackedSource:
    """What the kernels read a matrix from: how it is laid out, and the arguments of that layout.

    flat: codes uint8 [ceil(O I / 2)], scales fp32 or uint8 [blocks of 64], for uint8 their levels fp32
    [256], scales fp32 [blocks / 256] and offset fp32 [1], else None thrice; levels fp32 [16]. rows: codes
    int8 [O,I], largest values fp32 [O]. grid: codes uint8 or int8, scales, zeros, minimums, groups; kind (0 two
    codes a byte, 1 unsigned, 2 signed, 3 eight-bit floats), whether scales are halves, outputs and inputs
    that share one, scales side by side, whether values are rounded to bfloat16 first. halves: the
    bits of bfloat16 numbers, int16 [O,I].
    """

    layout: Literal["flat", "rows", "grid", "halves"]
    arguments: tuple[Tensor | int | None, ...]


def supports_packed(codes: Tensor, dtype: torch.dtype) -> bool:
    """Whether the compiled kernels compute with ``codes`` in ``dtype``."""
    return (
        dtype in (torch.float32, torch.bfloat16)
        and codes.device.type == "cpu"
        and load_library() is not None
    )


def most_packed_rows() -> int:
    """Rows up to which a product of packed bytes takes less than opening the matrix for torch's."""
    return MAX_DOTTED_ROWS if kernel_status().dots else MAX_PACKED_ROWS


def reads_faster_packed(rows: int) -> bool:
    """Whether a product of so many rows takes less by packed bytes than by the matrix whole, which need not be
    opened: where codes become values in registers, those of AVX-512 (with AVX2 a row of Q8_0 took twice as
    long), and as long as reading is what takes the time (Zen 5: 4 rows of Q8_0 0.75 of it in bfloat16 and 0.6
    in float32, 8 rows 1.2 and 0.9)."""
    return rows <= MAX_PACKED_ROWS and kernel_status().isa in ("amx", "avx512_bf16", "avx512")


def open_packed(source: PackedSource, out: Tensor) -> None:
    """Write the matrix to out [O,I]."""
    narrow = int(out.dtype == torch.bfloat16)
    call_kernel(f"packed_open_{source.layout}", *source.arguments, out, *out.shape, narrow)


def packed_product(source: PackedSource, outputs: int, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [T,I] -> x W^T + b [T,O] of the values that `open_packed` gives in the dtype of x, summed in fp32."""
    y = x.new_empty(x.shape[0], outputs)
    call_kernel(
        f"packed_product_{source.layout}",
        *source.arguments,
        x.contiguous(),
        bias,
        y,
        x.shape[0],
        outputs,
        x.shape[1],
        int(x.dtype == torch.bfloat16),
    )
    return y
