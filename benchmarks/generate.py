"""Generation speed and memory, side by side: Lorry and transformers' generate, without an adapter
and with one.

    python benchmarks/generate.py                            # every setting of transformers once, then the best of them in turns
    python benchmarks/generate.py --threads 2 --rounds 3
    python benchmarks/generate.py --few-rows                 # a row and a few against the memory's rate and llama.cpp (few_rows.py)

The same 64 chat prompts of 35 to 500 tokens, greedy, in bf16. Two tasks: ``fixed``, 64 new tokens
for every prompt; ``answers``, at most 96, ending where the model ends them, so that rows leave at
different times. transformers pads on the left and is given batches of 64, 32 and 16, in the order
given and sorted by length, and a static cache. Engines take turns in fresh processes. No speed is
shown unless both libraries give the same tokens in float32, with and without the adapter. Tokens
per second count new tokens only and all of the time, reading the prompts included; that part is
also shown alone. JSON: benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import few_rows
import measure
from generators import Engine, Tokens, prepare, work
from records import keep

SETTINGS = [
    Engine("transformers", batch=64),
    Engine("transformers", batch=32, by_length=True),
    Engine("transformers", batch=16, by_length=True),
    Engine("transformers", batch=16, by_length=True, static=True),
    Engine("transformers", batch=16),
]


def fresh(engine: Engine, folder: Path, threads: int, tasks: Sequence[str]) -> dict[str, Any]:
    """`work` in a process of its own."""
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
    }
    command = [
        sys.executable,
        __file__,
        "--worker",
        json.dumps(asdict(engine)),
        str(folder),
        ",".join(tasks),
    ]
    env = {**os.environ, **quiet, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    speeds = {task: round(t["new_tokens"] / t["cpu"], 1) for task, t in found["tasks"].items()}
    print(
        f"  {engine.says} ({engine.dtype}): {speeds if tasks != ['gate'] else 'gate'}",
        file=sys.stderr,
        flush=True,
    )
    return found


def gate(folder: Path, threads: int) -> dict[str, Tokens]:
    """Both libraries' float32 tokens must be the same, without and with the adapter. Returns them
    by adapter.
    """
    truths = {}
    for adapter in ("none", "one"):
        ours = fresh(Engine("lorry", adapter, dtype="float32"), folder, threads, ["gate"])
        theirs = fresh(
            Engine("transformers", adapter, 16, True, dtype="float32"), folder, threads, ["gate"]
        )
        a, b = (run["tasks"]["gate"]["made"] for run in (ours, theirs))
        if different := [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]:
            raise SystemExit(
                f"in float32, adapter {adapter}: {len(different)} of {len(a)} rows differ ({different}); no speed is shown"
            )
        truths[adapter] = b
    return truths


def contest(folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """The gate, every setting of transformers once, then its best beside Lorry in turns; everything
    that was measured.
    """
    truths = gate(folder, threads)
    tried = [fresh(engine, folder, threads, ["fixed"]) for engine in SETTINGS]
    best = max(
        tried, key=lambda run: run["tasks"]["fixed"]["new_tokens"] / run["tasks"]["fixed"]["cpu"]
    )["engine"]
    setting = {key: best[key] for key in ("batch", "by_length", "static")}
    engines = [
        Engine("lorry"),
        Engine("transformers", **setting),
        Engine("lorry", "one"),
        Engine("transformers", "one", **setting),
        Engine("transformers", "merged", **setting),
        Engine("lorry", "several"),
    ]
    runs = [
        {"round": turn, **fresh(engine, folder, threads, ["prefill", "fixed", "answers"])}
        for turn in range(rounds)
        for engine in engines
    ]
    return {"truths": truths, "settings": tried, "runs": runs}


def summary(found: dict[str, Any], rounds: int, threads: int) -> dict[str, Any]:
    """The record that is kept: medians, Lorry's lead round by round, how many rows agree."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for run in found["runs"]:
        by_name.setdefault(run["says"], []).append(run)
    ours = {
        run["engine"]["adapter"]: by_name[run["says"]]
        for run in found["runs"]
        if run["engine"]["library"] == "lorry"
    }
    rows = []
    for runs in [[run] for run in found["settings"]] + list(by_name.values()):
        adapter = runs[0]["engine"]["adapter"]
        row: dict[str, Any] = {
            "engine": runs[0]["says"],
            "memory": statistics.median(r["memory_bytes"] for r in runs),
        }
        for task in runs[0]["tasks"]:
            row[task] = statistics.median(rate(run, task) for run in runs)
            mine = ours["one" if adapter == "merged" else adapter]
            pairs = zip(mine, runs, strict=False)
            row[f"{task}_lead"] = statistics.median(rate(a, task) / rate(b, task) for a, b in pairs)
        truth = found["truths"].get("one" if adapter == "merged" else adapter)
        if truth is not None:
            made = runs[0]["tasks"]["fixed"]["made"][::2]
            row["rows_as_in_float32"] = sum(a == b for a, b in zip(made, truth, strict=True)) / len(
                truth
            )
        rows.append(row)
    for run in (*found["settings"], *found["runs"]):
        for task in run["tasks"].values():
            task["lengths"] = [len(row) for row in task.pop("made")]
    highest = max(run["load"] for run in (*found["settings"], *found["runs"]))
    return {
        "kind": "generate",
        "threads": threads,
        "rounds": rounds,
        "machine": measure.machine(),
        "highest_load": highest,
        "command": " ".join(["python", *sys.argv]),
        "clock": "CPU seconds of the process",
        **printable(rows),
        "medians": rows,
        "settings": found["settings"],
        "runs": found["runs"],
    }


