"""How long reading and tokenising takes before the first step, and how long the second time.

    python benchmarks/tokenise.py --rows 1000000 --chats 10000 --megabytes 5

Makes the files in a temporary folder, reads each twice with the embedded model's tokenizer (the
second time out of the cache of token sets, which lies in that folder too) and prints one JSON
object: rows, tokens, wall and processor seconds, and the digests, which have to be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

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


def measured(path: Path, tokenizer: Any) -> dict[str, Any]:
    """Wall and processor seconds of one reading."""
    from lorry.data.encoding.encode import ExampleEncoder
    from lorry.data.encoding.token_set import TokenSet
    from lorry.data.reading.sources import open_source

    wall, processor = time.perf_counter(), time.process_time()
    tokens = TokenSet.build(open_source(path), ExampleEncoder(tokenizer, max_length=1024))
    return {
        "seconds": round(time.perf_counter() - wall, 2),
        "processor_seconds": round(time.process_time() - processor, 2),
        "rows": tokens.report.rows,
        "tokens": tokens.report.tokens,
        "sha256": tokens.digest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000, help="rows of two words")
    parser.add_argument("--chats", type=int, default=10_000)
    parser.add_argument("--megabytes", type=int, default=5, help="length of one prompt")
    chosen = parser.parse_args()

    from transformers import AutoTokenizer

    from lorry.models.gguf.embedded import resolve_embedded_model
    from lorry.notes import ignore_note

    tokenizer = AutoTokenizer.from_pretrained(
        resolve_embedded_model("smollm2-135m-instruct", ignore_note)
    )
    made: dict[str, Any] = {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LORRY_HOME"] = folder
        kinds = (
            ("two words", two_words, chosen.rows),
            ("chats", chats, chosen.chats),
            ("far prompt", far_prompt, chosen.megabytes),
        )
        for name, write, size in kinds:
            path = Path(folder, f"{name}.jsonl")
            write(path, size)
            made[name] = {"first": measured(path, tokenizer), "second": measured(path, tokenizer)}
            assert made[name]["first"]["sha256"] == made[name]["second"]["sha256"], name
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
