"""Causal attention on this CPU, forward and backward, for SmolLM2's heads: Lorry's kernel, and
torch's as it runs where there are no kernels, and as a plain call.

    .venv/bin/python benchmarks/attention.py
    LORRY_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
        .venv/bin/python benchmarks/attention.py

2048 tokens as segments of one length, one thread. The ways take turns; CPU time, median of five. No
time is shown unless each way's gradients are near float64's. JSON goes to
benchmarks/results/ (records.py).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
from isa import described
from measure import machine
from records import keep
from torch import Tensor
from torch.nn import functional as F

from lorry.kernels import attention as kernel
from lorry.kernels import kernel_status
from lorry.models.decoder.attention import PackedSegments, attend_with_sdpa
from lorry.train.resources.peak import tune_allocator

HEADS, GROUPS, WIDTH, TOKENS, ROUNDS = 9, 3, 64, 2048, 5
LENGTHS = (32, 128, 512, 1024, 2048)
# what gradients may be off, relative to float64's
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
Way = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def lorry(segments: PackedSegments) -> Way:
    """The kernel, segments end to end."""
    starts = segments.starts

    def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        o, lse = kernel.run_attention(q, k, v, starts, WIDTH**-0.5)
        return kernel.run_attention_backward(q, k, v, o, lse, starts, WIDTH**-0.5, grad)

    return run


def through_autograd(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Way:
    """torch's way: leaves, a forward pass, a backward pass."""

    def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attend(*leaves), leaves, grad)

    return run


def without_kernels(segments: PackedSegments) -> Way:
    """What Lorry runs where it has no kernels: short segments as products, longer ones by torch's
    attention."""
    buckets = segments.buckets
    return through_autograd(lambda q, k, v: attend_with_sdpa(q, k, v, buckets))


def fused(length: int) -> Way:
    """torch's attention, with keys and values repeated as its backward needs."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        framed = [
            x.view(-1, length, *x.shape[1:]).transpose(1, 2)  # [n,h,length,D]
            for x in (q, *(x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v)))
        ]
        out = F.scaled_dot_product_attention(framed[0], framed[1], framed[2], is_causal=True)
        return out.transpose(1, 2).reshape(q.shape)

    return through_autograd(attend)


def measure(dtype: torch.dtype, length: int) -> list[object]:
    """A row of the table. Raises SystemExit where a way's gradients are wrong."""
    inputs = [torch.randn(TOKENS, h, WIDTH).to(dtype) for h in (HEADS, GROUPS, GROUPS, HEADS)]
    bounds = [(start, start + length) for start in range(0, TOKENS, length)]
    segments = PackedSegments(bounds, torch.device("cpu"))
    ways: dict[str, Way] = {
        "lorry": lorry(segments),
        "without kernels": without_kernels(segments),
        "torch fused": fused(length),
    }
    truth = fused(length)(*(x.double() for x in inputs))
    for name, way in ways.items():
        worst = max(
            float((a.double() - b).norm() / b.norm())
            for a, b in zip(way(*inputs), truth, strict=True)
        )
        if worst > BOUNDS[dtype]:
            raise SystemExit(f"{name} at {length}: gradients off by {worst:.1e}; no time shown")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.thread_time()
            way(*inputs)
            times[name].append(1e3 * (time.thread_time() - began))
    ms = {name: statistics.median(t) for name, t in times.items()}
    ratios = [ms[name] / ms["lorry"] for name in ("without kernels", "torch fused")]
    return [
        str(dtype).removeprefix("torch."),
        length,
        *(round(t, 2) for t in ms.values()),
        *(round(r, 2) for r in ratios),
    ]


def main() -> None:
    status = kernel_status()
    if not status.active:
        raise SystemExit(f"the kernel does not run here: {status.line()}")
    tune_allocator()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for dtype in BOUNDS:
        for length in LENGTHS:
            rows.append(measure(dtype, length))
            print("  ".join(f"{x:>10}" for x in rows[-1]), flush=True)
    record = {
        "title": f"Attention of {TOKENS} tokens, forward and backward, one thread, CPU time, {status.isa}",
        "columns": [
            "format",
            "tokens of a segment",
            "Lorry ms",
            "without kernels ms",
            "torch fused ms",
            "without kernels / Lorry",
            "torch fused / Lorry",
        ],
        "rows": rows,
        "machine": machine(),
        "isa": described(),
        "attention": status.attention,
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "kernels": status.digest,
    }
    print(f"kept in {keep(record, 'attention')}")


if __name__ == "__main__":
    main()
