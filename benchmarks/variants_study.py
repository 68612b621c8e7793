"""A study: which rank, alpha, layers, rate and variant of LoRA to take, and what each costs.

    make study-variants                           # SmolLM2-135M, gsm8k and common_gen: an hour of two cores
    python benchmarks/variants_study.py --full    # ten times the tokens, five rates: a day
    python benchmarks/variants_study.py --docs    # docs/choosing.md and its plot from the JSON

Everything is trained by `lorry sweep`, so that jobs share passes over the base, but for whole
weights (`lorry sft lora=null`), which cannot. A way of training has a curve: held-out loss over a
grid of learning rates; where the best lies at the grid's edge, the grid grows. Each
variant then trains at the best rate of its curve under several seeds, in a process of its own, whose
time and memory are its own.

What is finished is not done again: the same command goes on, and exit code 75 says that the time of
a sitting is over. Rows come from LORRY_DATA or ../shared/data; the tables: variants_table.py.
Results: benchmarks/results/variants-study-small-cpu.json, with --full variants-study-cpu.json, in
float32 (--dtype, or what this machine has) variants-study-small-float32-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import variants_table
from experts_rows import MODEL, ROOT, read_lines, set_rows, shuffled
from unlearn_study import Unfinished, call

TASKS = ("gsm8k", "common_gen")
DEFAULT_RATE = 2e-4  # of `learning_rate`: what it costs is asked, too
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
# not left to a default, which may change
ALPHA = {"lora_alpha": 32}


@dataclass(frozen=True)
class Size:
    """How much of everything. ``rows``: trained on, once, by task; ``batch``: rows a step, by task;
    ``large_rows``: trained on in part d, by task, where there is one; ``held``: rows that are asked,
    by task; ``rates``: the grid of LoRA, ``full_rates`` of whole weights, ``few``: how many of the
    grid's middle a variant has; ``extend``: how often a grid grows at its edge; ``seeds``: of the
    best of each; ``init_rows``: rows that a data-driven start reads; ``jobs`` in a
    pass; ``dtype`` of the base.
    """

    rows: Mapping[str, int]
    batch: Mapping[str, int]
    large_rows: Mapping[str, int]
    held: Mapping[str, int]
    rates: Sequence[float]
    full_rates: Sequence[float]
    few: int
    extend: int
    seeds: int
    init_rows: int
    jobs: int
    dtype: str = "auto"


FULL = Size(
    {"gsm8k": 320, "common_gen": 832}, batch={"gsm8k": 8, "common_gen": 8},
    large_rows={"gsm8k": 640, "common_gen": 832}, held={"gsm8k": 128, "common_gen": 128},
    rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2), full_rates=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    few=3, extend=2, seeds=3, init_rows=64, jobs=8,
)  # fmt: skip
SMALL = Size(
    {"gsm8k": 32, "common_gen": 64}, batch={"gsm8k": 2, "common_gen": 4},
    # four steps of 64; of gsm8k as many would be a third of the study's time
    large_rows={"common_gen": 256}, held={"gsm8k": 16, "common_gen": 48},
    rates=(3e-4, 1e-3, 3e-3), full_rates=(2e-5, 6e-5, 2e-4),
    few=3, extend=2, seeds=3, init_rows=8, jobs=8,
)  # fmt: skip
# part d, rows a step: what fits memory, and eight times that
BATCHES = (8, 64)
PARTS = ("ranks", "full", "variants", "targets", "batch")


@dataclass(frozen=True)
class Way:
    """A way of training: settings of a job by group, its part of the study, and its grid: that of
    LoRA times ``shift``, or of ``whole`` weights. ``quantize``: how the base is held."""

    name: str
    words: str
    part: str
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shift: float = 1.0
    quantize: str | None = None
    whole: bool = False

    def grid(self, size: Size) -> list[float]:
        """The rates that are tried at first."""
        rates = size.full_rates if self.whole else size.rates
        if self.part == "variants":
            left = (len(rates) - size.few) // 2
            rates = rates[left : left + size.few]
        return [float(f"{rate * self.shift:.2g}") for rate in rates]


@dataclass(frozen=True)
class Point:
    """One training: a way at a rate under a seed."""

    way: Way
    rate: float
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its job."""
        mantissa, exponent = f"{self.rate:.1e}".split("e")
        return f"{self.way.name}-lr{mantissa}e{int(exponent)}"


