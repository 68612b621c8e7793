"""Is `lorry plan` right? Predicted against measured peak memory of real training steps on the CPU.

    .venv/bin/python benchmarks/plan.py              # all configurations, about five minutes on one core
    .venv/bin/python benchmarks/plan.py --only gpt2  # those whose name holds a word; nothing is written

Each configuration runs in a fresh process, or in two that train all weights together (`lora=null`),
of which the fullest counts: five steps of Lorry's backend on packed rows of one length. Measured: the
peak resident set minus the resident set after imports. Predicted: `lorry.plan` on the same config,
before anything is made. JSON goes to benchmarks/results/ (records.py), a plot of the same name to
docs/results/; exit code 1 if one prediction is off by more than 10%.

To calibrate src/lorry/plan/constants.py: `rest` is what was measured beyond runtime, weights, what
trains, optimizer and kept activations, to be explained by `work` (derived) and `alloc` (GAPS,
GAPS_PER_LAYER); `buffers` is `rest` less `work` in units of one [T, widest side] buffer, which
should be GAPS[recompute] + GAPS_PER_LAYER x layers. What is left over at small T is RUNTIME.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import Mock

import records
from layout_engines import environments
from measure import machine

ROOT = Path(__file__).resolve().parent.parent
BOUND, STEPS, RATE = 0.10, 5, 1e-4
# the components that `rest` is to be explained by, and the one that nothing measured is
PASSING = ("workspace", "allocator", "margin")
# the embedded model's own weights; every other shape is filled with random numbers
REAL = "smollm2-135m-instruct"
SMALL_QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Case:
    """One configuration: rows packed sequences of length tokens each; of rank 0 all weights train."""

    model: str
    rank: int
    length: int
    recompute: str = "none"
    rows: int = 1
    dtype: str = "bfloat16"
    backend: Literal["single", "ddp", "fsdp"] = "single"

    @property
    def name(self) -> str:
        kind = "" if self.dtype == "bfloat16" else f" {self.dtype}"
        kind += "" if self.processes == 1 else f" {self.backend} {self.processes}"
        trained = f"r={self.rank}" if self.rank else "lora=null"
        return f"{self.model} {trained} {self.rows}x{self.length} {self.recompute}{kind}"

    @property
    def processes(self) -> int:
        """How many train it, each on ``rows`` of its own."""
        return 1 if self.backend == "single" else 2


CASES = (
    Case(REAL, 16, 1024),
    Case(REAL, 16, 1024, "full"),
    Case(REAL, 4, 512, rows=2),
    Case("smollm2-135m", 8, 256),
    Case("smollm2-135m", 64, 512),
    Case("smollm2-135m", 128, 1024),
    Case("smollm2-135m", 16, 2048),
    Case("smollm2-135m", 16, 2048, "full"),
    Case("smollm2-135m", 128, 256, "full", rows=4),
    Case("gpt2", 16, 1024),
    Case("gpt2", 64, 512, "full"),
    Case("gpt2", 4, 512),
    Case("pythia-160m", 16, 1024),
    Case("pythia-160m", 128, 256),
    Case("pythia-160m", 32, 2048, "full"),
    Case("qwen3-small", 16, 1024),
    Case("qwen3-small", 32, 2048, "full"),
    Case("qwen3-small", 128, 512),
    Case("smollm2-135m", 16, 512, dtype="float32"),
    Case("gpt2", 16, 512, dtype="float32"),
    Case("smollm2-135m", 16, 1024, dtype="float32"),
    Case("smollm2-135m", 16, 512, "full", dtype="float32"),
    *(
        Case(REAL, 0, 512, dtype=dtype, backend=backend)
        for dtype in ("bfloat16", "float32")
        for backend in ("ddp", "fsdp")
    ),
)


def config_of(model: str) -> dict[str, Any]:
    from lorry.plan.known import KNOWN_CONFIGS

    return SMALL_QWEN3 if model == "qwen3-small" else KNOWN_CONFIGS[model]


def predict(case: Case) -> dict[str, Any]:
    """The plan's numbers; imports no torch."""
    from lorry.config.schema.lora import LoraConfig
    from lorry.plan.adapters import plan_adapter
    from lorry.plan.full.weights import plan_weights
    from lorry.plan.machine import attention_kernel
    from lorry.plan.memory import MemorySetup
    from lorry.plan.parallel.per_rank import memory_per_rank
    from lorry.plan.parallel.split import ParallelSplit
    from lorry.plan.shapes import read_model_shape

    shape = read_model_shape(config_of(case.model))
    setup = MemorySetup(
        tokens=case.rows * case.length,
        length=case.length,
        recompute=case.recompute,
        precision=case.dtype,  # type: ignore[arg-type]
        attention=attention_kernel(),
    )
    trained = (
        plan_adapter(shape, LoraConfig(r=case.rank), case.rank)
        if case.rank
        else plan_weights(shape, "all")
    )
    split = ParallelSplit(backend=case.backend, processes=case.processes)
    memory = memory_per_rank(shape, trained, setup, split, 1)
    parts = {c.name: c.bytes for c in memory.components if c.name != "libraries"}
    g = shape.geometry
    buffer = setup.tokens * max(g.width, shape.queries, g.mlp_width) * setup.element
    return {"predicted": memory.above_imports, "components": parts, "buffer": buffer}


