"""Fine-tuning on real questions and answers of uneven length: Lorry through its own data path
against TRL's SFTTrainer.

    python benchmarks/chat.py                    # 40 conversations, 8 a step, answers learnt only

Two pairs: eight conversations a step (TRL pads them, its default; Lorry lays them end to end), and
packing (as many conversations as fit into rows of 1024 tokens, about as many a step). Tokens that
are padding are not counted. Data: Dolly and Self-Instruct where the data folder has them
(LORRY_DATA), else the questions that come with Lorry.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

from case import MODEL, Case, data_folder, prepare_chat
from records import keep
from turns import contest, elsewhere, show

ENGINES = ("lorry", "trl", "lorry-packing", "trl-packing")
OTHERS = ("peft", "peft-bf16", "peft-bf16-malloc")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES + OTHERS, default=ENGINES)
    parser.add_argument(
        "--length", type=int, default=1024, help="longest conversation, and a packed row"
    )
    parser.add_argument(
        "--batch", type=int, default=8, help="conversations a step; TRL's default is 8"
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--no-keep", action="store_true", help="print only")
    args = parser.parse_args()
    case = Case(
        kind="chat",
        model=args.model,
        length=args.length,
        rank=args.rank,
        alpha=2 * args.rank,
        rows_per_step=args.batch,
        warmup=args.warmup,
        steps=args.steps,
        threads=args.threads,
    )
    with tempfile.TemporaryDirectory() as name:
        lengths = sorted(len(ids) for ids, _ in elsewhere(prepare_chat, Path(name), case))
        mean = sum(lengths) / len(lengths)
        case = dataclasses.replace(case, packed_rows=max(1, round(args.batch * mean / args.length)))
        case.save(Path(name))
        record = contest(Path(name), case, args.engines, args.rounds)
    record["data"] = {
        "source": "Dolly and Self-Instruct" if data_folder() else "Lorry's own questions",
        "rows": len(lengths),
        "mean": mean,
        "median": lengths[len(lengths) // 2],
        "longest": lengths[-1],
    }
    show(record)
    if not args.no_keep:
        print(f"  kept in {keep(record, 'chat', f'T{args.length}-r{args.rank}-t{args.threads}')}")
    return int(bool(record["refused"]))


if __name__ == "__main__":
    sys.exit(main())
