"""Rows of a suite: a question with its right, paraphrased and wrong answers, and where each stands.

Try: ``load_tofu_split("retain95", {"tofu": "data/tofu"})`` is the first 3,800 rows of full.json.

Where a split lies, or what it is derived from, is read in data/reading/suite_splits.py, which
training asks as well: what is forgotten and what is measured are the same rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorry.data.reading.rows import DataRow
from lorry.data.reading.sources import open_source
from lorry.data.reading.suite_splits import FORGET_ROWS, PERTURBED, TOFU, locate_split
from lorry.errors import ConfigError, DataError

HOLDOUT_OF = {name: f"holdout{name.removeprefix('forget')}" for name in FORGET_ROWS}
TOFU_NEW_TOKENS = 200
ANSWER, PARAPHRASED, WRONG = "answer", "paraphrased_answer", "perturbed_answer"
CHOICES = "choices"
ANSWER_FIELDS = (ANSWER, PARAPHRASED, WRONG)


@dataclass(frozen=True)
class SuiteRow:
    """A question; ``answers``: {field: one or several texts}; ``where`` it stands. ``plain``: the
    question is the text before the answer, without a template around and an end of turn behind;
    ``right``: the number of the right answer among choices.
    """

    where: str
    question: str
    answers: Mapping[str, tuple[str, ...]]
    plain: bool = False
    right: int | None = None


@dataclass(frozen=True)
class SuiteSet:
    """The rows of one part of a suite. ``name``: its split; ``note``: what to know of it, or "";
    ``digest``: SHA-256 of the questions asked and of all their answers, whichever are needed this
    time, not of where they stand: equal digests are the same rows.

    ``new_tokens``: longest answer; ``stops``: texts an answer is cut at, one after the other;
    ``gold_tokens``: an answer is compared with so many first tokens of the right one;
    ``answer_tokens``: of an answer to a plain row so many are scored. None: all.
    """

    name: str
    rows: tuple[SuiteRow, ...]
    digest: str
    note: str = ""
    new_tokens: int = TOFU_NEW_TOKENS
    stops: tuple[str, ...] = ()
    gold_tokens: int | None = None
    answer_tokens: int | None = None


def load_tofu_split(name: str, local: Mapping[str, str]) -> tuple[list[DataRow], str]:
    """(the rows of a split of TOFU, a note or ""). ``local``: {tofu: folder, tofu.SPLIT: file};
    without the first the hub's. Raises ConfigError for a split that neither is there nor can be
    derived, DataError for a file that cannot be read.
    """
    reference = f"{TOFU}:{name}"
    note = locate_split(reference, local).note
    return list(open_source(reference, local=local)), note


def load_tofu_sets(
    roles: Mapping[str, tuple[str, ...]],
    *,
    local: Mapping[str, str],
    forget_split: str,
    holdout_split: str | None = None,
    question_key: str = "question",
) -> dict[str, SuiteSet]:
    """{role: its rows} for the roles asked: forget, retain, ra (real authors), wf (world facts),
    holdout. ``roles``: with the answer fields each needs; ``question_key``: the column asked of
    forget and retain rows.

    Raises ConfigError (unknown or missing split), DataError for a row without a field that is
    needed, such as one without wrong answers.
    """
    if forget_split not in FORGET_ROWS:
        raise ConfigError(f"forget_split={forget_split}: TOFU has {', '.join(FORGET_ROWS)}")
    names = {
        "forget": forget_split + PERTURBED,
        "retain": "retain" + PERTURBED,
        "ra": "real_authors" + PERTURBED,
        "wf": "world_facts" + PERTURBED,
        "holdout": holdout_split or HOLDOUT_OF[forget_split],
    }
    sets = {}
    for role, fields in roles.items():
        rows, note = load_tofu_split(names[role], local)
        # real authors, world facts and holdouts have no other wording
        key = question_key if role in ("forget", "retain") else "question"
        sets[role] = question_set(names[role], rows, fields, key=key, note=note)
    return sets


def question_set(
    name: str,
    rows: Sequence[DataRow],
    fields: tuple[str, ...],
    *,
    key: str = "question",
    note: str = "",
) -> SuiteSet:
    """Rows with a question in ``key`` and answers in ``fields``. Raises DataError for no rows, or
    one without a field.
    """
    if not rows:
        raise DataError(f"{name}: there are no rows")
    suite_rows = tuple(_suite_row(row, key, fields, name) for row in rows)
    return SuiteSet(name, suite_rows, _rows_digest(rows, key), note)


def _suite_row(row: DataRow, key: str, fields: tuple[str, ...], name: str) -> SuiteRow:
    answers = {field: row_texts(row, field, name) for field in fields}
    return SuiteRow(f"{name} {row.where}", row_texts(row, key, name)[0], answers)


def _rows_digest(rows: Sequence[DataRow], key: str) -> str:
    return content_digest(
        [[row.values.get(column) for column in (key, *ANSWER_FIELDS)] for row in rows]
    )


def content_digest(content: object) -> str:
    """SHA-256 of what is asked and of the answers."""
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def row_texts(row: DataRow, field: str, name: str) -> tuple[str, ...]:
    """The text, or texts, of a column. Raises DataError."""
    value: Any = row.values.get(field)
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        what = "wrong answers" if field == WRONG else "text"
        raise DataError(
            f"{name} {row.where}: no {what} in {field!r}; every row of this set needs one"
        )
    return tuple(texts)