def rate(run: dict[str, Any], task: str) -> float:
    """New tokens per CPU second, which other people's work on the machine disturbs least; the
    wall's are in the record.
    """
    return float(run["tasks"][task]["new_tokens"] / run["tasks"][task]["cpu"])


def printable(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The table for people."""
    columns = [
        "engine",
        "prompts/s",
        "fixed tok/s",
        "Lorry's lead",
        "answers tok/s",
        "its lead",
        "memory GiB",
        "rows as in fp32",
    ]
    cells = []
    for row in rows:
        keys = ("prefill", "fixed", "fixed_lead", "answers", "answers_lead")
        numbers = [*(row.get(key) for key in keys), row["memory"] / 2**30]
        shown = ["" if n is None else f"{n:.{0 if n >= 20 else 2}f}" for n in numbers]
        share = row.get("rows_as_in_float32")
        cells.append([row["engine"], *shown, "" if share is None else f"{share:.0%}"])
    return {"title": "Generation on the CPU", "columns": columns, "rows": cells}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--worker", nargs=3, metavar=("ENGINE", "FOLDER", "TASKS"), help=argparse.SUPPRESS
    )
    parser.add_argument("--few-rows", action="store_true", help="a row and a few (few_rows.py)")
    parser.add_argument("--weights", nargs="*", default=[], help="of --few-rows: these alone")
    args = parser.parse_args()
    case = "" if args.threads == 1 else f"t{args.threads}"
    if args.few_rows:
        with tempfile.TemporaryDirectory() as name:
            # after every round: one that is stopped leaves those before it
            for runs in few_rows.contest(Path(name), args.threads, args.rounds, args.weights):
                save(few_rows.record(runs, args.threads), "few-rows", case)
        return
    if args.worker:
        engine, folder, tasks = args.worker
        print(json.dumps(work(Engine(**json.loads(engine)), Path(folder), tasks.split(","))))
        return
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        record = summary(contest(Path(name), args.threads, args.rounds), args.rounds, args.threads)
    save(record, "generate", case)


def save(record: dict[str, Any], benchmark: str, case: str) -> None:
    """Print the table and keep the record."""
    for cells in [record["columns"], *record["rows"]]:
        print(f"{cells[0]:62s}" + "".join(f"{cell:>20s}" for cell in cells[1:]))
    keep(record, benchmark, case)


if __name__ == "__main__":
    main()
