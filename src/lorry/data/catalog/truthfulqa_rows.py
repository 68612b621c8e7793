"""Rows of TruthfulQA: written answers, every right answer against every wrong one (MC2), and the
best against the wrong (MC1), in the columns of its hub's "generation" rows and of its authors' CSV.

Try: ``mc2_reader("correct_answers", "incorrect_answers", list_column)(row).right`` numbers the
options that are true. The hub's multiple_choice rows are read by ``multiple_choice_targets``
(`row_readers.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lorry.data.catalog.item import ItemFields, choice_fields, generative_fields
from lorry.data.catalog.layouts import (
    FieldsReader,
    RowColumns,
    column_slots,
    required_text,
    row_answers,
)

# (row, column) -> the answers that the column holds
AnswerSplitter = Callable[[RowColumns, str], list[str]]


def split_semicolons(row: RowColumns, column: str) -> list[str]:
    """Answers of a text column, as the authors' CSV parts them."""
    return [part.strip() for part in required_text(row, column).split(";") if part.strip()]


def list_column(row: RowColumns, column: str) -> list[str]:
    """Answers of a list column, as the hub has them; empty ones are left out."""
    return [text for text in row_answers(row, column) if text]


def _question_slots(row: RowColumns) -> dict[str, str]:
    return column_slots(row, question="question|Question")


def written_reader(best: str, right: str, split: AnswerSplitter) -> FieldsReader:
    """The best answer is learnt; every right one is a reference."""
    return lambda row: generative_fields(
        _question_slots(row), [required_text(row, best), *split(row, right)]
    )


def mc1_reader(best: str, wrong: str, split: AnswerSplitter) -> FieldsReader:
    """The best answer against every wrong one."""
    return lambda row: _choice(row, [required_text(row, best)], split(row, wrong))


def mc2_reader(right: str, wrong: str, split: AnswerSplitter) -> FieldsReader:
    """Every right answer against every wrong one."""
    return lambda row: _choice(row, split(row, right), split(row, wrong))


def _choice(row: RowColumns, true: Sequence[str], listed_false: Sequence[str]) -> ItemFields:
    """Right options first, as published: no template shows them, so their order tells a model
    nothing.
    """
    # two rows list an answer as both
    false = [text for text in listed_false if text not in true]
    options = list(dict.fromkeys([*true, *false]))
    # dict.fromkeys keeps the first of equal texts, so the right ones are the first len(set(true))
    return choice_fields(_question_slots(row), options, range(len(set(true))))
