"""Optional C++ kernels for the CPU: attention by segment, norms, rotary positions, gates, the
vocabulary's softmax.

Each has a plain torch twin of the same maths in the module that calls it; without a C++ compiler,
on another device, or with LORRY_KERNELS=0 the twin runs, and `lorry doctor` says so. `python -m
lorry.kernels` builds them ahead of the first run.
"""

from lorry.kernels.build import (
    KernelStatus,
    call_kernel,
    kernel_for,
    kernel_status,
    load_library,
)

__all__ = ["KernelStatus", "call_kernel", "kernel_for", "kernel_status", "load_library"]
