"""Measured rates, FLOP/s, that `lorry plan` turns FLOPs into seconds with: of matrix products, and
of a run's own steps. plan/rates.py keeps them and says what holds for them.

Both are taken by wall clock, as a run will be, and say how long their thread waited for a core
meanwhile: on a machine that others use, the best of many short products comes nearest to what the
machine does when they have gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorry.config.schema.lora import LoraConfig
from lorry.config.schema.train import TrainConfig
from lorry.disk.durable import DiskError
from lorry.errors import ConfigError, ModelError
from lorry.kernels import matmul
from lorry.models.causal_lm import CausalLM
from lorry.models.decoder.model import Decoder
from lorry.plan import machine, rates
from lorry.plan.adapters import plan_adapter
from lorry.plan.flops import count_flops
from lorry.plan.memory import DeviceType, MemorySetup, PrecisionName, layer_path
from lorry.plan.rates import RateMeasurement, RunRate
from lorry.plan.shapes import read_model_shape

# Rows and side of a product [rows, side] @ [side, side], the shape of a layer's: the first that
# lasts long enough for the clock and for what starting it costs, so that one still fits between two
# turns of somebody else (some milliseconds). A longer one measures the neighbours.
MATRIX_SIZES, MIN_PRODUCT_SECONDS = ((128, 1024), (512, 2048), (2048, 2048)), 0.002
MAX_REPEATS, MAX_RATE_SECONDS = 500, 2.0  # products at most, and how long they may take altogether
MIN_PRODUCTS = 5  # products, however long they take
# Linux: ns on a core, ns waiting for one, turns
SCHEDSTAT_PATH = Path("/proc/thread-self/schedstat")


class CpuWaitTime:
    """The share of its time that this thread waited for a core since the object was made."""

    def __init__(self) -> None:
        self.began = self._read()

    def share(self) -> float | None:
        """From 0 to 1; None where the system does not say."""
        now, before = self._read(), self.began
        if now is None or before is None:
            return None
        ran, waited = now[0] - before[0], now[1] - before[1]
        return round(max(waited, 0) / (ran + waited), 3) if ran + waited > 0 else 0.0

    def _read(self) -> tuple[int, int] | None:
        try:
            ran, waited, *_ = SCHEDSTAT_PATH.read_text(encoding="ascii").split()
            return int(ran), int(waited)
        except (OSError, ValueError):
            return None


# --- products


def measure_matrix_rate(device: str, precision: str, threads: int | None) -> RateMeasurement | None:
    """The best of many short products; None where the device is not there. ``threads``: None, as
    many as torch takes by itself, which is what a run takes."""
    if device == "cuda" and not torch.cuda.is_available():
        return None
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        waiting = CpuWaitTime()

        def product(rows: int, side: int) -> Callable[[], float]:
            kind = getattr(torch, precision)
            # drawn once and outside the clock; made in fp32, since not every dtype can be drawn
            a, b = (torch.randn(n, side, device=device).to(kind) for n in (rows, side))
            return lambda: _product_seconds(a, b, device)

        return best_product_rate(product, waiting.share)
    finally:
        torch.set_num_threads(before)


def best_product_rate(
    product: Callable[[int, int], Callable[[], float]], waited: Callable[[], float | None]
) -> RateMeasurement:
    """The rate of the fastest of several products. ``product(rows, side)`` gives what makes one and
    returns its seconds; ``waited``: see `CpuWaitTime.share`, asked at the end."""
    for rows, side in MATRIX_SIZES:
        make = product(rows, side)
        make()  # what is compiled for this shape is compiled here
        durations = [make() for _ in range(MIN_PRODUCTS)]
        if min(durations) >= MIN_PRODUCT_SECONDS:
            break
    while len(durations) < MAX_REPEATS and sum(durations) < MAX_RATE_SECONDS:
        durations.append(make())
    # FLOPs of [rows, side] @ [side, side]; 1e-9 s: a clock may not have moved
    rate, load = 2 * rows * side**2 / max(min(durations), 1e-9), machine.load_average()
    return RateMeasurement(
        rate=rate, at=rates.utc_timestamp(), repeats=len(durations), load=load, waited=waited()
    )


def _product_seconds(a: torch.Tensor, b: torch.Tensor, device: str) -> float:
    began = time.perf_counter()
    matmul.mm(a, b)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


# --- steps

WARMUP_STEPS = 2  # first steps that do not count: they compile and fetch memory
MIN_TIMED_STEPS, MIN_TIMED_SECONDS = 8, 5.0  # after those; fewer say little
RATE_DEVICES: dict[str, DeviceType] = {"cpu": "cpu", "cuda": "cuda"}
DTYPE_PRECISIONS: dict[torch.dtype, PrecisionName] = {
    torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16",
}  # fmt: skip


class StepTimes:
    """A listener that hears how long the steps of this process took: (tokens, seconds) of each."""

    def __init__(self) -> None:
        self.steps = list[tuple[int, float]]()
        self.waited: float | None = None
        self.waiting = CpuWaitTime()

    def start(self, done: int, total: int) -> None:
        self.waiting = CpuWaitTime()

    def step(self, record: Mapping[str, Any]) -> None:
        self.steps.append((int(record["tokens"]), float(record["seconds"])))

    def evaluation(self, record: Mapping[str, Any]) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def finish(self) -> None:
        self.waited = self.waiting.share()


def tokens_per_second(steps: Iterable[tuple[int, float]]) -> tuple[float, int] | None:
    """Of the faster half of a run's steps, together, and how many steps were looked at; None where
    they are too few or too short. In the slower half the machine did something else."""
    timed = [
        (tokens, seconds)
        for tokens, seconds in list(steps)[WARMUP_STEPS:]
        if tokens > 0 and seconds > 0
    ]
    if len(timed) < MIN_TIMED_STEPS or sum(seconds for _, seconds in timed) < MIN_TIMED_SECONDS:
        return None
    # seconds per token, so that short steps are not taken for fast ones; half, rounded up
    fastest = sorted(timed, key=lambda step: step[1] / step[0])[: -(-len(timed) // 2)]
    return sum(tokens for tokens, _ in fastest) / sum(seconds for _, seconds in fastest), len(timed)


@dataclass(frozen=True)
class PlannedRun:
    """What the plan counts FLOPs from: the base's name, one new adapter on it, its batches."""

    model: str
    lora: LoraConfig
    train: TrainConfig
    max_length: int


