"""Matrices of 4 and 8 bits opened to what they compute with; compiled for float32 and bfloat16 on a CPU.

`adapters/quantization/packed.py` says how they are packed, and has the same in plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorry.kernels.build import call_kernel, load_library


def supports_opening(codes: Tensor, dtype: torch.dtype) -> bool:
    """Whether the compiled kernels open ``codes`` to ``dtype``."""
    return (
        dtype in (torch.float32, torch.bfloat16)
        and codes.device.type == "cpu"
        and load_library() is not None
    )


def open_4bit(codes: Tensor, scales: Tensor, levels: Tensor, out: Tensor) -> None:
    """out [n] = levels [16] of the codes uint8 [ceil(n / 2)], times the scale of each block of 64; scales and
    levels fp32."""
    narrow = int(out.dtype == torch.bfloat16)
    call_kernel("packed_open_4bit", codes, scales, levels, out, out.numel(), narrow)


def open_int8(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """out [O,I] = codes int8 [O,I] times the scale of each row, fp32 [O]."""
    narrow = int(out.dtype == torch.bfloat16)
    call_kernel("packed_open_int8", codes, scales, out, *codes.shape, narrow)
