"""One run on several processes, side by side: Lorry's layouts, accelerate + PEFT under DDP and FSDP2,
and one process with as many threads.

    make bench-layouts                                     # two processes, 2,048 tokens a step
    python benchmarks/layouts.py --engines lorry lorry-ddp --length 128 --steps 1 --no-keep

All train on the same rows from the same adapter, each layout in fresh processes, in turns; processes
divide the cores. Before anything else is said the first step's loss and whole gradient must be those
of PEFT in float32 (gates.py), and of a layout that shards the base each process must hold no more
than its part of it. Then: tokens per second of all processes together; the highest resident set of
the fullest process during the steps, less its imports; and bytes that a process sent in a step, as
the kernel counts them on its TCP connections (`wire.py`), beside what `lorry plan` expects. The
record goes to benchmarks/results/ (records.py), a table of it to docs/results.md (`make results`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from case import MODEL, Case, prepare_text
from layout_engines import LAYOUTS
from layout_turns import contest
from records import keep
from turns import elsewhere


def show(record: Mapping[str, Any]) -> None:
    """The table, for a person."""
    print(record["title"])
    print(" | ".join(record["columns"]))
    for row in record["rows"]:
        print(" | ".join(row))
    for engine, gate in record["gates"].items():
        print(
            f"  {engine}: first loss off by {gate['loss_gap']:.1e}, gradient's cosine "
            f"{gate.get('cosine', float('nan')):.6f} (control {gate['control_cosine']:.6f}), length "
            f"{gate.get('gradient_length', float('nan')):.4f}"
        )
    for engine, reason in record["refused"].items():
        print(f"  {engine} refused: {reason}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--length", type=int, default=1024, help="tokens per row, two rows a step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--no-keep", action="store_true", help="print only")
    args = parser.parse_args()
    case = Case(
        kind="layouts",
        model=args.model,
        length=args.length,
        rank=args.rank,
        alpha=2 * args.rank,
        rows_per_step=2,
        steps=args.steps,
    )
    with tempfile.TemporaryDirectory() as name:
        elsewhere(prepare_text, Path(name), case, case.all_steps * case.rows_per_step)
        record = contest(Path(name), case, args.engines, args.rounds)
    show(record)
    if not args.no_keep:
        print(f"kept in {keep(record, 'layouts')}")
    return int(bool(record["refused"]))


if __name__ == "__main__":
    sys.exit(main())
