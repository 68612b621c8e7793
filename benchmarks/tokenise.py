"""How long reading and tokenising takes before the first step on one core and on two, and how long the
second time.

    python benchmarks/tokenise.py --answers 1000 50000 --rows 1000000 --chats 10000 --megabytes 5

Makes the files in a temporary folder and reads each twice with the embedded model's tokenizer, in a
fresh process for each number of cores (the second time out of the cache of token sets, which lies in
that folder too, and keeps files of 1 MiB and more). Wall seconds hang on what else runs; processor seconds
do not, and give what a machine with nothing else to do would take: those of the thread that reads, whom
the tokenizer's threads let wait, and those of the others, shared by the cores. JSON goes to
benchmarks/results/ (records.py). The digests have to be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from case import MODEL
from measure import Others, machine
from records import keep

WORDS = [
    "the",
    "of",
    "and",
    "house",
    "river",
    "stone",
    "apple",
    "cloud",
    "seven",
    "quick",
    "lamp",
    "train",
    "bread",
]


def words(draw: random.Random, count: int) -> str:
    """Prose of this many words."""
    return " ".join(draw.choices(WORDS, k=count))


def two_words(path: Path, rows: int) -> None:
    """Rows of a word as question and a word as answer."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(rows):
            row = {"prompt": f"{draw.choice(WORDS)}{number}", "completion": draw.choice(WORDS)}
            file.write(json.dumps(row) + "\n")


def chats(path: Path, rows: int) -> None:
    """Chats of two exchanges, 180 words each."""
    draw = random.Random(1)
    with path.open("w") as file:
        for _ in range(rows):
            sizes = (("user", 40), ("assistant", 60), ("user", 20), ("assistant", 60))
            messages = [{"role": role, "content": words(draw, count)} for role, count in sizes]
            file.write(json.dumps({"messages": messages}) + "\n")


def far_prompt(path: Path, megabytes: int) -> None:
    """One row whose prompt is megabytes long."""
    prompt = words(random.Random(2), megabytes * 200_000)
    path.write_text(json.dumps({"prompt": prompt, "completion": "yes it is"}) + "\n")


