"""Engines take turns A B C A B C, each in a fresh process; then the gates; then what came out of
it, as one JSON record.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gates
import isa
import measure
import trainers
from case import Case, read_rows
from engines import Entry, fast_path, forward, full, lorry, peft

ENGINES = {
    "lorry": Entry(lorry, "Lorry", dtype="auto"),
    "lorry-float32": Entry(
        partial(lorry, dtype="float32"), "Lorry, base in float32", dtype="float32"
    ),
    "peft": Entry(peft, "PEFT, plain loop, as it comes (fp32 adapters)"),
    "peft-bf16": Entry(partial(peft, bf16_adapters=True), "PEFT, bf16 adapters"),
    "peft-bf16-malloc": Entry(
        partial(peft, bf16_adapters=True, malloc=True), "PEFT, bf16 adapters, tuned malloc"
    ),
    "peft-bf16-malloc-compile": Entry(
        partial(peft, bf16_adapters=True, malloc=True, compiled=True),
        "PEFT, bf16 adapters, tuned malloc, torch.compile",
    ),
    "peft-float32": Entry(
        partial(peft, float32=True), "PEFT, plain loop, base in float32", dtype="float32"
    ),
    "peft-float32-malloc-compile": Entry(
        partial(peft, float32=True, malloc=True, compiled=True),
        "PEFT, base in float32, tuned malloc, torch.compile",
        dtype="float32",
    ),
    "hf-trainer": Entry(trainers.hf_trainer, "transformers' Trainer with PEFT"),
    "trl": Entry(trainers.trl, "TRL SFTTrainer, as it comes"),
    "trl-packing": Entry(partial(trainers.trl, packing=True), "TRL SFTTrainer, packing"),
    "full": Entry(full, "full fine-tuning in bf16", "full", anchor=True),
    "forward": Entry(forward, "forward pass only, frozen", "forward", anchor=True),
    "lorry-packing": Entry(partial(lorry, packing=True), "Lorry, packing", dtype="auto"),
}
RESAMPLES = 2000  # of rounds and steps, for an interval


def elsewhere(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call in a process that ends afterwards, so that this one stays small beside the engines."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run, *args, **kwargs).result()


def work(engine: str, folder: Path) -> dict[str, Any]:
    """One engine in this process, from its imports on."""
    import torch

    from lorry.models.loading.load import pick_dtype

    case, rows = Case.load(folder), read_rows(folder)
    torch.set_num_threads(case.threads)
    if engine == gates.REFERENCE:
        return {
            "truths": gates.reference(folder, rows, json.loads((folder / "sets.json").read_text()))
        }
    began = time.perf_counter()
    entry = ENGINES[engine]
    run = entry.make()
    watch = measure.Watch(folder, engine, {tuple(ids): n for n, (ids, _) in enumerate(rows)})
    imports, imported = measure.rss(), time.perf_counter()
    run(folder, case, rows, watch)
    peak = measure.peak_rss()
    if len(watch.wall) != case.all_steps:
        raise SystemExit(f"{engine} made {len(watch.wall)} steps and not {case.all_steps}")
    timed = slice(case.warmup, None)
    dtype = str(pick_dtype(entry.dtype, torch.device("cpu"))).removeprefix("torch.")
    shape = measure.Shape.of(folder / "base")
    return {
        "engine": engine,
        "losses": watch.losses,
        "first_rows": watch.first_rows,
        "wall": watch.wall[timed],
        "cpu": watch.cpu[timed],
        "tokens": watch.tokens[timed],
        "supervised": watch.supervised[timed],
        "import_seconds": imported - began,
        "warmup_seconds": sum(watch.wall[: case.warmup]),
        "imports_bytes": imports,
        "loaded_bytes": watch.loaded_bytes - imports,
        "memory_bytes": peak - imports,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "matrix_rate": measure.matrix_rate(shape, case.length, dtype),
    }


def in_fresh_process(
    engine: str, folder: Path, case: Case, script: str = __file__
) -> dict[str, Any]:
    """A script's `work` in a process of its own. Where it fails, what it said last, under
    ``failed``.
    """
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
    }
    cache = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
    }
    env = {**os.environ, **quiet, **cache, "OMP_NUM_THREADS": str(case.threads)}
    before, others = os.getloadavg()[0], measure.Others()
    done = subprocess.run(
        [sys.executable, script, engine, str(folder)], capture_output=True, text=True, env=env
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {
            "engine": engine,
            "failed": f"exit {done.returncode}: {said[-1] if said else 'killed, for memory perhaps'}",
        }
    return {
        **json.loads(done.stdout.splitlines()[-1]),
        "load": [before, os.getloadavg()[0]],
        "others_cores": others.cores(),
    }


def contest(folder: Path, case: Case, engines: Sequence[str], rounds: int) -> dict[str, Any]:
    """Everything but the printing. The record says what it was held to (isa.py), whether it is
    ``clean``, and which engines are ``refused`` and why.
    """
    kernels, held = fast_path(), isa.described()
    runs: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for turn in range(rounds):
        for engine in (e for e in engines if e not in failed):
            run = in_fresh_process(engine, folder, case)
            if "failed" in run:
                failed[engine] = run["failed"]
                continue
            runs.append({"round": turn, **run})
            print(f"  round {turn + 1} of {rounds}, {engine} done", file=sys.stderr, flush=True)
    firsts = {run["engine"]: run for run in runs if run["round"] == 0}
    (folder / "sets.json").write_text(json.dumps(gates.first_sets(list(firsts.values()))))
    truth = in_fresh_process(gates.REFERENCE, folder, case)
    if "failed" in truth:
        raise SystemExit(
            f"the float32 reference failed, so nothing can be checked: {truth['failed']}"
        )
    verdicts = gates.judge_all(
        folder, firsts, truth["truths"], {e for e in engines if ENGINES[e].anchor}
    )
    refused = failed | {e: v["refused"] for e, v in verdicts.items() if v["refused"]}
    highest = max((load for run in runs for load in run["load"]), default=0.0)
    others = max((run["others_cores"] for run in runs), default=0.0)
    shape = measure.Shape.of(folder / "base")
    return {
        "kind": case.kind,
        "case": vars(case),
        "rounds": rounds,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": measure.machine(),
        "isa": held,
        "kernels": kernels,
        "highest_load": highest,
        "others_cores": others,
        "clean": highest <= (os.cpu_count() or 1) and others <= measure.QUIET,
        "says": {e: ENGINES[e].says for e in engines},
        "anchors": [e for e in engines if ENGINES[e].anchor],
        "gates": verdicts,
        "refused": refused,
        "table": table([run for run in runs if run["engine"] not in refused], case, shape),
        "runs": runs,
    }


def table(
    runs: Sequence[Mapping[str, Any]], case: Case, shape: measure.Shape
) -> dict[str, dict[str, Any]]:
    """Per engine: speed, spread, memory, share of the machine's matrix rate, and how much faster
    and leaner Lorry is.

    Text: the median step counts. Chat: all timed steps together, since what padding costs differs
    from step to step.
    """
    rows: dict[str, dict[str, Any]] = {}
    for engine in dict.fromkeys(run["engine"] for run in runs):
        mine = [run for run in runs if run["engine"] == engine]
        speeds = [t / s for run in mine for t, s in zip(run["tokens"], run["wall"], strict=True)]
        low, middle, high = statistics.quantiles(speeds, n=4) if len(speeds) > 1 else speeds * 3
        per_run = [speed(run, "wall", case.kind) for run in mine]
        rows[engine] = {
            "tokens_per_second": middle if case.kind == "sft" else statistics.median(per_run),
            "quartiles": [low, high],
            "tokens_per_cpu_second": statistics.median(
                speed(run, "cpu", case.kind) for run in mine
            ),
            "supervised_per_second": statistics.median(
                sum(r["supervised"]) / sum(r["wall"]) for r in mine
            ),
            "memory_bytes": statistics.median(run["memory_bytes"] for run in mine),
            "warmup_seconds": [run["warmup_seconds"] for run in mine],
            "steps": len(speeds),
        }
        if case.kind == "sft":
            flops = shape.flops(ENGINES[engine].work, case.length, case.rank)
            shares = [flops * s / run["matrix_rate"] for run, s in zip(mine, per_run, strict=True)]
            rows[engine] |= {
                "share_of_matrix_rate": statistics.median(shares),
                "flops_per_token": flops,
            }
    for engine, row in rows.items():
        row["lorry"] = ratios(runs, ours(engine, rows), engine, case.kind)
    return rows


def ours(engine: str, rows: Mapping[str, Any]) -> str:
    """Which of Lorry's engines another is compared with: the one that packs, if it does."""
    return "lorry-packing" if engine.endswith("packing") and "lorry-packing" in rows else "lorry"