def list_ways(size: Size, task: str) -> list[Way]:
    """All of them, in the order of the parts: the most informative first."""
    steps = size.rows[task] // size.batch[task]
    rows = {"init_rows": size.init_rows}
    # the grids of what is known to want a lower rate begin there
    variants: list[tuple[str, str, dict[str, Any], float]] = [
        ("rslora-r64", "rsLoRA, r 64, alpha 32", {"r": 64, "use_rslora": True}, 0.1),
        ("loraplus-16", "LoRA+, ratio 16 (rate of A)", {"train": {"loraplus_lr_ratio": 16}}, 0.1),
        ("dora", "DoRA", {"use_dora": True}, 1),
        ("pissa", "PiSSA (16 iterations)", {"init_lora_weights": "pissa_niter_16"}, 0.1),
        ("eva", "EVA", {"init_lora_weights": "eva", **rows}, 0.1),
        ("lora-ga", "LoRA-GA", {"init_lora_weights": "lora_ga", **rows}, 0.1),
        ("adalora", "AdaLoRA, ranks 24 to 16 on average",
         {"variant": "adalora", "init_r": 24, "target_r": 16, "lora_alpha": 48,
          "tinit": steps // 8, "tfinal": steps // 4}, 3),
    ]  # fmt: skip
    found = [
        Way(f"r{r}-alpha{alpha}", f"r {r}, alpha {alpha}", "ranks",
            {"lora": {"r": r, "lora_alpha": alpha}}, shift)
        for r, alpha, shift in (
            (16, 32, 1), (1, 32, 1), (4, 32, 1), (64, 32, 1),
            # each grid has the rate that is best at alpha 32, and goes towards its own
            (1, 2, 10 / 3), (4, 8, 10 / 3), (64, 128, 1 / 3),
        )
    ]  # fmt: skip
    found.append(Way("full", "whole weights", "full", whole=True))
    found += [
        Way(name, words, "variants",
            {"lora": ALPHA | {k: v for k, v in own.items() if k != "train"},
             "train": own.get("train", {})}, shift)
        for name, words, own, shift in variants
    ]  # fmt: skip
    found += [
        Way("nf4", "NF4 base", "variants", {"lora": ALPHA}, quantize="nf4"),
        Way("nf4-loftq", "NF4 base, LoftQ", "variants",
            {"lora": ALPHA | {"init_lora_weights": "loftq"}}, quantize="nf4"),
    ]  # fmt: skip
    # 162,816 values a layer at r 16 on all seven linears of SmolLM2-135M; 161,280 and 164,736 here
    found += [
        Way("attention", "attention, r 42, alpha 32", "targets",
            {"lora": ALPHA | {"r": 42, "target_modules": ATTENTION}}),
        Way("mlp", "MLP, r 26, alpha 32", "targets", {"lora": ALPHA | {"r": 26, "target_modules": MLP}}),
    ]  # fmt: skip
    if task in size.large_rows:
        found += [
            Way(f"{name}-batch{rows}", f"{words}, {rows} rows a step", "batch",
                {"lora": {} if whole else ALPHA,
                 "train": {"per_device_train_batch_size": BATCHES[0],
                           "gradient_accumulation_steps": rows // BATCHES[0]}},
                # fewer steps want larger ones
                3 if rows > BATCHES[0] else 1, whole=whole)
            for name, words, whole in (("r16", "r 16", False), ("full", "whole weights", True))
            for rows in BATCHES
        ]  # fmt: skip
    return found


# --- rows


def write_rows(folder: Path, size: Size, seed: int = 0) -> None:
    """TASK.train.jsonl, TASK.batch.jsonl (of part d) and TASK.held.jsonl, unless they are there.
    Exits without the data."""
    if (folder / "done").exists():
        return
    source = Path(os.environ.get("LORRY_DATA", ROOT.parent / "shared" / "data"))
    if not (source / "gsm8k").is_dir():
        sys.exit(
            f"{source}/gsm8k is not there; set LORRY_DATA to a folder with gsm8k and common_gen"
        )
    concepts = shuffled(read_lines(source / "common_gen/commongen.dev.jsonl"), seed)
    problems = shuffled(read_lines(source / "gsm8k/train_2000.jsonl"), seed)
    pools = {
        "gsm8k": (problems, read_lines(source / "gsm8k/test.jsonl")),
        # it has no test split with references: the end of what was drawn
        "common_gen": (
            concepts[: -FULL.held["common_gen"]], concepts[-FULL.held["common_gen"] :]
        ),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for task, (train, held) in pools.items():
        for name, rows, count in (
            ("train", train, size.rows[task]),
            ("batch", train, size.large_rows.get(task, 0)),
            ("held", held, size.held[task]),
        ):
            if len(rows) < count:
                sys.exit(f"{task} has {len(rows)} {name} rows; {count} are needed")
            if count:
                lines = (json.dumps(row) + "\n" for row in set_rows(task, rows[:count]))
                (folder / f"{task}.{name}.jsonl").write_text("".join(lines))
    (folder / "done").touch()


# --- training: everything by the command line


class Study:
    """One task's trainings: where they lie, what is done, and what does the rest."""

    def __init__(self, args: argparse.Namespace, size: Size, task: str, deadline: float) -> None:
        self.work, self.size, self.task = args.work / task, size, task
        self.data, self.threads, self.deadline = args.work / "data", args.threads, deadline
        self.ways = list_ways(size, task)
        self.asked = set(args.ways or (way.name for way in self.ways))
        self.work.mkdir(parents=True, exist_ok=True)
        self.file = self.work / "points.json"
        self.points: list[dict[str, Any]] = (
            json.loads(self.file.read_text()) if self.file.exists() else []
        )

    def has(self, point: Point) -> bool:
        """Whether it has trained."""
        key = (point.way.name, point.rate, point.seed)
        return any((p["way"], p["rate"], p["seed"]) == key for p in self.points)

    def curve(self, way: Way, rates: Sequence[float] | None = None) -> dict[float, float]:
        """{rate: held-out loss} of what has trained under seed 0, at these rates or at all."""
        return {
            p["rate"]: p["loss"]
            for p in self.points
            if p["way"] == way.name and p["grid"] and (rates is None or p["rate"] in rates)
        }

    def run_part(self, part: str) -> None:
        """A part's curves, and the best of them under several seeds. Raises Unfinished."""
        self.run_curves(part)
        self.run_seeds(part)

    def run_curves(self, part: str) -> None:
        """The curves of a part, grown at their edges."""
        tried = {way.name: way.grid(self.size) for way in self.ways if way.part == part}
        if part == "ranks":
            tried[variants_table.PLAIN].append(DEFAULT_RATE)
        by_name = {way.name: way for way in self.ways}
        self.run(part, [Point(by_name[name], rate) for name in tried for rate in tried[name]])
        for number in range(1, self.size.extend + 1):
            # of what was tried before this round: the same command a second time finds the same
            curves = {name: self.curve(by_name[name], rates) for name, rates in tried.items()}
            beyond = {n: rate for n, curve in curves.items() if (rate := next_rate(curve))}
            self.run(f"{part}-beyond{number}", [Point(by_name[n], r) for n, r in beyond.items()])
            for name, rate in beyond.items():
                tried[name].append(rate)

    def run(self, label: str, points: Iterable[Point]) -> None:
        """Train them, jobs that can share a base in one pass."""
        groups = dict[str, list[Point]]()
        for point in points:
            whole = point.name if point.way.whole else ""
            groups.setdefault(whole or point.way.quantize or "jobs", []).append(point)
        for base, members in groups.items():
            for at in range(0, len(members), self.size.jobs):
                # the number is that of the whole list, so that a piece keeps its name
                piece = f"{label}-{base}-{at // self.size.jobs + 1}"
                asked = [p for p in members[at : at + self.size.jobs] if p.way.name in self.asked]
                if missing := [p for p in asked if not self.has(p)]:
                    self.train(piece, missing)

    def run_seeds(self, part: str) -> None:
        """Each variant, r 16, some layers and whole weights at the best rate of the curve, between those
        tried, under several seeds: a process each."""
        for way in self.ways:
            again = way.part in ("full", "variants", "targets") or way.name == variants_table.PLAIN
            if again and way.part == part and way.name in self.asked:
                # once a seed has trained, its rate is kept: what it adds to the curve would move it
                known = [p["rate"] for p in self.points if p["way"] == way.name and p["seed"]]
                rate = known[0] if known else variants_table.best_rate(self.curve(way))
                best = Point(way, float(f"{rate:.2g}"))
                points = [replace(best, seed=seed) for seed in range(1, self.size.seeds)] + [best]
                missing = [point for point in points if not self.has(point)]
                if way.whole:
                    for point in missing:
                        self.train(f"seeds-{way.name}-{point.seed}", [point])
                elif missing:
                    # the curve may have that of seed 0
                    first = min(missing, key=lambda point: point.seed)
                    self.train(f"seeds-{way.name}", [first], seeds=len(missing))

    def train(self, piece: str, points: Sequence[Point], seeds: int = 0) -> None:
        """One command of Lorry's, and its numbers added to points.json. ``seeds``: each point under
        so many, from its own."""
        run, (first, *_) = self.work / piece, points
        rows = "batch" if first.way.part == "batch" else "train"
        settings: dict[str, Any] = {
            "model": {
                "name": MODEL,
                "dtype": self.size.dtype,
                "quantize": first.way.quantize,
            },
            "backend": {"threads": self.threads},
            "data": {
                "path": str(self.data / f"{self.task}.{rows}.jsonl"),
                "eval": str(self.data / f"{self.task}.held.jsonl"),
            },
            "train": {
                "num_train_epochs": 1,
                "per_device_train_batch_size": self.size.batch[self.task],
                # of a few steps a share would be the first one, which would then move nothing
                "warmup_ratio": 0.0,
                "eval_strategy": "epoch",
                "save_steps": 8,
                "resume_from_checkpoint": "auto",
                "seed": first.seed,
            },
            "output_dir": str(run),
        }
        if first.way.whole:
            # of whole weights a checkpoint is gigabytes, and none is needed: a run is short
            own = {"learning_rate": first.rate, "save_strategy": "no", "eval_on_start": True}
            settings["train"] |= own | first.way.settings.get("train", {})
            settings["lora"] = None
        else:
            settings["jobs"] = [
                {
                    "name": point.name,
                    "lora": dict(point.way.settings.get("lora", {})),
                    "train": {
                        "learning_rate": point.rate,
                        **point.way.settings.get("train", {}),
                    },
                }
                for point in points
            ]
            settings |= {"jobs_per_pass": self.size.jobs, "seeds": seeds or 1}
        path = self.work / f"{piece}.yaml"  # JSON, which YAML can read
        path.write_text(json.dumps(settings, indent=1) + "\n")
        print(f"--- {self.task} {piece}: {len(points) * (seeds or 1)}", flush=True)
        spent, before = self.work / f"{piece}.seconds", children_seconds()
        try:
            verb = "sft" if first.way.whole else "sweep"
            call([verb, str(path)], self.work / f"{piece}.log", self.deadline)
        finally:
            earlier = float(spent.read_text()) if spent.exists() else 0.0
            spent.write_text(str(earlier + children_seconds() - before))
        grid = not piece.startswith("seeds-")
        self.add(run, points, seeds, grid=grid, seconds=float(spent.read_text()))
        # nothing is asked of the adapters again, and whole weights are half a gigabyte each
        shutil.rmtree(run)

    def add(
        self, run: Path, points: Sequence[Point], seeds: int, *, grid: bool, seconds: float
    ) -> None:
        """A finished run's numbers, into points.json. ``grid``: whether they belong to a curve."""
        lines = read_lines(run / "metrics.jsonl")
        memory = max(line.get("peak_memory_bytes", 0) for line in lines)
        if points[0].way.whole:
            losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
            found = {points[0].name: losses[-1]}
            base: dict[str, float] = {"base_loss": losses[0]}
        else:
            jobs = json.loads((run / "sweep.json").read_text())["jobs"]
            found = {job["name"]: job.get("eval_loss") for job in jobs}
            base = {}
        for point in points:
            for seed in range(point.seed, point.seed + max(seeds, 1)):
                name = f"{point.name}-seed{seed}" if seeds else point.name
                loss = found.get(name, found.get(f"seed{seed}"))
                self.points.append({
                    "way": point.way.name, "rate": point.rate, "seed": seed, "grid": grid,
                    # one that diverged is as bad as it gets, and JSON has no infinity
                    "loss": loss if loss is not None and math.isfinite(loss) else 99.0,
                    "tokens": sum(line.get("tokens", 0) for line in lines),
                    "jobs": max(len(points), 1) * (seeds or 1), "seconds": round(seconds, 1),
                    "memory_bytes": memory, **base,
                })  # fmt: skip
        # a file appears with all of it, or not at all
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(self.points, indent=0))
        os.replace(new, self.file)


def next_rate(curve: Mapping[float, float]) -> float | None:
    """The rate beyond the edge at which the best of a curve lies; None where it lies within, or only
    one was tried."""
    rates = sorted(curve)
    if len(rates) < 2:
        return None
    best = min(rates, key=lambda rate: curve[rate])
    if best == rates[-1]:
        return float(f"{best * best / rates[-2]:.2g}")
    if best == rates[0]:
        return float(f"{best * best / rates[1]:.2g}")
    return None


def dtype_here(dtype: str) -> str:
    """What a dtype, or `auto`, is on this machine."""
    from lorry.models.loading.load import pick_device, pick_dtype

    return str(pick_dtype(dtype, pick_device("auto"))).removeprefix("torch.")


def children_seconds() -> float:
    """Processor time of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def settings_of(args: argparse.Namespace, size: Size) -> dict[str, Any]:
    """What a reader needs to run it again; where it lay on this machine is nobody's business."""
    kept = {"small": not args.full, "threads": args.threads}
    return {**kept, "size": asdict(size), "model": MODEL, "default_rate": DEFAULT_RATE}


def record(args: argparse.Namespace, size: Size, studies: Sequence[Study]) -> None:
    """The JSON of what is finished by now."""
    values = {
        study.task: {
            "ways": [{"name": w.name, "words": w.words, "part": w.part} for w in study.ways],
            "points": study.points,
        }
        for study in studies
        if study.points
    }
    if not values:
        return
    name = variants_table.record_name(small=not args.full, dtype=size.dtype)
    path = ROOT / "benchmarks/results" / f"{name}.json"
    made = variants_table.make_record(values, settings_of(args, size))
    path.write_text(json.dumps(made, indent=1) + "\n")
    print(f"written to {path}")


def main() -> int:
    """Train what is missing until all is done or the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all of it: a day of two cores")
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--minutes", type=float, default=20.0, help="of one call of this script")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=TASKS)
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--ways", nargs="*", help="names of the record's ways; without it all")
    parser.add_argument("--record", action="store_true", help="the JSON of what is finished")
    parser.add_argument("--docs", action="store_true", help="write docs/choosing.md and its plot")
    args = parser.parse_args()
    size = FULL if args.full else SMALL
    # said in the record; "auto" would not say what it was
    size = replace(size, dtype=dtype_here(args.dtype))
    name = variants_table.record_name(small=not args.full, dtype=size.dtype)
    args.work = args.work or ROOT / "build" / f"study-{name}"
    if args.docs:
        variants_table.write_docs(ROOT)
        return 0
    write_rows(args.work / "data", size)
    deadline = time.monotonic() + 60 * args.minutes
    studies = [Study(args, size, task, deadline) for task in args.tasks]
    finished = True
    try:
        # part by part over all tasks: what stops early has seen the same of each
        for part in () if args.record else PARTS:
            for study in studies:
                study.run_part(part)
    except Unfinished:
        finished = False
        print("the time of this sitting is over; the same command goes on", flush=True)
    record(args, size, studies)
    return 0 if finished else 75  # EX_TEMPFAIL: try again


if __name__ == "__main__":
    sys.exit(main())