def record_step_rate(
    times: StepTimes, run: PlannedRun, model: CausalLM, threads: int | None
) -> str:
    """Let the steps of a finished run correct what `lorry plan` says of this machine. Returns a
    note where that cannot be done, else nothing.

    Not of models that run through transformers, whose FLOPs the plan does not count.
    """
    measured = tokens_per_second(times.steps)
    device, precision = model.device.type, str(model.dtype).removeprefix("torch.")
    if (
        measured is None
        or not isinstance(model, Decoder)
        or device not in RATE_DEVICES
        or model.dtype not in DTYPE_PRECISIONS
    ):
        return ""
    try:
        run_rate = _achieved_rate(run, model, times, measured)
        rates.keep_run_rate(machine.machine_identity(device, precision, threads), run_rate)
    except (ConfigError, ModelError, DiskError) as error:
        return f"the measured speed is not saved for `lorry plan`: {error}"
    return ""


def _achieved_rate(
    run: PlannedRun, model: Decoder, times: StepTimes, measured: tuple[float, int]
) -> RunRate:
    """The plan's FLOPs of the run's steps, a second."""
    speed, count = measured
    shape = read_model_shape(model.config, where=run.model)
    steps = len(times.steps) * run.train.gradient_accumulation_steps
    # tokens of a mean micro-batch, which is what a plan counts FLOPs and memory of
    tokens = max(1, round(sum(tokens for tokens, _ in times.steps) / steps))
    length = min(run.max_length, max(1, tokens // run.train.per_device_train_batch_size))
    setup = MemorySetup(
        tokens=tokens,
        length=length,
        precision=DTYPE_PRECISIONS[model.dtype],
        device=RATE_DEVICES[model.device.type],
        recompute="full" if run.train.gradient_checkpointing else "none",
        attention=machine.attention_kernel(),
        whole=True,
    )
    flops = count_flops(shape, plan_adapter(shape, run.lora, run.lora.most_rank), setup).step
    return RunRate(
        rate=speed * flops,
        at=rates.utc_timestamp(),
        repeats=count,
        load=machine.load_average(),
        waited=times.waited,
        model=run.model,
        parameters=shape.parameters,
        tokens=tokens,
        path=layer_path(shape),
    )