def speed(run: Mapping[str, Any], clock: str, kind: str) -> float:
    """Tokens per second of one process."""
    if kind == "sft":
        return float(
            statistics.median(t / s for t, s in zip(run["tokens"], run[clock], strict=True))
        )
    return float(sum(run["tokens"]) / sum(run[clock]))


def ratios(
    runs: Sequence[Mapping[str, Any]], our: str, engine: str, kind: str
) -> dict[str, float] | None:
    """Lorry's speed over the engine's and its memory over the engine's, round by round, then the
    median round; for the speed also a 95% interval.
    """
    pairs = [
        (mine, theirs)
        for mine in runs for theirs in runs
        if mine["engine"] == our and theirs["engine"] == engine and mine["round"] == theirs["round"]
    ]  # fmt: skip
    if not pairs:
        return None
    return {
        "speed": statistics.median(
            speed(a, "wall", kind) / speed(b, "wall", kind) for a, b in pairs
        ),
        "cpu_speed": statistics.median(
            speed(a, "cpu", kind) / speed(b, "cpu", kind) for a, b in pairs
        ),
        "memory": statistics.median(a["memory_bytes"] / b["memory_bytes"] for a, b in pairs),
        "interval": interval(pairs, kind),
    }


Pair = tuple[Mapping[str, Any], Mapping[str, Any]]