# --- the other side, in a process of its own


def resident(what: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process, bytes; unlike getrusage's, this peak
    is the program's alone.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def measure(case: Case) -> dict[str, Any]:
    """Real steps; returns the peak above imports and each step's peak so far."""
    from lorry.adapters.attach import attach
    from lorry.adapters.base_weights import make_weights_trainable
    from lorry.adapters.spec import LoraSpec
    from lorry.backends.distributed.communicator import open_communicator
    from lorry.backends.distributed.fsdp import sharder_of
    from lorry.backends.optim import OptimSettings
    from lorry.backends.registry import BACKENDS
    from lorry.config.schema.backend import TrainBackendConfig
    from lorry.data.batch import TokenizedExample, collate
    from lorry.models.loading.load import load_model
    from lorry.notes import ignore_note
    from lorry.tasks.sft import SftTask
    from lorry.train.resources.peak import tune_allocator

    tune_allocator()
    imports = resident("VmRSS")
    settings = TrainBackendConfig(name=case.backend)
    communicator = open_communicator(settings)
    shard = sharder_of(settings, communicator, "cpu")
    model = (
        load_model(REAL, dtype=case.dtype, shard=shard, add_note=ignore_note).model
        if case.model == REAL
        else random_model(case)
    )
    if case.rank:
        attach(model, LoraSpec(r=case.rank))
        trained = "default"
    else:
        make_weights_trainable(model, "all")
        trained = "base"
    model.gradient_checkpointing = case.recompute == "full"
    backend = BACKENDS[case.backend](model, [trained], OptimSettings(), communicator=communicator)
    task = SftTask(Mock(), [], 0, [trained])
    peaks, losses = [], []
    for step in range(STEPS):
        ids = [
            [(row * 7919 + i * 31 + step) % 5000 for i in range(case.length)]
            for row in range(case.rows * case.processes)
        ]
        batch = collate(
            [TokenizedExample(tokens, [0.0] + [1.0] * (case.length - 1)) for tokens in ids]
        )
        task.stream.batches = lambda _, batch=batch: [batch]
        losses.append(
            backend.forward_backward(task.step_batches(step, {}), task, step).loss[trained]
        )
        backend.step({trained: RATE})
        peaks.append(resident("VmHWM") - imports)
    if not all(0 < loss < 100 for loss in losses):
        raise SystemExit(
            f"{case.name}: losses {losses}: this is no training, so its memory says nothing"
        )
    return {"measured": peaks[-1], "by_step": peaks, "imports": imports, "losses": losses}


def random_model(case: Case) -> Any:
    """Lorry's decoder of a shape with random weights, made in the format they stay in."""
    import torch

    from lorry.families import find_family
    from lorry.models.decoder.model import Decoder

    config = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **config_of(case.model),
    }
    family = find_family(config["model_type"])
    assert family is not None
    with torch.device("meta"):
        model = Decoder(family, config)
    draw, kind = torch.Generator().manual_seed(0), getattr(torch, case.dtype)
    state = {
        n: torch.empty(t.shape, dtype=kind).normal_(0, 0.02, generator=draw)
        for n, t in unique(model).items()
    }
    for name, value in state.items():
        if value.dim() == 1 and name.endswith("weight"):
            value.fill_(1.0)
    if model.geometry.tied:
        state[f"{family.head}.weight"] = state[f"{family.embed}.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    if model.geometry.tied:
        model.tie()
    return model.requires_grad_(False).eval()


def unique(model: Any) -> dict[str, Any]:
    """The state without a tied head."""
    head = f"{model.family.head}.weight"
    return {n: t for n, t in model.state_dict().items() if not (model.geometry.tied and n == head)}


# --- side by side


def run(case: Case) -> dict[str, Any]:
    """Both sides of one configuration."""
    command = [sys.executable, __file__, "--worker", json.dumps(asdict(case))]
    started = [
        subprocess.Popen(
            command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True
        )
        for variables in launched(case)
    ]
    said = [json.loads(each.communicate()[0].splitlines()[-1]) for each in started]
    fullest = max(said, key=lambda each: each["measured"])
    row = {"case": case.name, **asdict(case), **predict(case), **fullest}
    rest = row["measured"] - lasting_bytes(row["components"])
    return {**row, "error": row["predicted"] / row["measured"] - 1, "rest": rest}


def lasting_bytes(components: Mapping[str, int]) -> int:
    """All that is planned but what comes and goes, and the margin."""
    return sum(size for name, size in components.items() if name not in PASSING)


def launched(case: Case) -> list[dict[str, str]]:
    """What is added to the environment of each process."""
    if case.processes == 1:
        return [{}]
    return environments(case.processes, len(os.sched_getaffinity(0)))


def line(row: dict[str, Any]) -> str:
    """One row of the printed table."""
    mib = {k: row[k] / 2**20 for k in ("predicted", "measured", "rest")}
    parts = {k: v / 2**20 for k, v in row["components"].items()}
    gaps = (row["rest"] - row["components"]["workspace"]) / row["buffer"]
    return (
        f"{row['case']:44s} {mib['predicted']:8.0f} {mib['measured']:8.0f} {row['error']:+7.1%}   {parts['activations']:8.0f} "
        f"{parts['workspace']:6.0f} {parts['allocator']:5.0f}   {mib['rest']:6.0f} {gaps:6.1f}"
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Predicted over measured, with the band of the bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 6), dpi=130)
    most = max(max(r["predicted"], r["measured"]) for r in rows) / 2**20 * 1.1
    axes.plot([0, most], [0, most], color="0.4", linewidth=1)
    axes.fill_between(
        [0, most],
        [0, most * (1 - BOUND)],
        [0, most * (1 + BOUND)],
        color="0.92",
        label=f"within {BOUND:.0%}",
    )
    marks = {"none": "o", "full": "s"}
    for model, colour in zip(
        dict.fromkeys(r["model"] for r in rows), ("C0", "C1", "C2", "C3", "C4"), strict=False
    ):
        for recompute, mark in marks.items():
            mine = [r for r in rows if (r["model"], r["recompute"]) == (model, recompute)]
            xs, ys = ([r[k] / 2**20 for r in mine] for k in ("measured", "predicted"))
            axes.scatter(
                xs,
                ys,
                color=colour,
                marker=mark,
                s=34,
                label=f"{model}, recompute {recompute}" if mine else None,
            )
    axes.set(
        xlabel="measured peak above imports, MiB",
        ylabel="predicted, MiB",
        xlim=(0, most),
        ylim=(0, most),
    )
    axes.set_title("lorry plan against real training steps, CPU")
    axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", metavar="WORD", help="configurations whose name holds this; nothing is written"
    )
    parser.add_argument("--worker", metavar="CASE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(Case(**json.loads(args.worker)))))
        return 0
    print(
        f"{'MiB above imports':44s} {'predict':>8s} {'measure':>8s} {'error':>7s}   {'kept':>8s} {'work':>6s} {'alloc':>5s}   "
        f"{'rest':>6s} {'buffers':>6s}"
    )
    rows = []
    for case in CASES:
        if args.only is None or args.only in case.name:
            rows.append(run(case))
            print(line(rows[-1]), flush=True)
    wrong = [r["case"] for r in rows if abs(r["error"]) > BOUND]
    if args.only is None:
        keep(rows)
    print(
        f"{len(rows) - len(wrong)} of {len(rows)} within {BOUND:.0%}; worst {max(abs(r['error']) for r in rows):.1%}"
    )
    return 1 if wrong else 0


def table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What `benchmarks/results.py` shows."""
    columns = ["model, rank, rows x length, recompute", "predicted MiB", "measured MiB", "off by"]
    cells = [
        [r["case"], r["predicted"] >> 20, r["measured"] >> 20, f"{r['error']:+.1%}"] for r in rows
    ]
    return {
        "title": "`lorry plan`: predicted and measured peak above imports",
        "columns": columns,
        "rows": cells,
    }


def keep(rows: list[dict[str, Any]]) -> None:
    """The JSON and the plot."""
    import torch

    made = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "bound": BOUND,
        "steps": STEPS,
    }
    kept = records.keep({**made, **table(rows), "records": rows}, "plan")
    plot(rows, ROOT / "docs" / "results" / f"{kept.stem}.png")


if __name__ == "__main__":
    sys.exit(main())
