"""LoRA fine-tuning speed and memory, side by side: Lorry, PEFT at several settings, transformers'
Trainer, TRL, and two anchors.

    make bench                                                       # 1024 tokens, rank 16, every engine, two rounds
    python benchmarks/sft.py --lengths 512 1024 2048 4096 --ranks 4 16 64 128 --engines lorry peft peft-bf16-malloc-compile
    python benchmarks/sft.py --curve                                 # 200 losses against three seeds of PEFT

All engines train on the same packed rows of equal length in the same order, from the same adapter,
with the same AdamW, clip and tokens per step; each in a fresh process, in turns. See gates.py for
what must hold before a speed is shown. One JSON per configuration goes to benchmarks/results/;
`make results` makes docs/results.md of them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from case import MODEL, Case, prepare_text
from curve import curve
from turns import ENGINES, contest, elsewhere, keep, show

DEFAULT = [name for name in ENGINES if name != "lorry-packing"]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """What can be chosen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths",
        "--length",
        type=int,
        nargs="+",
        default=[1024],
        help="tokens per row, one row a step",
    )
    parser.add_argument("--ranks", "--rank", type=int, nargs="+", default=[16])
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=DEFAULT,
        default=DEFAULT,
        metavar="ENGINE",
        help=", ".join(DEFAULT),
    )
    parser.add_argument("--steps", type=int, default=3, help="timed steps per process")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--curve", action="store_true", help="compare 200 losses instead of speed")
    parser.add_argument("--curve-length", type=int, default=128, help="tokens per row of that")
    parser.add_argument("--curve-steps", type=int, default=200)
    parser.add_argument("--no-keep", action="store_true", help="print only")
    args = parser.parse_args(argv)
    if args.warmup < 1:
        parser.error(
            "--warmup must be at least 1: the first step also writes gradients for the gates"
        )
    return args


def main() -> int:
    args = arguments()
    if args.curve:
        record = curve(args.model, args.curve_length, args.curve_steps, args.threads)
        if not args.no_keep:
            keep(record, f"curve-cpu-T{args.curve_length}-t{args.threads}")
        return int(not record["inside"])
    bad = False
    for length in args.lengths:
        for rank in args.ranks:
            case = Case(
                model=args.model,
                length=length,
                rank=rank,
                alpha=2 * rank,
                warmup=args.warmup,
                steps=args.steps,
                threads=args.threads,
            )
            with tempfile.TemporaryDirectory() as name:
                elsewhere(prepare_text, Path(name), case, case.all_steps)
                record = contest(Path(name), case, args.engines, args.rounds)
            show(record)
            bad |= bool(record["refused"])
            if not args.no_keep:
                print(f"  kept in {keep(record, f'sft-cpu-T{length}-r{rank}-t{args.threads}')}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
