"""The rows of benchmarks/experts_study.py: what experts train on, what nothing has seen, and what
is unlike either.

write_rows(folder, size, seed=0)    # folder/truthfulqa.train.jsonl, .held.jsonl, .choose.jsonl, ...

Prompts of named sets are those of the catalogue. Rows come from LORRY_DATA or ../shared/data.
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = "smollm2-135m-instruct"
DOMAINS = ("truthfulqa", "gsm8k", "common_gen", "longqa")
# two experts of one domain, whose rows are drawn at random
SPLIT_DOMAIN, HALVES = "common_gen", ("half_a", "half_b")
UNSEEN = ("svamp", "boolq")
# conversations whose first answer is of one domain and the second of another
TURNS, TURN_DOMAINS = "two_domains", ("gsm8k", "common_gen")
# of each domain; `lorry merge scale=auto` chooses on every other row of a file
CHOOSE_ROWS = 4
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much of everything. ``train``: rows by domain; ``held``: rows that are asked, of longqa
    ``held_long``; ``context``: tokens that are kept of a long text; ``batch``, ``epochs``: of the
    experts; ``router_steps``, ``router_rows`` of each domain in a step; ``more_steps``: of a token
    router that trains longer, 0: none; ``seeds`` of the token router; ``answers``: rows of each
    domain that are answered.
    """

    train: Mapping[str, int]
    held: int
    held_long: int
    context: int
    epochs: int
    batch: int
    router_steps: int
    router_rows: int
    more_steps: int
    seeds: int
    answers: int


FULL = Size(
    {"truthfulqa": 600, "gsm8k": 800, "common_gen": 800, "longqa": 73 - CHOOSE_ROWS},
    held=60, held_long=20, context=1024, epochs=1, batch=8, router_steps=200, router_rows=2,
    more_steps=0, seeds=3, answers=60,
)  # fmt: skip
SMALL = Size(
    {"truthfulqa": 120, "gsm8k": 96, "common_gen": 120, "longqa": 32},
    held=16, held_long=12, context=224, epochs=1, batch=4, router_steps=16, router_rows=1,
    more_steps=64, seeds=2, answers=8,
)  # fmt: skip


def conversation(prompt: str, answer: str, references: Sequence[str] = ()) -> Row:
    """A row; ``answers``: every right one, for metrics."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "answers": list(references) or [answer]}


def cut_passages(context: str, answers: Sequence[str], fits: Callable[[str], bool]) -> str:
    """Passages of xquad_multidoc in their order: those with an answer, and as many more as fit."""
    passages = re.split(r"(?=Passage \d+:\n)", context)
    kept = {n for n, text in enumerate(passages) if any(answer in text for answer in answers)}
    for n in range(len(passages)):
        if n not in kept and fits("".join(passages[m] for m in sorted({*kept, n}))):
            kept.add(n)
    return "".join(passages[n] for n in sorted(kept)).strip()


def read_lines(path: Path) -> list[Row]:
    """Rows of lines of JSON, or of a JSON array."""
    text = path.read_text()
    if text.lstrip().startswith("["):
        return list(json.loads(text))
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """In an order drawn by the seed."""
    return random.Random(seed).sample(list(rows), len(rows))


def set_rows(name: str, rows: Sequence[Row]) -> list[Row]:
    """Rows of a named set as conversations."""
    from lorry.data.catalog import shipped_catalog

    items = [shipped_catalog().find_set(name).item(row) for row in rows]
    return [conversation(item.prompt, item.answer, item.references) for item in items]


def long_rows(folder: Path, tokens: int) -> list[Row]:
    """Questions about long texts, of which so many ``tokens`` are kept: of an article its
    beginning, of passages the one that is asked about and what else fits."""
    from lorry.api import load

    tokenizer = load(MODEL)[1]

    def beginning(text: str) -> str:
        kept = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
        return str(tokenizer.decode(kept))

    def fits(text: str) -> bool:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= tokens

    rows = []
    for row in read_lines(folder / "xquad_multidoc.jsonl"):
        # an only passage may still be too long
        text = beginning(cut_passages(row["context"], row["answers"], fits))
        rows.append((text, row, "Answer in a few words."))
    for row in read_lines(folder / "boolq_long.jsonl"):
        rows.append((beginning(row["context"]), row, "Answer yes or no."))
    return [
        conversation(
            f"{text}\n\nQuestion: {row['input']}\n{how}", row["answers"][0], row["answers"]
        )
        for text, row, how in rows
    ]


def two_turns(first: Row, second: Row) -> Row:
    """One conversation of two."""
    return {"messages": [*first["messages"], *second["messages"]], "answers": second["answers"]}


def write_rows(folder: Path, size: Size, seed: int = 0) -> None:
    """Every file of the study, unless they are there. Exits without the data."""
    if (folder / "done").exists():
        return
    source = Path(os.environ.get("LORRY_DATA", ROOT.parent / "shared" / "data"))
    if not (source / "truthfulqa").is_dir():
        sys.exit(f"{source}/truthfulqa is not there; set LORRY_DATA to a folder that has it")
    with (source / "truthfulqa/TruthfulQA.csv").open(newline="") as file:
        truthful = shuffled(list(csv.DictReader(file)), seed)
    gsm8k = shuffled(read_lines(source / "gsm8k/train_2000.jsonl"), seed)
    concepts = shuffled(read_lines(source / "common_gen/commongen.dev.jsonl"), seed)
    pools = {
        "truthfulqa": set_rows("truthfulqa", truthful),
        "gsm8k": set_rows("gsm8k", gsm8k),
        "common_gen": set_rows("common_gen", concepts),
        "longqa": shuffled(long_rows(source / "longcontext", size.context), seed),
    }
    # rows that nobody trains on: the end of each pool; gsm8k has a test split
    held = {d: pools[d][-(size.held_long if d == "longqa" else size.held) :] for d in DOMAINS}
    held["gsm8k"] = set_rows("gsm8k", read_lines(source / "gsm8k/test.jsonl")[: size.held])
    files = {f"{d}.held": rows for d, rows in held.items()}
    choose = []
    for d in DOMAINS:
        count = size.train[d]
        files[f"{d}.train"] = pools[d][:count]
        choose += pools[d][count : count + CHOOSE_ROWS]
        # a row that is trained on and asked would make every expert look good
        seen = {json.dumps(row) for row in pools[d][: count + CHOOSE_ROWS]}
        if odd := [row for row in held[d] if json.dumps(row) in seen]:
            sys.exit(f"{d}: a held-out row is among the rows for training: {odd[0]}")
    files["choose"] = choose
    split = shuffled(files[f"{SPLIT_DOMAIN}.train"], seed + 1)
    for name, rows in zip(HALVES, (split[::2], split[1::2]), strict=True):
        files[f"{name}.train"] = rows
    svamp = read_lines(source / "svamp/SVAMP.json")
    boolq = read_lines(source / "boolq/boolq_dev.jsonl")
    files["svamp.held"] = set_rows("svamp", shuffled(svamp, seed)[: size.held])
    files["boolq.held"] = set_rows("bool_q", shuffled(boolq, seed)[: size.held])
    first, second = (held[d] for d in TURN_DOMAINS)
    files[f"{TURNS}.held"] = [two_turns(*pair) for pair in zip(first, second, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "done").touch()
