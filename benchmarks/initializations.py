"""What it costs to begin an adapter from the base or from rows (`init_lora_weights`): processor time before the
first step, of SmolLM2-135M-Instruct, on one thread.

    python benchmarks/initializations.py                       # a few minutes; make bench-initializations
    python benchmarks/initializations.py --only pissa olora --no-keep

Each way is a run of its own, `lorry sft init_lora_weights=NAME max_steps=1`, which says itself how long its
adapter took to begin, rows and all: CPU time, so that what else runs on the machine takes turns and does not
count. One JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import measure
import records

MODEL = "smollm2-135m-instruct"
ROWS = 64
WORDS = (
    "river",
    "town",
    "market",
    "winter",
    "engine",
    "bridge",
    "teacher",
    "island",
    "copper",
    "garden",
)
# seconds at most: a whole SVD of every matrix, and the randomised one
SVD, RANDOMISED = 60.0, 10.0
WAYS: dict[str, tuple[float, tuple[str, ...]]] = {
    "pissa": (SVD, ()),
    "pissa_niter_16": (RANDOMISED, ()),
    "olora": (SVD, ()),
    "milora": (SVD, ()),
    "mica": (SVD, ()),
    "corda": (SVD, ()),
    "eva": (SVD, ()),
    "lora_ga": (SVD, ()),
    "loftq": (SVD, ("model.quantize=nf4",)),
}
ROUNDING = 2e-2  # of the first loss, in bfloat16
SAID = re.compile(r"; ([\d.]+) s of processor time")


def write_rows(file: Path) -> None:
    """Rows of some 115 tokens, the same every time."""
    draw = random.Random(0)
    with file.open("w") as out:
        for _ in range(ROWS):
            prompt, completion = (" ".join(draw.choices(WORDS, k=40)) for _ in range(2))
            out.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def begin(way: str, folder: Path) -> dict[str, Any]:
    """One run: the seconds that its adapter took to begin, and its first loss, the base's."""
    output = folder / way
    settings = [
        f"model={MODEL}", f"data={folder / 'rows.jsonl'}", f"output_dir={output}", "max_steps=1",
        "per_device_train_batch_size=1", f"init_rows={ROWS}", f"init_lora_weights={way}", *WAYS[way][1],
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "lorry", "sft", *settings],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = SAID.search(" ".join(done.stdout.split()))
    if said is None:
        raise SystemExit(f"{way}: the run does not say how long its adapter took to begin")
    lines = (output / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    return {"seconds": float(said[1]), "first_loss": losses[0]}


def contest(folder: Path, ways: Sequence[str], rounds: int) -> dict[str, Any]:
    """The ways in turns, and the record."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    loads = list[float]()
    write_rows(folder / "rows.jsonl")
    for number in range(rounds):
        for way in ways:
            print(f"  round {number + 1}: {way}", file=sys.stderr, flush=True)
            loads.append(os.getloadavg()[0])
            once = folder / str(number)
            once.mkdir(exist_ok=True)
            (once / "rows.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
            runs[way].append(begin(way, once))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/initializations.py", *sys.argv[1:]]),
        "machine": measure.machine(),
        "highest_load": max(loads),
        "rounds": rounds,
        "runs": runs,
        **table(runs, max(loads)),
    }


def begun_elsewhere(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """The first losses of those over the whole base that are not the same as of the others: nothing is shown by how
    fast an adapter began that is not the base's."""
    firsts = {w: mine[0]["first_loss"] for w, mine in runs.items() if not WAYS[w][1]}
    usual = statistics.median_low(list(firsts.values())) if firsts else 0.0
    return {way: loss for way, loss in firsts.items() if not abs(loss / usual - 1) < ROUNDING}


def table(runs: Mapping[str, Sequence[Mapping[str, Any]]], load: float) -> dict[str, Any]:
    """What is told of runs: the least seconds of each, and whether its target is met."""
    least = {way: min(run["seconds"] for run in mine) for way, mine in runs.items()}
    elsewhere = begun_elsewhere(runs)
    over = [way for way, seconds in least.items() if seconds > WAYS[way][0]]
    return {
        "title": f"How an adapter begins, {MODEL}",
        "text": (
            f"Rank 16 on every linear, {ROWS} rows of some 115 tokens, one thread; CPU time until the adapter has "
            "its first values, as each run says it (`benchmarks/initializations.py`); the load of the machine went "
            f"up to {load:.1f}. "
            + (f"Over its target: {', '.join(over)}." if over else "All are within their targets.")
            + "".join(
                f" {way} begins with a loss of {x:.4g}, which is not the base's."
                for way, x in elsewhere.items()
            )
        ),
        "columns": ["init_lora_weights", "CPU s", "target, s at most", "met"],
        "rows": [
            [way, f"{seconds:.1f}", f"{WAYS[way][0]:.0f}", "no" if way in over else "yes"]
            for way, seconds in least.items()
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--no-keep", action="store_true", help="print only")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        record = contest(Path(name), args.only, args.rounds)
    print(f"{record['title']}: {record['text']}")
    for line in (record["columns"], *record["rows"]):
        print("  " + "  ".join(f"{cell:>18s}" for cell in line))
    if not args.no_keep:
        print(f"  kept in {records.keep(record, 'initializations')}")
    return int(bool(begun_elsewhere(record["runs"])))


if __name__ == "__main__":
    sys.exit(main())
