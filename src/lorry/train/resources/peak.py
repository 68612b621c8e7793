"""How much memory this process has used at most: resident set on the CPU, allocated bytes on a GPU."""

from __future__ import annotations

import ctypes
import os
import resource
import sys

import psutil
import torch


def peak_memory() -> int:
    """Bytes. On CUDA the allocator's peak, elsewhere the peak resident set of the process, imports
    included.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory() -> int:
    """Bytes that this process has now, as `peak_memory` counts them."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.memory_allocated())
    return int(psutil.Process().memory_info().rss)


def release_freed_memory() -> bool:
    """Give the system what glibc keeps of freed memory, as `tune_allocator` has it do; whether that could
    be: of a model's loading, and more of its conversion, training would hold what it has no use for."""
    libc = _glibc()
    if libc is None:
        return False
    libc.malloc_trim(0)
    return True


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc and may be told what to keep."""
    if not sys.platform.startswith("linux") or os.environ.get("LORRY_MALLOC") == "0":
        return None
    libc = ctypes.CDLL(None)
    known = all(hasattr(libc, name) for name in ("mallopt", "malloc_trim", "gnu_get_libc_version"))
    return libc if known else None


# kernels oneDNN keeps: a step needs about 45, and every other (rounded) batch length as many again
PRIMITIVE_CACHE_CAPACITY = 192


def tune_allocator() -> bool:
    """Keep memory steady and cheap on the CPU; returns whether glibc's allocator was tuned.
    `LORRY_MALLOC=0` opts out of that.

    glibc: keep large freed blocks instead of returning each to the system; every activation is such
    a block, and fetching its pages anew costs about a fifth of a training step. oneDNN: it keeps
    1024 compiled kernels by default, about a megabyte each, and a run whose batches have ever new
    lengths would grow by gigabytes (seen). The decoder rounds lengths up to few; with fewer kernels
    kept than one step needs, each product would be compiled again every time (3 ms instead of 1,
    seen).
    """
    # oneDNN's own and torch's on top of it
    for cache in (
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
        "LRU_CACHE_CAPACITY",
    ):
        os.environ.setdefault(cache, str(PRIMITIVE_CACHE_CAPACITY))
    libc = _glibc()
    if libc is None:
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    # 1 GiB, above most activations, and the largest C int: never give memory back
    return bool(
        libc.mallopt(mmap_threshold, 1 << 30) and libc.mallopt(trim_threshold, (1 << 31) - 1)
    )
