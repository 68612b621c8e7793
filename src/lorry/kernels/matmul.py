"""Products of matrices: torch's, and on a CPU whose torch libraries hold it to less than it can do, a kernel's.

In float32 MKL multiplies on AMD's processors with AVX2, whatever else they have: 110 GFLOP/s of one thread
where the kernel does 230 (Zen 5). In bfloat16 oneDNN does 300 of 64 rows, by a weight that is yet to be
fetched from memory, where the kernel does 400, and 440 of 512 where it does 480. Operands may lie either way
and in strides, and nothing is kept for a shape. A row's result depends neither on the other rows nor on how
many threads there are.

`mm`, `addmm` and `addmm_` are torch's own wherever the kernel does not serve, and where autograd records:
the kernel has no derivative. What they write no version counter sees. M, N rows and columns, K depth.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lorry.kernels.build import kernel_status, load_library
from lorry.processor import mkl_is_slow

PLAIN = (Tensor, nn.Parameter)  # no subclass: a DTensor's memory is a share, a fake one has none


@cache
def multiplies_float32() -> bool:
    """Whether the kernel multiplies float32 on this machine. Raises ConfigError where LORRY_ISA asks for
    what this processor lacks."""
    return mkl_is_slow() and torch.backends.mkl.is_available() and load_library() is not None


@cache
def multiplies_bfloat16() -> bool:
    """Whether the kernel multiplies bfloat16 on this machine: in dot products of pairs, where they are fast and
    there are no tiles. Raises ConfigError likewise."""
    return kernel_status().dots


def float32_library() -> str:
    """What multiplies float32 on this CPU, in words. Raises ConfigError likewise."""
    if multiplies_float32():
        return "Lorry's kernel (MKL does not use AVX-512 on AMD's processors)"
    library = "MKL" if torch.backends.mkl.is_available() else "its BLAS library"
    slow = mkl_is_slow() and torch.backends.mkl.is_available()
    return f"torch: {library}" + (", half as fast here as the kernels would be" if slow else "")


def bfloat16_library() -> str:
    """What multiplies bfloat16 on this CPU, in words. Raises ConfigError likewise."""
    if multiplies_bfloat16():
        return "Lorry's kernel, in dot products"
    return "torch: oneDNN" if torch.backends.mkldnn.is_available() else "torch"


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [M,K] @ b [K,N] -> [M,N], written to ``out`` if given."""
    if not _serves(a, b) or (out is not None and not _holds(out, a, a.shape[0], b.shape[1])):
        return torch.mm(a, b, out=out)
    return _multiply(a, b, a.new_empty(a.shape[0], b.shape[1]) if out is None else out)


def addmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """bias [N] + a [M,K] @ b [K,N] -> [M,N]."""
    if not _serves(a, b) or not _holds(bias, a, b.shape[1]):
        return torch.addmm(bias, a, b)
    return _multiply(a, b, a.new_empty(a.shape[0], b.shape[1]), bias)


def addmm_(into: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0) -> Tensor:
    """into [M,N] += alpha * a [M,K] @ b [K,N]; returns it. With an alpha of 0 neither is read, as torch has it: NaN
    and infinity in them change nothing."""
    if alpha == 0 or not _serves(a, b) or not _holds(into, a, a.shape[0], b.shape[1]):
        return into.addmm_(a, b, alpha=alpha)
    return _multiply(a, b, into, add=True, alpha=alpha)


def _serves(a: Tensor, b: Tensor) -> bool:
    """Whether the kernel multiplies these."""
    return (
        kernel_runs(a.dtype)
        and is_plain(a, a.dtype)
        and is_plain(b, a.dtype)
        and a.dim() == b.dim() == 2
        and a.shape[1] == b.shape[0]
        and a.numel() > 0
        and b.numel() > 0
    )


def kernel_runs(dtype: torch.dtype) -> bool:
    """Whether the kernel multiplies numbers of a dtype here and now."""
    return (
        # autocast has torch multiply in the dtype that it casts to
        not torch.is_autocast_enabled("cpu")
        # what runs to be recorded is torch's: a compiler's pass, which nothing behind this is to be
        # traced by, a trace, and a count of FLOPs
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and (
            multiplies_bfloat16()
            if dtype == torch.bfloat16
            else dtype == torch.float32 and multiplies_float32()
        )
        and _get_current_dispatch_mode() is None
        # a transform's tensors (vmap, functionalize) have no memory, and forward-mode derivatives beside them
        # no kernel
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def _holds(tensor: Tensor, like: Tensor, *shape: int) -> bool:
    """Whether the kernel writes or adds a tensor of this shape, in the dtype of another: rows, each
    contiguous, apart."""
    return (
        is_plain(tensor, like.dtype)
        and tensor.shape == shape
        and (tensor.stride(-1) == 1 or shape[-1] == 1)
        and (tensor.stride(0) >= shape[-1] or shape[0] == 1 or len(shape) == 1)
    )


def is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor is memory of a dtype on the CPU that says its numbers, and autograd records nothing
    of it."""
    return (
        type(tensor) in PLAIN
        and tensor.dtype == dtype
        and tensor.is_cpu
        and tensor.layout == torch.strided
        and not (tensor.requires_grad and torch.is_grad_enabled())
        # memory of the other sign, and none at all
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
    )


def _multiply(
    a: Tensor,
    b: Tensor,
    into: Tensor,
    bias: Tensor | None = None,
    *,
    add: bool = False,
    alpha: float = 1.0,
) -> Tensor:
    (a, *a_strides), (b, *b_strides) = _in_lines(a), _in_lines(b)
    rows, depth = a.shape
    _kernel(a.dtype)(
        a.data_ptr(),
        b.data_ptr(),
        None if bias is None else bias.data_ptr(),
        into.data_ptr(),
        rows,
        b.shape[1],
        depth,
        *a_strides,
        *reversed(b_strides),
        into.stride(0),
        add,
        alpha,
    )
    return into


@cache
def _kernel(dtype: torch.dtype) -> Callable[..., None]:
    """`matmul_float` or `matmul_bf16`, which are called too often for the face that other kernels have."""
    library = load_library()
    assert library is not None
    function = library.matmul_float if dtype == torch.float32 else library.matmul_bf16
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 9 + [ctypes.c_float]
    function.restype = None
    return function


def _in_lines(matrix: Tensor) -> tuple[Tensor, int, int]:
    """A matrix whose rows or columns are contiguous, and how far apart rows and columns are; 1 where there
    is but one."""
    (rows, columns), (down, across) = matrix.shape, matrix.stride()
    down, across = down if rows > 1 else 1, across if columns > 1 else 1
    if down == 1 or across == 1:
        return matrix, down, across
    return matrix.contiguous(), columns, 1
