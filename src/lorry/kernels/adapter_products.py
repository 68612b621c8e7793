"""The products of a low-rank adapter at linears that read the same input, in bfloat16: each a call for all of the
linears, where the kernel multiplies bfloat16 (`matmul.multiplies_bfloat16`).

One by one they are of a few microseconds each, and to ask for them takes as long. T tokens, I in, O out, R rank, S
the ranks of all linears.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lorry.kernels.build import load_library
from lorry.kernels.matmul import is_plain, kernel_runs


class AdapterPart(NamedTuple):
    """What an adapter has at one linear: lora_B [O,R], which has ranks of S from the ``first`` on; its scale."""

    lora_B: Tensor
    first: int
    scale: float


class _Part(ctypes.Structure):
    """As kernels/matmul_dots.cpp has it."""

    _fields_ = (
        ("y", ctypes.c_void_p),
        ("lora_B", ctypes.c_void_p),
        ("grad_B", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("scale", ctypes.c_double),
    )


def supports_adapter(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernel takes these: bfloat16, contiguous, not empty, and nothing records them."""
    return (
        x.dtype == torch.bfloat16
        and kernel_runs(x.dtype)
        and all(is_plain(t, x.dtype) and t.is_contiguous() and t.numel() > 0 for t in (x, *others))
    )


def add_adapter_terms(
    x: Tensor, lora_A: Tensor, parts: Sequence[AdapterPart], ys: Sequence[Tensor]
) -> Tensor:
    """x A^T [T,S] of x [T,I] and A [S,I]; to each y [T,O] its scale * x A^T B^T is added."""
    low = x.new_empty(len(x), len(lora_A))
    _kernel("adapter_forward_bf16", 3)(
        x.data_ptr(), lora_A.data_ptr(), low.data_ptr(), _described(parts, ys), len(parts), *x.shape, len(lora_A)
    )  # fmt: skip
    return low


def input_gradient(
    lora_A: Tensor, parts: Sequence[AdapterPart], grads: Sequence[Tensor], dx: Tensor | None
) -> Tensor:
    """[T,S], scale * g B of the gradients g [T,O]; that times A is added to dx [T,I] if there is one."""
    ranks, width = lora_A.shape
    up = grads[0].new_empty(len(grads[0]), ranks)
    _kernel("adapter_input_gradient_bf16", 3)(
        lora_A.data_ptr(), up.data_ptr(), None if dx is None else dx.data_ptr(), _described(parts, grads),
        len(parts), len(up), width, ranks,
    )  # fmt: skip
    return up


def master_gradients(
    x: Tensor,
    low: Tensor,
    up: Tensor,
    parts: Sequence[AdapterPart],
    grads: Sequence[Tensor],
    wanted: tuple[bool, Sequence[bool]],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """fp32 gradients of A [S,I] and of each B [O,R], of those that are ``wanted``. low, up [T,S]: what
    `add_adapter_terms` and `input_gradient` gave."""
    of_a, of_b = wanted
    ranks, width = up.shape[1], x.shape[1]
    grad_a = x.new_empty(ranks, width, dtype=torch.float32) if of_a else None
    grads_b = [
        part.lora_B.new_empty(part.lora_B.shape, dtype=torch.float32) if one else None
        for part, one in zip(parts, of_b, strict=True)
    ]
    _kernel("adapter_gradients_bf16", 4)(
        x.data_ptr(), low.data_ptr(), up.data_ptr(), None if grad_a is None else grad_a.data_ptr(),
        _described(parts, grads, grads_b), len(parts), len(x), width, ranks,
    )  # fmt: skip
    return grad_a, grads_b


def _described(
    parts: Sequence[AdapterPart],
    ys: Sequence[Tensor],
    grads_b: Sequence[Tensor | None] | None = None,
) -> ctypes.Array[_Part]:
    return (_Part * len(parts))(
        *(
            _Part(
                y.data_ptr(),
                part.lora_B.data_ptr(),
                None if grad is None else grad.data_ptr(),
                part.lora_B.shape[0],
                part.first,
                part.lora_B.shape[1],
                part.scale,
            )
            for part, y, grad in zip(parts, ys, grads_b or [None] * len(parts), strict=True)
        )
    )


@cache
def _kernel(name: str, tensors: int) -> Callable[..., None]:
    """``tensors``: how many come before the parts."""
    library = load_library()
    assert library is not None
    function = getattr(library, name)
    function.argtypes = [ctypes.c_void_p] * tensors + [ctypes.POINTER(_Part)] + [ctypes.c_long] * 4
    function.restype = None
    return function
