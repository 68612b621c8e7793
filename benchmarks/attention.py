"""Causal attention on this CPU, forward and backward, for SmolLM2's heads: Lorry's kernel, torch's,
plain fp32 products.

    .venv/bin/python benchmarks/attention.py

2048 tokens as segments of one length, bfloat16, one thread. The three take turns; CPU time, median
of nine. No time is shown unless each way's gradients are within 1% of float64's. JSON goes to
benchmarks/results/attention-cpu.json.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lorry.kernels import attention as kernel
from lorry.kernels import kernel_status
from lorry.models.decoder.attention import ShortAttention
from lorry.train.resources.peak import tune_allocator

HEADS, GROUPS, WIDTH, TOKENS = 9, 3, 64, 2048
Way = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def framed(x: Tensor, length: int) -> Tensor:
    """[T,h,D] -> [n,h,length,D]."""
    return x.view(-1, length, *x.shape[1:]).transpose(1, 2)


def lorry(length: int) -> Way:
    """The kernel, segments end to end."""
    starts = torch.arange(0, TOKENS + 1, length)

    def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        o, lse = kernel.run_attention(q, k, v, starts, WIDTH**-0.5)
        return kernel.run_attention_backward(q, k, v, o, lse, starts, WIDTH**-0.5, grad)

    return run


def through_autograd(attend: Callable[..., Tensor], length: int, dtype: torch.dtype) -> Way:
    """torch's way: leaves, a forward pass, a backward pass."""

    def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*(framed(x, length) for x in leaves))
        return torch.autograd.grad(out, leaves, framed(grad, length).to(dtype))

    return run


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's kernel, with keys and values repeated as its backward needs."""
    k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def main() -> None:
    if not kernel_status().amx:
        raise SystemExit(f"the kernel does not run here: {kernel_status().line()}")
    tune_allocator()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs = [torch.randn(TOKENS, h, WIDTH).bfloat16() for h in (HEADS, GROUPS, GROUPS, HEADS)]
    rows = []
    for length in (32, 64, 128, 256, 512, 1024, 2048):
        ways: dict[str, Way] = {
            "lorry": lorry(length),
            "torch fused": through_autograd(fused, length, torch.bfloat16),
            "plain fp32": through_autograd(ShortAttention.apply, length, torch.bfloat16),
        }
        truth = through_autograd(fused, length, torch.float64)(*inputs)
        for name, way in ways.items():
            worst = max(
                float((a.double() - b).norm() / b.norm())
                for a, b in zip(way(*inputs), truth, strict=True)
            )
            if worst > 1e-2:
                raise SystemExit(f"{name} at {length}: gradients off by {worst:.2%}; no time shown")
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(9):
            for name, way in ways.items():
                began = time.thread_time()
                way(*inputs)
                times[name].append(1e3 * (time.thread_time() - began))
        ms = {name: statistics.median(t) for name, t in times.items()}
        rows.append(
            [length, *(round(t, 2) for t in ms.values()), round(ms["torch fused"] / ms["lorry"], 2)]
        )
        print("  ".join(f"{x:>10}" for x in rows[-1]), flush=True)
    columns = [
        "tokens of a segment",
        "Lorry ms",
        "torch fused ms",
        "plain fp32 ms",
        "torch / Lorry",
    ]
    title = f"Attention of {TOKENS} tokens, forward and backward, one thread, CPU time"
    record = {
        "title": title,
        "columns": columns,
        "rows": rows,
        "torch": torch.__version__,
        "kernels": kernel_status().digest,
    }
    path = Path(__file__).parent / "results" / "attention-cpu.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
