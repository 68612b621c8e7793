"""Where plain products stop beating torch's fused attention on this CPU, forward and backward, for SmolLM2's heads.

.venv/bin/python benchmarks/attention.py
"""

from __future__ import annotations

import statistics
import time

import torch
from torch.nn import functional as F

from lorry.models.attention import ShortAttention

HEADS, GROUPS, WIDTH, TOKENS = 9, 3, 64, 2048


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's kernel, with keys and values repeated as its backward needs."""
    k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def milliseconds(run: object, inputs: list[torch.Tensor], grad: torch.Tensor) -> float:
    """One forward and backward."""
    began = time.thread_time()
    run(*inputs).backward(grad)  # type: ignore[operator]
    return 1e3 * (time.thread_time() - began)


def main() -> None:
    torch.set_num_threads(1)
    print("length   fused ms   plain ms   ratio")
    for length in (32, 64, 128, 192, 256, 512):
        count = TOKENS // length
        make = lambda h, n=count, t=length: torch.randn(n, h, t, WIDTH).bfloat16().requires_grad_()  # noqa: E731
        inputs, grad = [make(HEADS), make(GROUPS), make(GROUPS)], torch.randn(count, HEADS, length, WIDTH).bfloat16()
        times: dict[str, list[float]] = {"fused": [], "plain": []}
        for _ in range(9):
            times["fused"].append(milliseconds(fused, inputs, grad))
            times["plain"].append(milliseconds(ShortAttention.apply, inputs, grad))
        a, b = (statistics.median(t) for t in times.values())
        print(f"{length:6d} {a:10.1f} {b:10.1f} {a / b:7.2f}")


if __name__ == "__main__":
    main()
