"""Ranking options: Lorry against the lm-evaluation-harness' own transformers model, on the same
weights, rows and prompts.

    python benchmarks/options.py --rows 40       # needs the extra: pip install -e '.[lm-eval]'

Both are asked the same (context, continuation) pairs of bool_q; the log-likelihoods have to agree
before a time is printed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import time
from pathlib import Path
from typing import Any

from measure import machine
from records import keep

ROOT = Path(__file__).resolve().parents[1]
AGREE = 2e-3  # nats, in float32


def pairs(rows: int) -> list[tuple[str, str]]:
    """The first rows of bool_q as running text, each with both options."""
    from lorry.data.catalog import prompt_with_cue, shipped_catalog
    from lorry.data.reading.places import DataLocations, read_items

    data = (
        Path(os.environ.get("LORRY_DATA", ROOT.parent / "shared" / "data"))
        / "boolq"
        / "boolq_dev.jsonl"
    )
    places = DataLocations({"bool_q": str(data)} if data.exists() else {})
    one = shipped_catalog().find_set("bool_q")
    asked = list(read_items(one, places.open(one, "validation", limit=rows)))
    return [(prompt_with_cue(a.item), f" {option}") for a in asked for option in a.item.options]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--batch",
        type=int,
        nargs="*",
        default=[1, 8, 16],
        help="the harness' batch sizes; the best counts",
    )
    parser.add_argument("--out", type=Path, help="as it comes: as records.py names it")
    args = parser.parse_args()
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    import lorry
    from lorry.evaluate.benchmarks.likelihood import loglikelihoods
    from lorry.models.gguf.embedded import resolve_embedded_model
    from lorry.notes import ignore_note

    torch.set_num_threads(1)
    asked, directory = (
        pairs(args.rows),
        resolve_embedded_model("smollm2-135m-instruct", ignore_note),
    )
    model, tokenizer = lorry.load(str(directory), dtype="float32")
    theirs = HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=1)
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(asked)]
    seconds: dict[str, list[float]] = {}
    ours: list[Any] = []
    for _ in range(args.rounds):
        began = time.perf_counter()
        ours = loglikelihoods(model, tokenizer, asked)
        seconds.setdefault("lorry", []).append(time.perf_counter() - began)
        for batch in args.batch:
            theirs.batch_size_per_gpu = batch
            began = time.perf_counter()
            found = theirs.loglikelihood(requests, disable_tqdm=True)
            seconds.setdefault(f"harness, batch {batch}", []).append(time.perf_counter() - began)
            worst = max(abs(mine[0] - other[0]) for mine, other in zip(ours, found, strict=True))
            if worst > AGREE:
                raise SystemExit(f"the two disagree by {worst:.2e} nats: no time is shown")
    best = {name: min(times) for name, times in seconds.items()}
    rows = [
        [name, f"{value:.1f}", f"{value / best['lorry']:.2f}x" if name != "lorry" else ""]
        for name, value in best.items()
    ]
    made = {
        "title": f"Ranking options: {args.rows} rows of bool_q, two options each, float32, one thread",
        "text": f"SmolLM2-135M-Instruct, the best of {args.rounds} rounds; log-likelihoods agree within {AGREE} nats.",
        "columns": ["engine", "seconds", "Lorry is faster"],
        "rows": rows,
        "seconds": seconds,
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    keep(made, "options", path=args.out)
    for row in rows:
        print(" | ".join(row))


if __name__ == "__main__":
    main()
