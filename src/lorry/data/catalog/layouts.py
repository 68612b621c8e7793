"""Layouts: which columns a row needs, and a pure function from the row to canonical fields; and the
pieces that such functions are made of.

Try: ``option_by_label("2", ["a", "b", "c"])`` is 2, the position; ``option_by_label("B", ["a", "b", "c"])`` is 1.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorry.data.catalog.item import ItemFields, choice_fields, number_options, unknown_label_error
from lorry.data.reading.content import (
    UnusableRowError,
    column_of,
    describe_type,
    optional_text,
    text_of,
)

RowColumns = Mapping[str, Any]
FieldsReader = Callable[[RowColumns], ItemFields]
ANSWERS = ("answer", "answers", "output", "response", "completion", "target")
LABELS = ("answerKey", "label", "answer", "gold")
# ends of text that files write out
END_MARKS = (
    "<|endoftext|>",
    "###eos_token###",
    "</s>",
    "<eos>",
)


@dataclass(frozen=True)
class ColumnLayout:
    """One way to write a set down. ``needs``: groups of column names, one of each group must have a
    value.
    """

    name: str
    needs: tuple[tuple[str, ...], ...]
    read: Callable[[RowColumns], ItemFields | list[ItemFields]]

    def fits(self, row: RowColumns) -> bool:
        # by values and not by names: a column that is empty in every row is not there
        return all(column_of(row, group) for group in self.needs)

    def __str__(self) -> str:
        return f"{self.name} ({' + '.join('|'.join(group) for group in self.needs)})"


def required_text(row: RowColumns, *names: str) -> str:
    """The first of these columns that has a value, as text that is not blank. Raises UnusableRowError."""
    column = column_of(row, names)
    text = text_of(row[column], column) if column else ""
    if not text.strip():
        raise UnusableRowError(
            "empty prompt", f"{'|'.join(names)!r} is empty, so there is no question"
        )
    return text.strip()


def column_slots(row: RowColumns, /, *names: str, **renamed: str) -> dict[str, str]:
    """These columns as slots, each with text; ``slot="column|other"`` renames, and
    ``slot="column?"`` may be empty.
    """
    slots = {name: required_text(row, name) for name in names}
    for slot, columns in renamed.items():
        # the mark is the setting's, not part of the last column's name
        listed = columns.removesuffix("?").split("|")
        slots[slot] = (
            optional_text(row, *listed) if columns.endswith("?") else required_text(row, *listed)
        )
    return slots


def text_list(value: Any, column: str) -> list[str]:
    """A list of texts. Raises UnusableRowError for anything else."""
    if not isinstance(value, list | tuple):
        raise UnusableRowError(
            "format", f"{column!r} holds {describe_type(value)}, expected a list of texts"
        )
    return [text_of(item, column) for item in value]


def object_member(row: RowColumns, column: str, key: str) -> Any:
    """What a column that is an object holds under a key. Raises UnusableRowError where it is none or has no
    such key.
    """
    held = row[column]
    if not isinstance(held, Mapping) or key not in held:
        raise UnusableRowError(
            "format", f"{column!r} holds {describe_type(held)}, expected an object with {key!r}"
        )
    return held[key]


def row_answers(row: RowColumns, *names: str) -> list[str]:
    """The right answers of the first column of these that has a value: a text, a list of texts, or
    SQuAD's {text: [...]}.
    """
    column = column_of(row, names or ANSWERS)
    value = row[column] if column else None
    # SQuAD's {text: [...], answer_start: [...]}
    if isinstance(value, Mapping):
        value = value.get("text")
    values = (
        text_list(value, column)
        if isinstance(value, list | tuple)
        else [text_of(value, column or "|".join(names))]
    )
    return [strip_end_mark(text) for text in values]


def strip_end_mark(text: str) -> str:
    """The text without an end of text that the file wrote out as characters."""
    text = text.strip()
    for mark in END_MARKS:
        text = text.removesuffix(mark).rstrip()
    return text


def add_question_mark(text: str) -> str:
    """A question as it is, with the question mark that some sets leave out."""
    return text if text.endswith(("?", "？", ".", "!", ":")) else f"{text}?"


def option_by_label(label: Any, options: Sequence[str], labels: Sequence[str] = ()) -> int:
    """The position of the right option: from labels of its own ("A", "1"), its text, a letter, or
    its number from 0.

    Raises UnusableRowError, naming the label and the options, where it is none of them or could be two.
    """
    wanted = label.strip() if isinstance(label, str) else label
    if labels:
        # rows with labels of their own ("A", or "1" counted from 1) are never counted by position
        known = [item.strip() for item in labels]
        # a row of four texts and five labels says nothing certain about any of them
        if str(wanted) not in known or len(known) != len(options):
            raise unknown_label_error(
                label, [f"{name}: {text}" for name, text in zip(known, options, strict=False)]
            )
        return known.index(str(wanted))
    # True would be position 1
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        return _check_option_index(wanted, label, options)
    if not isinstance(wanted, str):
        raise UnusableRowError(
            "label",
            f"the label is {describe_type(label)}; expected an option's number, letter or text: {number_options(options)}",
        )
    # "2" may be the text of an option and the position of another: then the row is refused
    texts = [option.strip() for option in options]
    places = {texts.index(wanted)} if wanted in texts else set()
    if len(wanted) == 1 and wanted in string.ascii_uppercase:
        places.add(string.ascii_uppercase.index(wanted))
    elif is_position(wanted):
        places.add(int(wanted))
    if len(places) > 1:
        raise UnusableRowError(
            "label",
            f"the label {label!r} may be an option's text or its position: {number_options(options)}",
        )
    if not places:
        raise unknown_label_error(label, options)
    return _check_option_index(places.pop(), label, options)


def is_position(text: str) -> bool:
    """Whether a label is a position in digits. No set has options by the billion, and Python
    converts no 4,301 digits.
    """
    return len(text) < 10 and text.removeprefix("-").isdecimal()


def _check_option_index(number: int, label: Any, options: Sequence[str]) -> int:
    if not 0 <= number < len(options):
        raise unknown_label_error(label, options)
    return number


def choice_list_reader(
    question_slots: Callable[[RowColumns], dict[str, str]],
    column: str = "choices|options",
    label: tuple[str, ...] = LABELS,
) -> FieldsReader:
    """A list of texts, or {text: [...], label: [...]}, beside a label in the first of the columns
    ``label`` that has a value.
    """

    def read(row: RowColumns) -> ItemFields:
        name = column_of(row, tuple(column.split("|")))
        nested = isinstance(row[name], Mapping)
        options = text_list(object_member(row, name, "text") if nested else row[name], name)
        labels = text_list(object_member(row, name, "label"), name) if nested else []
        return choice_fields(
            question_slots(row),
            options,
            [option_by_label(row[column_of(row, label)], options, labels)],
        )

    return read


def choice_columns_reader(
    question_slots: Callable[[RowColumns], dict[str, str]],
    columns: Sequence[str],
    label: str,
    first: int = 0,
) -> FieldsReader:
    """One column an option, and the number of the right one, counted from ``first``; a letter is
    understood, too.
    """

    def read(row: RowColumns) -> ItemFields:
        options = [text_of(row[name], name) for name in columns]
        value = row[label]
        # letters before digits: no column of digits holds one
        if isinstance(value, str) and value.strip() in list(string.ascii_uppercase[: len(columns)]):
            return choice_fields(
                question_slots(row), options, [string.ascii_uppercase.index(value.strip())]
            )
        text = str(value).strip()
        if (
            isinstance(value, bool)
            or not is_position(text)
            or not 0 <= int(text) - first < len(options)
        ):
            raise unknown_label_error(value, options)
        return choice_fields(question_slots(row), options, [int(text) - first])

    return read


_ADAPTERS_INSTRUCTION = re.compile(
    r"Please (?:choose|answer) .*?(?:question|sentence|goal): (.*?)\s*Answer format: (\S+)\s*",
    re.DOTALL,
)


def split_adapters_instruction(instruction: str) -> tuple[str, list[str], list[str]]:
    """(question, option texts or none, option names) of an LLM-Adapters instruction. Raises
    UnusableRowError for another text.
    """
    match = _ADAPTERS_INSTRUCTION.fullmatch(instruction.strip())
    if match is None:
        raise UnusableRowError(
            "format",
            "'instruction' is not one of LLM-Adapters' (Please choose ... Answer format: answer1/answer2)",
        )
    # "answer1/answer2", "true/false", "solution1/solution2"
    names = match[2].split("/")
    question, *options = re.split(
        "|".join(rf"\s+{re.escape(name.capitalize())}: " for name in names), match[1]
    )
    if options and len(options) != len(names):
        raise UnusableRowError(
            "format",
            f"'instruction' lists {len(options)} options for the answer format {match[2]!r}",
        )
    return question.strip(), [option.strip() for option in options], names


def split_alpaca_prompt(prompt: str) -> tuple[str, str]:
    """(instruction, input) of a prompt in Alpaca's frame; a prompt without the frame is all
    instruction.
    """
    head, frame, rest = prompt.partition("### Instruction:")
    if not frame:
        return head.strip(), ""
    # what stands behind the response header is no part of the question
    instruction, _, input_text = rest.partition("### Response:")[0].partition("### Input:")
    return instruction.strip(), input_text.strip()
