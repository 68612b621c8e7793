"""What is measured: wall and CPU time per step, memory above the imports, and how fast this process
multiplies matrices.

The floor of a step is the arithmetic it cannot avoid, per token, with N weights in matrices, P
adapter values, L layers, attention width q and T tokens of context: LoRA 4N + 7LqT + 6P, full
fine-tuning 6N + 7LqT, a forward pass 2N + 2LqT (causal attention, whose backward is 2.5 times its
forward; weights that are frozen need no gradient of their own).
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CPUINFO = Path("/proc/cpuinfo")


def rss() -> int:
    """Resident set now, bytes."""
    return _status("VmRSS") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_rss() -> int:
    """Highest resident set of this program, bytes. Not getrusage where it can be helped: on Linux
    that also counts the parent's memory from before this program was started, which would hide a
    lean engine behind a fat parent.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """From now on `peak_rss` is the highest since this call (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


@dataclass
class Watch:
    """What an engine tells of itself while it runs. The clock of a step runs from the end of the
    step before.
    """

    folder: Path
    engine: str
    known: dict[tuple[int, ...], int]  # token ids of a row -> its number
    losses: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    first_rows: list[int] = field(default_factory=list)
    loaded_bytes: int = 0

    def start(self) -> None:
        """The model is loaded and the next thing is the first step."""
        self.loaded_bytes = rss()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def saw(self, sequences: Sequence[Sequence[int]]) -> None:
        """The rows of the first step, so that the reference can compute the same. One that is no
        row of the case is refused.
        """
        if not self.losses:
            unknown = [s for s in sequences if tuple(s) not in self.known]
            if unknown:
                raise SystemExit(
                    f"{self.engine} trained on a sequence of {len(unknown[0])} tokens that is no row of the data"
                )
            self.first_rows = [self.known[tuple(s)] for s in sequences]

    def gradients(self, make: Callable[[], dict[str, Tensor]]) -> None:
        """Between the first backward and the first update; the gradients go to a file."""
        if not self.losses:
            from safetensors.torch import save_file

            save_file(
                {n: g.detach().float().contiguous() for n, g in make().items()},
                self.folder / f"{self.engine}.safetensors",
            )

    def step(self, loss: float, tokens: int, supervised: int) -> None:
        """A step is over; ``tokens`` are real ones, padding does not count."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.wall.append(wall - self._wall)
        self.cpu.append(cpu - self._cpu)
        self.losses.append(loss)
        self.tokens.append(tokens)
        self.supervised.append(supervised)
        self._wall, self._cpu = time.perf_counter(), time.process_time()


@dataclass(frozen=True)
class Shape:
    """The matrices of a Llama-like model: ``linears`` is (inputs, outputs, how many) of the adapted
    ones.
    """

    linears: tuple[tuple[int, int, int], ...]
    head: tuple[int, int]
    layers: int
    attention: int  # heads times head width

    @staticmethod
    def of(base: Path) -> Shape:
        """From a model directory's config.json."""
        c = json.loads((base / "config.json").read_text())
        d, f, layers, heads = (
            c["hidden_size"],
            c["intermediate_size"],
            c["num_hidden_layers"],
            c["num_attention_heads"],
        )
        width = c.get("head_dim") or d // heads
        q, k = heads * width, c.get("num_key_value_heads", heads) * width
        linears = (
            (d, q, layers),
            (d, k, 2 * layers),
            (q, d, layers),
            (d, f, 2 * layers),
            (f, d, layers),
        )
        return Shape(linears, (d, c["vocab_size"]), layers, q)

    @property
    def weights(self) -> int:
        """N: weights of all matrices a token passes, the head's included."""
        return sum(a * b * n for a, b, n in self.linears) + self.head[0] * self.head[1]

    def adapter(self, rank: int) -> int:
        """P: values of an adapter of this rank on every linear layer but the head."""
        return sum(rank * (a + b) * n for a, b, n in self.linears)

    def flops(self, work: str, length: float, rank: int) -> float:
        """Operations per token that ``work`` (lora, full or forward) cannot avoid at ``length``
        tokens of context.
        """
        attention = self.layers * self.attention * length
        if work == "lora":
            return 4 * self.weights + 7 * attention + 6 * self.adapter(rank)
        return {
            "full": 6 * self.weights + 7 * attention,
            "forward": 2 * self.weights + 2 * attention,
        }[work]


def matrix_rate(shape: Shape, rows: int, dtype: str, repeats: int = 2) -> float:
    """Operations per second of plain products of the model's own shapes in ``dtype`` (torch's name),
    forward and with respect to the input: each shape at its best of ``repeats``, weighed by how
    often it occurs.
    """
    import torch

    # more rows are not faster, and this should not be the largest thing in memory
    rows = min(rows, 1024)
    flops = seconds = 0.0
    for inputs, outputs, count in (*shape.linears, (*shape.head, 1)):
        kind: torch.dtype = getattr(torch, dtype)
        weight = torch.randn(outputs, inputs).to(kind)
        x, g = torch.randn(rows, inputs).to(kind), torch.randn(rows, outputs).to(kind)
        y, dx = torch.empty_like(g), torch.empty_like(x)
        for left, right, out in ((x, weight.t(), y), (g, weight, dx)):
            seconds += count * min(
                _timed(lambda a=left, b=right, c=out: torch.mm(a, b, out=c))
                for _ in range(repeats + 1)
            )  # type: ignore[misc]
            flops += count * 2 * rows * inputs * outputs
    return flops / seconds


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


QUIET = 0.25  # cores that other programs may have while something is timed


class Others:
    """The cores that other programs have while the children of this process run (Linux)."""

    def __init__(self) -> None:
        self._began = self._now()

    def cores(self) -> float:
        """On average since this was made; 0 where the system does not say. What a hypervisor takes
        for its other guests counts.
        """
        wall, busy, own = (b - a for a, b in zip(self._began, self._now(), strict=True))
        return max(0.0, (busy - own) / wall)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: of the clock, that cores were not idle, that this process and its children had."""
        own = sum(
            used.ru_utime + used.ru_stime
            for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        )
        path = Path("/proc/stat")
        if not path.exists():
            return time.perf_counter(), own, own
        user, nice, system, _, _, irq, softirq, steal = map(int, path.read_text().split()[1:9])
        ticks = user + nice + system + irq + softirq + steal
        return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), own


def machine() -> dict[str, Any]:
    """Where and with what this was measured."""
    found = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
    }
    for package in ("lorry", "torch", "transformers", "peft", "trl", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def cpu_name() -> str:
    """Name, family, model and matrix instructions of the processor, as Linux tells them; of an ARM
    processor its implementer and part.
    """
    facts: dict[str, str] = {}
    for line in CPUINFO.read_text().splitlines() if CPUINFO.exists() else []:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    flags = [
        f
        for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
        if f in facts.get("flags", "").split()
    ]
    numbers = {
        "family": "cpu family",
        "model": "model",
        "implementer": "CPU implementer",
        "part": "CPU part",
    }
    known = [f"{name} {facts[key]}" for name, key in numbers.items() if key in facts]
    named = ", ".join((facts.get("model name", platform.machine()), *known))
    return f"{named} ({', '.join(flags) or 'no flags known'})"
