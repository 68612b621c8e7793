"""How much memory this process has used at most: resident set on the CPU, allocated bytes on a GPU."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory() -> int:
    """Bytes. On CUDA the allocator's peak, elsewhere the peak resident set of the process, imports included."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