def answers(path: Path, rows: int) -> None:
    """Questions of 20 words and answers of 40."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(rows):
            row = {"prompt": f"{words(draw, 20)} {number}", "completion": words(draw, 40)}
            file.write(json.dumps(row) + "\n")


def measured(path: Path, tokenizer: Any, cores: int) -> dict[str, Any]:
    """Wall and processor seconds of one reading."""
    from lorry.data.encoding.encode import ExampleEncoder
    from lorry.data.encoding.token_set import TokenSet
    from lorry.data.reading.sources import open_source

    cached: list[str] = []
    encoder = ExampleEncoder(tokenizer, max_length=1024, tell=cached.append)
    wall, processor, own = time.perf_counter(), time.process_time(), time.thread_time()
    tokens = TokenSet.build(open_source(path), encoder)
    own, processor = time.thread_time() - own, time.process_time() - processor
    alone = own + (processor - own) / cores
    return {
        "seconds": round(time.perf_counter() - wall, 2),
        "processor_seconds": round(processor, 3),
        "seconds_with_nothing_beside": round(alone, 3),
        "tokens_per_second": round(tokens.report.tokens / alone),
        "from_cache": any("from the cache" in line for line in cached),
        "rows": tokens.report.rows,
        "tokens": tokens.report.tokens,
        "sha256": tokens.digest,
    }


def work(path: Path, cores: int) -> None:
    """Read a file twice in this process, and print both."""
    from lorry.models.gguf.embedded import resolve_embedded_model
    from lorry.models.loading.tokenizer import load_tokenizer
    from lorry.notes import ignore_note

    # as a run has it, kept where it is known and transformers' own where not
    model = Path(resolve_embedded_model(MODEL, ignore_note))
    tokenizer = load_tokenizer(model, add_note=ignore_note)
    readings = [measured(path, tokenizer, cores) for _ in range(2)]
    print(json.dumps(dict(zip(("first", "second"), readings, strict=True))))


def read_in_fresh_process(path: Path, cores: int, home: Path) -> dict[str, Any]:
    """`work` on so many cores, with a cache of its own under ``home``."""
    others = Others()
    done = subprocess.run(
        [sys.executable, __file__, "--worker", str(path), str(cores)],
        env={
            **os.environ,
            "LORRY_HOME": str(home),
            "TOKENIZERS_PARALLELISM": "true" if cores > 1 else "false",
            "RAYON_NUM_THREADS": str(cores),
        },
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    # each keeps token sets of its own; the converted model stays
    for kept in (home / "tokens").glob("*"):
        kept.rename(home / f"{kept.name}-{cores}")
    return {**found, "others_cores": round(others.cores(), 2)}


def compared(path: Path, cores: Sequence[int], home: Path) -> dict[str, Any]:
    """A file read on every number of cores, and how many times as fast as on the first of them."""
    by_cores = {str(n): read_in_fresh_process(path, n, home) for n in cores}
    digests = {run[turn]["sha256"] for run in by_cores.values() for turn in ("first", "second")}
    assert len(digests) == 1, path
    seconds = [run["first"]["seconds_with_nothing_beside"] for run in by_cores.values()]
    return {"cores": by_cores, "times_as_fast": [round(seconds[0] / s, 2) for s in seconds]}


def table(files: Mapping[str, Any], cores: Sequence[int]) -> dict[str, Any]:
    """Tokens per second for docs/results.md: a line for each file."""
    rows, busy = list[list[str]](), 0.0
    for name, found in files.items():
        runs = [found["cores"][str(n)] for n in cores]
        busy = max([busy, *(run["others_cores"] for run in runs)])
        again = runs[-1]["second"]
        rows.append(
            [
                name,
                f"{runs[0]['first']['tokens']:,}",
                *(f"{run['first']['tokens_per_second']:,}" for run in runs),
                f"{found['times_as_fast'][-1]:.2f}",
                f"{again['tokens_per_second']:,}" if again["from_cache"] else "below 1 MiB",
            ]
        )
    named = [f"{n} core{'s' if n > 1 else ''}" for n in cores]
    return {
        "title": "Rows to tokens",
        "text": f"Tokens per second of reading and tokenising, {MODEL}'s tokenizer, by processor time as a machine "
        f"with nothing else to do would take it; other programs had {busy:.1f} cores meanwhile.",
        "columns": ["file", "tokens", *named, "times as fast", "out of the cache"],
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=int, nargs="*", default=[1000, 50_000], help="rows each")
    parser.add_argument("--rows", type=int, default=100_000, help="rows of two words")
    parser.add_argument("--chats", type=int, default=10_000)
    parser.add_argument("--megabytes", type=int, default=5, help="length of one prompt")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, help="where the record goes, if not to results/")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        work(Path(chosen.worker[0]), int(chosen.worker[1]))
        return
    kinds = (
        *((f"answers, {rows} rows", answers, rows) for rows in chosen.answers),
        ("two words", two_words, chosen.rows),
        ("chats", chats, chosen.chats),
        ("far prompt", far_prompt, chosen.megabytes),
    )
    made: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # the first process converts the model, and has transformers say what its tokenizer is
        first = folder / "first.jsonl"
        answers(first, 1)
        read_in_fresh_process(first, 1, folder / "home")
        for kind, write, size in kinds:
            if not size:
                continue
            path = folder / f"{kind}.jsonl"
            write(path, size)
            made[kind] = compared(path, chosen.cores, folder / "home")
    record = {"machine": machine(), "files": made, **table(made, chosen.cores)}
    print(json.dumps(record, indent=1))
    print(keep(record, "tokenise", path=chosen.out), file=sys.stderr)


if __name__ == "__main__":
    main()
