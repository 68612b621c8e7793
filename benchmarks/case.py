"""One case of a benchmark: the base model, the tokenised rows, the adapter's first values and the
settings, all in one folder.

Every engine reads the same folder, so all train the same thing: `case.json`, `rows.safetensors`,
`base/` and `init/` (a PEFT adapter directory whose B is not zero, so that no tensor's first
gradient is).
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

IGNORED = -100  # the label of a token that is not learnt, as everybody writes it
MODEL = "smollm2-135m-instruct"
CHAT = "chat.jsonl"
# token ids and labels; the first label is always IGNORED, since nothing predicts that token
Row = tuple[list[int], list[int]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """``length``: tokens a row has (packed text) or may have (chat); a step trains
    ``rows_per_step`` rows, or, in engines that pack, as many rows as fit into ``packed_rows`` times
    ``length`` tokens. ``warmup`` and ``steps``: untimed and timed steps.
    """

    kind: str = "sft"
    model: str = MODEL
    length: int = 1024
    rank: int = 16
    alpha: int = 32
    learning_rate: float = 1e-4
    rows_per_step: int = 1
    packed_rows: int = 1
    warmup: int = 1
    steps: int = 3
    threads: int = 1

    @property
    def all_steps(self) -> int:
        """Steps of one process, timed or not."""
        return self.warmup + self.steps

    def save(self, folder: Path) -> None:
        """Write case.json."""
        (folder / "case.json").write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(folder: Path) -> Case:
        """Read case.json."""
        return Case(**json.loads((folder / "case.json").read_text()))


def write_rows(folder: Path, rows: Sequence[Row]) -> None:
    """rows.safetensors: tokens and labels end to end, and where each row begins."""
    import torch
    from safetensors.torch import save_file

    edges = [0]
    for ids, labels in rows:
        if len(ids) != len(labels) or labels[0] != IGNORED:
            raise SystemExit("a row needs a label per token, and no label on its first token")
        edges.append(edges[-1] + len(ids))
    flat = {
        "tokens": [t for ids, _ in rows for t in ids],
        "labels": [t for _, labels in rows for t in labels],
        "edges": edges,
    }
    save_file(
        {name: torch.tensor(values) for name, values in flat.items()}, folder / "rows.safetensors"
    )


def read_rows(folder: Path) -> list[Row]:
    """What `write_rows` wrote."""
    from safetensors.torch import load_file

    flat = load_file(folder / "rows.safetensors")
    edges = flat["edges"].tolist()
    tokens, labels = flat["tokens"].tolist(), flat["labels"].tolist()
    return [(tokens[a:b], labels[a:b]) for a, b in pairwise(edges)]


def prepare_text(folder: Path, case: Case, rows: int) -> None:
    """A whole case of packed plain text: ``rows`` rows of ``case.length`` tokens, every token
    learnt but each row's first. The paragraphs that come with Lorry, over and over: speed does not
    mind, and they are the same everywhere.
    """
    from lorry.demo.people import general_text

    cut = rows_of("\n\n".join(general_text()), prepare_model(folder, case), case.length, rows)
    write_rows(folder, [(row, [IGNORED, *row[1:]]) for row in cut])


def prepare_curve(folder: Path, case: Case, seed: int) -> None:
    """A case to learn from: other text in every row, the order and the adapter's start by ``seed``,
    B = 0 as training starts.
    """
    tokenizer = prepare_model(folder, case, seed=seed, silent_start=True)
    cut = rows_of(long_text(), tokenizer, case.length, case.all_steps)
    random.Random(seed).shuffle(cut)
    write_rows(folder, [(row, [IGNORED, *row[1:]]) for row in cut])


def rows_of(text: str, tokenizer: Any, length: int, rows: int) -> list[list[int]]:
    """So many rows of ``length`` tokens, from the beginning again when the text is used up."""
    ids = tokenizer(text)["input_ids"]
    ids = (ids * (1 + rows * length // len(ids)))[: rows * length]
    return [ids[at : at + length] for at in range(0, len(ids), length)]


def prepare_model(folder: Path, case: Case, *, seed: int = 0, silent_start: bool = False) -> Any:
    """Write case.json, base/ (bf16) and init/; returns the tokenizer. ``silent_start``: B = 0, as
    training really starts.
    """
    from lorry.adapters.attach import attach
    from lorry.adapters.peft.files import save_adapter
    from lorry.adapters.spec import LoraSpec
    from lorry.models.loading.load import load_model
    from lorry.models.loading.store import save_model
    from lorry.notes import ignore_note

    loaded = load_model(case.model, dtype="bfloat16", add_note=ignore_note)
    save_model(loaded.model, folder / "base", tokenizer=loaded.tokenizer)
    attach(
        loaded.model,
        LoraSpec(r=case.rank, lora_alpha=case.alpha, init_lora_weights=silent_start),
        seed=seed,
    )
    save_adapter(loaded.model, folder / "init")
    case.save(folder)
    return loaded.tokenizer


def prepare_chat(folder: Path, case: Case, seed: int = 0) -> list[Row]:
    """A whole case of real questions and answers: chat.jsonl, and the rows that Lorry's own data
    path makes of it.
    """
    from lorry.data.encoding.encode import ExampleEncoder
    from lorry.data.encoding.token_set import TokenSet
    from lorry.data.reading.sources import open_source

    encoder = ExampleEncoder(prepare_model(folder, case), max_length=case.length)
    pairs = chat_pairs()
    random.Random(seed).shuffle(pairs)
    write_chat(folder / CHAT, pairs)
    tokens = TokenSet.build(open_source(str(folder / CHAT), on_bad_row="skip"), encoder)
    rows, kept = [], []
    for number, where in enumerate(tokens.where):
        ids, weights = list(tokens.example(number).tokens), tokens.example(number).weights
        # one that long may have been cut, which every engine does in its own way
        if len(ids) < case.length:
            rows.append((ids, [t if w else IGNORED for t, w in zip(ids, weights, strict=True)]))
            kept.append(pairs[int(where.rsplit(":", 1)[1]) - 1])
    wanted = case.rows_per_step * case.all_steps
    if len(rows) < wanted:
        raise SystemExit(
            f"{wanted} rows are needed and there are {len(rows)}; use fewer steps, or give LORRY_DATA"
        )
    write_chat(folder / CHAT, kept[:wanted])
    write_rows(folder, rows[:wanted])
    return rows[:wanted]


def write_chat(path: Path, pairs: Sequence[tuple[str, str]]) -> None:
    """One JSON object a line, in the form everybody reads."""
    talks = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        for asked, answer in pairs
    ]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))


def data_folder() -> Path | None:
    """LORRY_DATA, or ../shared/data beside the checkout, or None on a stranger's machine."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("LORRY_DATA", beside))
    return path if path.is_dir() else None


