"""K jobs in one pass against K runs in turn: time and memory of whole `lorry sft` runs, at small
and large micro-batches.

    .venv/bin/python benchmarks/jobs.py                 # or: --jobs 1,4 --lengths 128 --steps 4 --rounds 1
    make bench-jobs ISA=avx2                            # as on a processor without AVX-512

The jobs differ in data, rank, learning rate and seed; each trains one row of LENGTH tokens a step.
Every run is a fresh process, and runs of several jobs and of one take turns. Nothing is printed
unless, in float32, every job's losses are within 1e-5 of those of its run alone, and in the timed
runs, in what dtype=auto is on the processor, within 2%. Shown: wall and CPU time of the steps without the first two (median over
rounds), the wall time of whole runs, loading and writing included, and the peak resident set above
the imports, as a share of the sum and of the largest of the separate runs. JSON goes to
benchmarks/results/ (records.py).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import isa
from measure import QUIET, Others, machine, peak_rss, rss
from records import keep

from lorry.processor import has_bfloat16

MODEL = "smollm2-135m-instruct"
RANKS, RATES = (16, 8, 32, 16), (1e-4, 3e-4, 5e-5, 2e-4)
WARMUP = 2
EXACT, NEAR = 1e-5, 0.02  # of the loss, in float32 and in bfloat16
Row = dict[str, Any]


def job(folder: Path, number: int) -> dict[str, Any]:
    """A job of its own: data, rank, rate and seed."""
    k = number % len(RANKS)
    return {
        "name": f"job{number}",
        "data": {"path": str(folder / f"{number}.jsonl")},
        "r": RANKS[k],
        "learning_rate": RATES[k],
        "seed": number,
    }


class Clock:
    """A listener that keeps the CPU time of this process at the end of each step."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def step(self, record: Mapping[str, Any]) -> None:
        self.at.append(time.process_time())

    def start(self, done: int, total: int) -> None: ...
    def evaluation(self, record: Mapping[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...
    def finish(self) -> None: ...


def write_data(folder: Path, jobs: int, length: int, steps: int) -> None:
    """A file of long plain text for each job, which Lorry cuts into rows of the length that is
    asked for.
    """
    from lorry.demo.people import general_text

    passages = general_text()
    for number in range(jobs):
        turned = passages[number:] + passages[:number]
        text = "\n\n".join(turned)
        enough = text * (1 + (steps + 2) * length * 8 // len(text))
        (folder / f"{number}.jsonl").write_text(
            json.dumps({"text": enough[: (steps + 2) * length * 8]}) + "\n"
        )


def work(folder: Path, numbers: Sequence[int], length: int, steps: int, dtype: str) -> Row:
    """One run in this process: of several jobs, or of one."""
    import torch

    import lorry.train.session  # noqa: F401 - imports are not what is measured
    from lorry.config import RunConfig, build_settings
    from lorry.notes import ignore_note
    from lorry.train.session import train_run

    imports, began = rss(), time.perf_counter()
    out = folder / f"run-{os.getpid()}"
    settings: dict[str, Any] = {
        "model": MODEL,
        "dtype": dtype,
        "device": "cpu",
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "data": {
            "path": str(folder / "0.jsonl"),
            "max_length": length,
            "shuffle": False,
        },  # so the short last row is not reached
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "output_dir": str(out),
    }
    clock = Clock()
    train_run(
        build_settings(
            RunConfig,
            {**settings, "jobs": [job(folder, number) for number in numbers]},
            ignore_note,
        ),
        [],
        [clock],
    )
    seconds = time.perf_counter() - began
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = [f"job{number}" for number in numbers]
    losses = {
        n: [line["adapters"][n]["loss"] if len(names) > 1 else line["loss"] for line in lines]
        for n in names
    }
    return {
        "jobs": names,
        "total_seconds": seconds,
        "step_cpu": [b - a for a, b in pairwise(clock.at)],
        "step_seconds": [line["seconds"] for line in lines],
        "losses": losses,
        "tokens": [line["tokens"] for line in lines],
        "memory": peak_rss() - imports,
        "threads": torch.get_num_threads(),
    }


def fresh(folder: Path, numbers: Sequence[int], length: int, steps: int, dtype: str) -> Row:
    """`work` in a process of its own."""
    words = [str(folder), ",".join(map(str, numbers)), str(length), str(steps), dtype]
    done = subprocess.run(
        [sys.executable, __file__, "--worker", *words],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def turns(sizes: Sequence[int]) -> list[list[int]]:
    """Runs in the order they are made: each size of a joint run, then the separate runs that it is
    the first to need.
    """
    order, alone = list[list[int]](), 0
    for size in sizes:
        order += [list(range(size)), *([number] for number in range(alone, size))]
        alone = max(alone, size)
    return order


def gate(joint: Row, alone: dict[str, Row], within: float, relative: bool) -> float:
    """The largest difference of a job's loss from that of its run alone. Ends the benchmark where
    it is too large.
    """
    worst = 0.0
    for name in joint["jobs"]:
        pairs = list(zip(joint["losses"][name], alone[name]["losses"][name], strict=True))
        worst = max(worst, *(abs(a - b) / (abs(b) if relative else 1.0) for a, b in pairs))
    if not worst <= within:
        raise SystemExit(
            f"{len(joint['jobs'])} jobs together: a loss differs by {worst:.2e} from the run alone; no time shown"
        )
    return worst


def compare(folder: Path, length: int, args: argparse.Namespace) -> list[Row]:
    """A row per number of jobs at one length."""
    sizes, most = args.jobs, max(args.jobs)
    timed = "bfloat16" if has_bfloat16() else "float32"
    write_data(folder, most, length, args.steps + WARMUP)
    exact = {f"job{n}": fresh(folder, [n], length, 3, "float32") for n in range(min(2, most))}
    exact_gap = gate(
        fresh(folder, range(min(2, most)), length, 3, "float32"), exact, EXACT, relative=False
    )
    made = [
        [
            (numbers, fresh(folder, numbers, length, args.steps + WARMUP, timed))
            for numbers in turns(sizes)
        ]
        for _ in range(args.rounds)
    ]
    rows = []
    for size in sizes:
        ratios = list[Row]()
        for one_round in made:
            alone = {row["jobs"][0]: row for numbers, row in one_round if len(numbers) == 1}
            joint = next(row for numbers, row in one_round if len(numbers) == size)
            singles = [alone[name] for name in joint["jobs"]]
            gap = gate(joint, alone, NEAR, relative=True)
            ratios.append(figures(joint, singles) | {"gap": gap})
        rows.append(
            {
                "jobs": size,
                "length": length,
                "threads": made[0][0][1]["threads"],
                "float32_gap": exact_gap,
                **medians(ratios),
                "rounds": ratios,
            }
        )
    return rows


def figures(joint: Row, singles: Sequence[Row]) -> Row:
    """One round's numbers of K jobs together and of their runs in turn."""
    steps = [sum(row["step_seconds"][WARMUP:]) for row in singles]
    # the first step has no step before it
    cpu = [sum(row["step_cpu"][WARMUP - 1 :]) for row in (joint, *singles)]
    memory = [row["memory"] for row in singles]
    return {
        "joint_seconds": sum(joint["step_seconds"][WARMUP:]),
        "separate_seconds": sum(steps),
        "joint_cpu": cpu[0],
        "separate_cpu": sum(cpu[1:]),
        "joint_total": joint["total_seconds"],
        "separate_total": sum(row["total_seconds"] for row in singles),
        "joint_memory": joint["memory"],
        "separate_memory_max": max(memory),
        "separate_memory_sum": sum(memory),
        "tokens": sum(joint["tokens"][WARMUP:]),
    }


def medians(ratios: Sequence[Row]) -> Row:
    """The median over rounds of each number, and of each ratio within a round."""
    found = {name: statistics.median(r[name] for r in ratios) for name in ratios[0]}
    for name, other in (
        ("seconds", "separate_seconds"), ("cpu", "separate_cpu"), ("total", "separate_total"), ("memory", "separate_memory_sum"),
        ("memory_of_one", "separate_memory_max"),
    ):  # fmt: skip
        mine = "joint_memory" if "memory" in name else f"joint_{name}"
        found[f"ratio_{name}"] = statistics.median(r[mine] / r[other] for r in ratios)
    return found


def show(row: Row) -> str:
    """One line of the table."""
    took = f"{row['joint_seconds']:6.2f} s against {row['separate_seconds']:6.2f} s: {row['ratio_seconds']:.2f}x"
    also = f"CPU {row['ratio_cpu']:.2f}x, whole runs {row['ratio_total']:.2f}x"
    shares = f"{row['ratio_memory']:.2f}x the sum, {row['ratio_memory_of_one']:.2f}x the largest"
    memory = f"{row['joint_memory'] / 2**20:5.0f} MiB: {shares}"
    head = f"{row['length']:5d} tokens x {row['jobs']} jobs"
    return f"{head}   steps {took} ({also})   memory {memory}   losses within {row['gap']:.1e}"


def table(rows: Sequence[Row], where: Mapping[str, Any]) -> dict[str, Any]:
    """What `benchmarks/results.py` shows. ``where``: the record's machine, isa and what else was busy."""
    columns = [
        "jobs",
        "tokens each and step",
        "steps, seconds",
        "in turn",
        "ratio",
        "whole runs",
        "GiB",
        "of the sum",
        "of one",
    ]
    cells = [
        [
            r["jobs"],
            r["length"],
            f"{r['joint_seconds']:.2f}",
            f"{r['separate_seconds']:.2f}",
            f"{r['ratio_seconds']:.2f}x",
            f"{r['ratio_total']:.2f}x",
            f"{r['joint_memory'] / 2**30:.2f}",
            f"{r['ratio_memory']:.2f}x",
            f"{r['ratio_memory_of_one']:.2f}x",
        ]
        for r in rows
    ]
    held = where["isa"]["held"]
    title = "K jobs in one pass against K runs in turn"
    text = f"{where['isa']['name']} on {where['machine']['cpu']}, {where['threads']} threads."
    if not where["clean"]:
        text += f" **Not clean**: other programs had {where['others_cores']:.1f} cores meanwhile."
    return {
        "title": f"{title}, held to {where['isa']['name']}" if held else title,
        "text": text,
        "columns": columns,
        "rows": cells,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = lambda text: sorted(int(n) for n in text.split(","))  # noqa: E731
    parser.add_argument("--jobs", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--lengths", type=numbers, default=[128, 1024])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="as it comes: as many as torch takes")
    isa.add_argument(parser)
    parser.add_argument("--output", type=Path, help="as it comes: as records.py names it")
    parser.add_argument(
        "--worker",
        nargs=5,
        metavar=("FOLDER", "JOBS", "LENGTH", "STEPS", "DTYPE"),
        help=argparse.SUPPRESS,
    )
    args = parser.parse_args()
    if args.worker:
        folder, which, length, steps, dtype = args.worker
        print(json.dumps(work(Path(folder), numbers(which), int(length), int(steps), dtype)))
        return
    isa.hold_to(args.isa)
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    rows, others = list[Row](), Others()
    for length in args.lengths:
        with tempfile.TemporaryDirectory() as name:
            rows += compare(Path(name), length, args)
        for row in rows[-len(args.jobs) :]:
            print(show(row), flush=True)
    busy = others.cores()
    where = {
        "machine": machine(),
        "isa": isa.described(),
        "threads": rows[0]["threads"],
        "load": os.getloadavg(),
        "others_cores": busy,
        "clean": busy <= QUIET,
    }
    record = {**where, **table(rows, where), "records": rows}
    print(f"kept in {keep(record, 'jobs', path=args.output)}")


if __name__ == "__main__":
    main()