def interval(pairs: Sequence[Pair], kind: str) -> tuple[float, float]:
    """2.5% and 97.5% of the ratio of speeds when rounds, and within each the steps of either engine,
    are drawn anew with replacement (a bootstrap of both levels; the same numbers every time).
    """
    draw = random.Random(0)

    def again(run: Mapping[str, Any]) -> dict[str, Any]:
        chosen = draw.choices(range(len(run["wall"])), k=len(run["wall"]))
        return {name: [run[name][at] for at in chosen] for name in ("tokens", "wall")}

    found = sorted(
        statistics.median(
            speed(again(a), "wall", kind) / speed(again(b), "wall", kind)
            for a, b in draw.choices(pairs, k=len(pairs))
        )
        for _ in range(RESAMPLES)
    )
    return found[round(0.025 * (RESAMPLES - 1))], found[round(0.975 * (RESAMPLES - 1))]


def show(record: Mapping[str, Any]) -> None:
    """The table, for a person; a refused engine has a reason in place of a speed."""
    case = record["case"]
    print(
        f"{case['kind']}: {case['model']}, {case['length']} tokens, rank {case['rank']}, "
        f"{case['threads']} threads, {record['isa']['name']} on {record['machine']['cpu']}"
    )
    for engine, row in record["table"].items():
        share = f"{row['share_of_matrix_rate']:4.0%}" if "share_of_matrix_rate" in row else "    "
        against = row["lorry"]
        versus = (
            "lorry {:5.2f}x as fast ({:.2f} to {:.2f}), {:4.2f}x the memory".format(
                against["speed"], *against["interval"], against["memory"]
            )
            if against
            else ""
        )
        low, high = row["quartiles"]
        print(
            f"  {engine:26s} {row['tokens_per_second']:7.1f} tok/s ({low:.0f} to {high:.0f})  {share}  "
            f"{row['memory_bytes'] / 2**30:5.2f} GiB  {versus}"
        )
    for engine, gate in gates.let_through(record["gates"]).items():
        print(
            f"  {engine:26s} cosine {gate['cosine']:.5f}, not above {gates.COSINE}: "
            f"let through by the control's {gate['control_cosine']:.5f}"
        )
    for engine, reason in record["refused"].items():
        print(f"  {engine:26s} refused: {reason}")
    if not record["clean"]:
        print(
            f"  NOT CLEAN: the load went up to {record['highest_load']:.1f} on {record['machine']['cores']} cores, "
            f"{record['others_cores']:.1f} of which other programs had; measure again"
        )


if __name__ == "__main__":
    print(json.dumps(work(sys.argv[1], Path(sys.argv[2]))))
