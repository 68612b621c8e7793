"""LoRA fine-tuning speed and memory, side by side: Lorry, PEFT at several settings, transformers'
Trainer, TRL, and two anchors.

    make bench                                                       # 1024 tokens, rank 16, every engine, two rounds
    python benchmarks/sft.py --lengths 512 1024 2048 4096 --ranks 4 16 64 128 --engines lorry peft peft-bf16-malloc-compile
    make bench ISA=avx2                                              # as on a processor without AVX-512
    python benchmarks/sft.py --few --isa avx2 --lengths 64 512 --threads 1 2
    python benchmarks/sft.py --curve                                 # 200 losses against three seeds of PEFT

All engines train on the same packed rows of equal length in the same order, from the same adapter,
with the same AdamW, clip and tokens per step; each in a fresh process, in turns. See gates.py for
what must hold before a speed is shown. One JSON per configuration goes to benchmarks/results/
(records.py); `make results` makes docs/results.md of them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import product
from pathlib import Path

import isa
from case import MODEL, Case, prepare_text
from curve import curve
from records import keep
from turns import ENGINES, contest, elsewhere, show

from lorry.processor import has_bfloat16

ALL = [name for name in ENGINES if name != "lorry-packing"]
# Lorry, and PEFT as it comes and at its best: by whether the processor multiplies bfloat16. There the
# best is with torch.compile or without it, by processor and length. With AVX2
# torch's products in it have a fifth of the speed of float32 forward and a thirtieth backward, so
# that peers with such a base run only where --engines asks for them.
FEW = {
    True: ["lorry", "peft", "peft-bf16-malloc", "peft-bf16-malloc-compile"],
    False: ["lorry", "peft-float32", "peft-float32-malloc-compile"],
}
DEFAULT = {True: [name for name in ALL if "float32" not in name], False: FEW[False]}
LEAST_TOKENS = 3072  # timed in one process, unless --steps says otherwise


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
        choices=ALL,
        metavar="ENGINE",
        help=", ".join(ALL),
    )
    parser.add_argument(
        "--few", action="store_true", help="Lorry, PEFT as it comes, and PEFT at its best alone"
    )
    parser.add_argument(
        "--steps", type=int, help=f"timed steps per process (at least 3, and {LEAST_TOKENS} tokens)"
    )
    parser.add_argument("--warmup", type=int, default=1, help="steps before those")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    isa.add_argument(parser)
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
    isa.hold_to(args.isa)
    engines = args.engines or (FEW if args.few else DEFAULT)[has_bfloat16()]
    if args.curve:
        threads = args.threads[0]
        record = curve(args.model, args.curve_length, args.curve_steps, threads)
        if not args.no_keep:
            keep(record, "curve", f"T{args.curve_length}-t{threads}")
        return int(not record["inside"])
    bad = False
    for length, rank, threads in product(args.lengths, args.ranks, args.threads):
        case = Case(
            model=args.model,
            length=length,
            rank=rank,
            alpha=2 * rank,
            warmup=args.warmup,
            steps=args.steps or max(3, -(-LEAST_TOKENS // length)),
            threads=threads,
        )
        with tempfile.TemporaryDirectory() as name:
            elsewhere(prepare_text, Path(name), case, case.all_steps)
            record = contest(Path(name), case, engines, args.rounds)
        show(record)
        bad |= bool(record["refused"])
        if not args.no_keep:
            print(f"  kept in {keep(record, 'sft', f'T{length}-r{rank}-t{threads}')}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