def long_text() -> str:
    """WikiText-2's validation text where the data folder has it, else the paragraphs that come with
    Lorry.
    """
    from lorry.demo.people import general_text

    folder = data_folder()
    found = folder / "text" / "wikitext-2-valid.txt" if folder else None
    return found.read_text()[:400_000] if found and found.is_file() else "\n\n".join(general_text())


def chat_pairs() -> list[tuple[str, str]]:
    """(question, answer): Dolly, Self-Instruct's seed and user-oriented tasks, else the questions
    that come with Lorry.
    """
    from lorry.demo.people import general_chat

    folder = data_folder()
    if folder is None or not (folder / "instruct").is_dir():
        return [(str(row["question"]), str(row["answer"])) for row in general_chat()]
    dolly = [
        (row["prompt"], row["answer"])
        for row in json_lines(folder / "instruct" / "dolly_151.jsonl")
    ]
    pairs = []
    for name in ("seed_tasks", "user_oriented_instructions"):
        for row in json_lines(folder / "instruct" / f"{name}.jsonl"):
            first = row["instances"][0]
            pairs.append(
                ("\n".join(filter(None, (row["instruction"], first["input"]))), first["output"])
            )
    return [(asked, answer) for asked, answer in dolly + pairs if asked.strip() and answer.strip()]


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
