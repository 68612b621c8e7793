"""Rows of choices in columns of their own: what a set's file names as ``reader`` where
``multiple_choice`` and its siblings (`row_readers.py`) do not reach.

Try: ``read_bool_q({"question": "is ice cold", "answer": True}).options`` is ("yes", "no").

Each is a pure function from the columns to `ItemFields`. Raises UnusableRowError for a row that
cannot be used.
"""

from __future__ import annotations

import re
from typing import Any

from lorry.data.catalog.item import (
    ItemFields,
    choice_fields,
    generative_fields,
    unknown_label_error,
)
from lorry.data.catalog.layouts import (
    RowColumns,
    add_question_mark,
    choice_columns_reader,
    choice_list_reader,
    column_slots,
    required_text,
    row_answers,
    split_adapters_instruction,
    text_list,
)
from lorry.data.reading.content import column_of, optional_text

YES_NO = ("yes", "no")
# a truth, however it is written, to its place in YES_NO
_YES_NO_LABELS = {
    "true": 0,
    "yes": 0,
    "1": 0,
    "false": 1,
    "no": 1,
    "0": 1,
}
_MMLU_COLUMNS = ("choice0", "choice1", "choice2", "choice3")
# ActivityNet's rows have no such marks; WikiHow's have them in context and endings
_HEADINGS = re.compile(r"\s*\[title\]\s*")
_MARKS = re.compile(r"\[[a-z_]+\]\s*")


def _yes_no_index(value: Any) -> int:
    # booleans, 0 and 1, and words of exports alike
    word = str(value).strip().lower().rstrip(".")
    if word not in _YES_NO_LABELS:
        raise unknown_label_error(value, YES_NO)
    return _YES_NO_LABELS[word]


def read_bool_q(row: RowColumns) -> ItemFields:
    """BoolQ as the hub and its authors have it; the passage may be missing."""
    # the label by its column, not as text: a boolean stays one
    label = row[column_of(row, ("answer", "label"))]
    slots = column_slots(row, question="question|query", passage="passage|context?")
    slots["question"] = add_question_mark(slots["question"])
    return choice_fields(slots, YES_NO, [_yes_no_index(label)])


def read_bool_q_adapters(row: RowColumns) -> ItemFields:
    """BoolQ as LLM-Adapters has it: questions without their passages."""
    question, _, _ = split_adapters_instruction(required_text(row, "instruction"))
    return choice_fields(
        {"question": add_question_mark(question)},
        YES_NO,
        # "the correct answer is true": its last word
        [_yes_no_index(required_text(row, "answer", "output").split()[-1])],
    )


def read_bool_q_long(row: RowColumns) -> ItemFields:
    """BoolQ in LongBench's columns."""
    # read as an answer in words first: there the label is a list of one text
    fields = generative_fields(
        {
            "question": add_question_mark(required_text(row, "input")),
            "passage": required_text(row, "context"),
        },
        row_answers(row, "answers"),
    )
    return choice_fields(fields.slots, YES_NO, [_yes_no_index(fields.answer)])


def read_paws(row: RowColumns) -> ItemFields:
    """PAWS: label 1 is a paraphrase, so "yes", which stands first."""
    label = row["label"]
    if str(label) not in ("0", "1"):
        raise unknown_label_error(label, ("no", "yes"))
    return choice_fields(column_slots(row, "sentence1", "sentence2"), YES_NO, [1 - int(label)])


def _strip_wikihow_marks(text: str) -> str:
    """WikiHow's marks taken out: [title] closes a sentence, [header], [step] and [substeps] are
    layout.
    """
    return " ".join(_MARKS.sub("", _HEADINGS.sub(". ", text)).split())


def _scene_slots(row: RowColumns) -> dict[str, str]:
    return {
        "context": _strip_wikihow_marks(required_text(row, "ctx")),
        "activity": optional_text(row, "activity_label"),
    }


_read_endings = choice_list_reader(_scene_slots, "endings")


def read_hellaswag(row: RowColumns) -> ItemFields:
    """HellaSwag's hub rows, in context and endings without WikiHow's marks."""
    # the hub's name, and that of exports
    column = column_of(row, ("endings", "choices"))
    endings = [_strip_wikihow_marks(ending) for ending in text_list(row[column], column)]
    # endings have the marks that the context has, and would be told apart by them
    return _read_endings({**row, "endings": endings})


def _subject_slots(row: RowColumns) -> dict[str, str]:
    slots = column_slots(row, "question", subject="subject?")
    return {**slots, "subject": slots["subject"].replace("_", " ")}


read_mmlu = choice_list_reader(_subject_slots)
read_mmlu_columns = choice_columns_reader(_subject_slots, _MMLU_COLUMNS, "answer")


def read_longbench_classes(row: RowColumns) -> ItemFields:
    """LongBench's classification rows: the classes of the row are the options."""
    # classes differ from data set to data set within LongBench, so each row brings its own
    options = [name.strip() for name in text_list(row["all_classes"], "all_classes")]
    answers = row_answers(row, "answers")
    if missing := [answer for answer in answers if answer not in options]:
        raise unknown_label_error(missing[0], options)
    slots = {"context": required_text(row, "context"), "question": required_text(row, "input")}
    return choice_fields(slots, options, [options.index(answer) for answer in answers])
