"""The rate at which this machine multiplies matrices, FLOP/s: what `lorry plan` turns FLOPs into seconds with."""

from __future__ import annotations

import time

import torch

SIDE, REPEATS = 2048, 5


def matrix_rate(device: str, precision: str, threads: int) -> float | None:
    """The best of a few products [SIDE, SIDE] @ [SIDE, SIDE]; None where the device is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        return None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a = torch.randn(SIDE, SIDE, device=device).to(getattr(torch, precision))
        return 2 * SIDE**3 / min(_seconds(a, device) for _ in range(REPEATS + 1))
    finally:
        torch.set_num_threads(before)


def _seconds(a: torch.Tensor, device: str) -> float:
    began = time.perf_counter()
    a @ a
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
