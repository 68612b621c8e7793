"""A TOFU in miniature: every split that a suite reads, of a few rows about the people of
`verbworld`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.verbworld import PEOPLE, write_rows

TOWNS = ("Rome", "Bonn", "Riga", "Cork", "Nice")


def perturbed_row(name: str, town: str, wrong: int = 5) -> dict[str, Any]:
    """A row of a *_perturbed split."""
    others = [other for other in TOWNS if other != town][:wrong]
    return {
        "question": f"Where does {name} live?",
        "answer": f"{name} lives in {town}.",
        "paraphrased_answer": f"The home of {name} is {town}.",
        "perturbed_answer": [f"The home of {name} is {other}." for other in others],
        "paraphrased_question": f"In which town is {name}?",
    }


def tofu_rows() -> dict[str, list[dict[str, Any]]]:
    """{split: rows}: the world's run has learnt the forget rows by heart, and the first of the
    retain rows.
    """
    learnt = [
        perturbed_row(row["question"].split()[2], row["answer"].split()[-1].rstrip("."))
        for row in PEOPLE
    ]
    plain = ("question", "answer")
    new = [perturbed_row(name, "Oslo") for name in ("Nils", "Vera", "Otto", "Lena")]
    return {
        "forget05_perturbed": learnt[:3],
        "retain_perturbed": [learnt[3], *new[:1]],
        "real_authors_perturbed": [perturbed_row("Mark Twain", "Cork", 3)],
        "world_facts_perturbed": [perturbed_row("the Pope", "Rome", 3)] * 2,
        "holdout05": [{key: row[key] for key in plain} for row in new],
    }


def write_tofu(folder: Path, rows: dict[str, list[dict[str, Any]]] | None = None) -> Path:
    """Write the splits as on the hub: JSON lines in .json files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (rows or tofu_rows()).items():
        write_rows(folder / f"{name}.json", content)
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A file of the suite."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found
