"""Row readers by name: what ``reader`` of a layout in a set's file may be, and which of the layout's
settings each takes.

    ROW_READERS["generate"].make(slots={"question": "question|query"}, answers="answer")(row)

The first six read any columns, which the layout names; the others know the columns of one public
set. A file never names code by import path: what is not in this table does not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorry.data.catalog import choice_rows, text_rows, truthfulqa_rows
from lorry.data.catalog.item import (
    ItemFields,
    choice_fields,
    generative_fields,
    unknown_label_error,
)
from lorry.data.catalog.layouts import (
    ANSWERS,
    LABELS,
    FieldsReader,
    RowColumns,
    choice_columns_reader,
    choice_list_reader,
    column_slots,
    is_position,
    object_member,
    required_text,
    row_answers,
    split_adapters_instruction,
    text_list,
)
from lorry.data.catalog.truthfulqa_rows import list_column, split_semicolons
from lorry.data.reading.content import UnusableRowError, column_of

# column names by slot, ``"question|query"``: the first that has a value; ``"context?"`` may be empty
SlotColumns = dict[str, str]


@dataclass(frozen=True)
class RowReader:
    """A way to read rows. ``make``: the function of a row, from the settings of the layout, which
    are keyword arguments; ``required``, ``optional``: which of them it takes; ``slots``: those it
    fills besides the layout's own ``slots``; ``ranked``: whether its items have options;
    ``columns``: the settings whose columns it reads unasked, so that ``needs`` has to name them.
    """

    make: Callable[..., Callable[[RowColumns], ItemFields | list[ItemFields]]]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()
    ranked: bool = False
    columns: tuple[str, ...] = ()


def _generate(slots: SlotColumns, answers: str = "|".join(ANSWERS)) -> FieldsReader:
    """An answer in words: a text, a list of right ones, or SQuAD's {text: [...]}."""
    # once for a layout, not for every row
    columns = tuple(answers.split("|"))
    return lambda row: generative_fields(column_slots(row, **slots), row_answers(row, *columns))


def _number(slots: SlotColumns, answers: str) -> FieldsReader:
    """A number, learnt and compared without thousands commas, currency and trailing zeros."""
    columns = tuple(answers.split("|"))

    def read(row: RowColumns) -> ItemFields:
        # before the slots: what is no number has nothing to be asked for
        number = text_rows.bare_number(row[column_of(row, columns)])
        return ItemFields(column_slots(row, **slots), number, (number,))

    return read


def _multiple_choice(
    slots: SlotColumns, choices: str = "choices|options", label: str = "|".join(LABELS)
) -> FieldsReader:
    """Options in one column, a list of texts or {text: [...], label: [...]}, beside a label: an
    option's number from 0, its letter, or its text.
    """
    return choice_list_reader(
        lambda row: column_slots(row, **slots), choices, tuple(label.split("|"))
    )


def _multiple_choice_columns(
    slots: SlotColumns, choice_columns: Sequence[str], label: str, first_label: int = 0
) -> FieldsReader:
    """A column an option, and the number of the right one, counted from ``first_label``."""
    return choice_columns_reader(
        lambda row: column_slots(row, **slots), choice_columns, label, first_label
    )


def _multiple_choice_targets(slots: SlotColumns, choices: str) -> FieldsReader:
    """Several right options: a column of {choices: [...], labels: [1, 0, ...]}."""

    def read(row: RowColumns) -> ItemFields:
        options, labels = (
            text_list(object_member(row, choices, "choices"), choices),
            object_member(row, choices, "labels"),
        )
        if (
            not isinstance(labels, list | tuple)
            or len(labels) != len(options)
            or any(label not in (0, 1) for label in labels)
        ):
            raise UnusableRowError(
                "label",
                f"{choices!r} has the labels {labels!r} for {len(options)} choices; expected 0 or 1 for each",
            )
        right = [place for place, label in enumerate(labels) if label]
        return choice_fields(column_slots(row, **slots), options, right)

    return read


def _class_label(slots: SlotColumns, options: Sequence[str], label: str) -> FieldsReader:
    """The same options for every row: the label is one of them, or its number from 0."""
    names = tuple(options)

    def read(row: RowColumns) -> ItemFields:
        value = row[label]
        # its text before its number: a class may be called "1"
        place = names.index(value) if value in names else value
        if (
            isinstance(place, bool)
            or not is_position(str(place))
            or not 0 <= int(place) < len(names)
        ):
            raise unknown_label_error(value, names)
        return choice_fields(column_slots(row, **slots), names, [int(place)])

    return read


def _llm_adapters(slots: SlotColumns) -> FieldsReader:
    """The instruction/output/answer rows of LLM-Adapters (Hu et al. 2023): the question, which goes
    into the one slot there is, and its options are taken out again.

    The instruction closes with "Answer format: answer1/answer2/..." and, before that, lists
    "Answer1: ... Answer2: ...".
    """
    # one slot: the instruction holds the question and nothing beside it
    [(slot, columns)] = slots.items()

    def read(row: RowColumns) -> ItemFields:
        question, options, names = split_adapters_instruction(
            required_text(row, *columns.split("|"))
        )
        label = required_text(row, "answer", "output").split()[-1]
        # the names of the answer format ("answer2"), which is what the label says
        if label not in names:
            raise unknown_label_error(
                label,
                [f"{name}: {text}" for name, text in zip(names, options or names, strict=True)],
            )
        return choice_fields({slot: question}, options or names, [names.index(label)])

    return read


def _known_columns(
    read: Callable[[RowColumns], ItemFields | list[ItemFields]], *slots: str, ranked: bool = False
) -> RowReader:
    """A reader that knows its columns and takes no setting."""
    return RowReader(lambda: read, slots=slots, ranked=ranked)


ROW_READERS: dict[str, RowReader] = {
    # any columns, named by the layout
    "generate": RowReader(_generate, ("slots",), ("answers",)),
    "number": RowReader(_number, ("slots", "answers"), columns=("answers",)),
    "multiple_choice": RowReader(
        _multiple_choice,
        ("slots",),
        ("choices", "label"),
        ranked=True,
        columns=("choices", "label"),
    ),
    "multiple_choice_columns": RowReader(
        _multiple_choice_columns,
        ("slots", "choice_columns", "label"),
        ("first_label",),
        ranked=True,
        columns=("choice_columns", "label"),
    ),
    "multiple_choice_targets": RowReader(
        _multiple_choice_targets, ("slots", "choices"), ranked=True, columns=("choices",)
    ),
    "class_label": RowReader(
        _class_label, ("slots", "options", "label"), ranked=True, columns=("label",)
    ),
    "llm_adapters": RowReader(_llm_adapters, ("slots",), ranked=True),
    # columns of one public set
    "alpaca_prompt": _known_columns(text_rows.read_alpaca_prompt, "instruction", "input"),
    "bool_q": _known_columns(choice_rows.read_bool_q, "question", "passage", ranked=True),
    "bool_q_adapters": _known_columns(choice_rows.read_bool_q_adapters, "question", ranked=True),
    "bool_q_long": _known_columns(choice_rows.read_bool_q_long, "question", "passage", ranked=True),
    "common_gen": _known_columns(text_rows.read_common_gen, "concepts"),
    "common_gen_authors": _known_columns(text_rows.read_common_gen_authors, "concepts"),
    "common_gen_t0": _known_columns(text_rows.read_common_gen_t0, "concepts"),
    "coqa": _known_columns(text_rows.read_coqa, "story", "history", "question"),
    "gsm8k": _known_columns(text_rows.read_gsm8k, "question"),
    "hellaswag": _known_columns(choice_rows.read_hellaswag, "context", "activity", ranked=True),
    "longbench_classes": _known_columns(
        choice_rows.read_longbench_classes, "context", "question", ranked=True
    ),
    "mmlu": _known_columns(choice_rows.read_mmlu, "question", "subject", ranked=True),
    "mmlu_columns": _known_columns(
        choice_rows.read_mmlu_columns, "question", "subject", ranked=True
    ),
    "paws": _known_columns(choice_rows.read_paws, "sentence1", "sentence2", ranked=True),
    "python_code": _known_columns(text_rows.read_python_code, "task", "input"),
    "scitldr": _known_columns(text_rows.read_scitldr, "text"),
    "squad": _known_columns(text_rows.read_squad, "question", "context"),
    "svamp": _known_columns(text_rows.read_svamp, "question"),
    "translation": _known_columns(text_rows.read_translation, "text"),
    "truthfulqa": _known_columns(
        truthfulqa_rows.written_reader("best_answer", "correct_answers", list_column), "question"
    ),
    "truthfulqa_csv": _known_columns(
        truthfulqa_rows.written_reader("Best Answer", "Correct Answers", split_semicolons),
        "question",
    ),
    "truthfulqa_mc1": _known_columns(
        truthfulqa_rows.mc1_reader("best_answer", "incorrect_answers", list_column),
        "question",
        ranked=True,
    ),
    "truthfulqa_mc1_csv": _known_columns(
        truthfulqa_rows.mc1_reader("Best Answer", "Incorrect Answers", split_semicolons),
        "question",
        ranked=True,
    ),
    "truthfulqa_mc2": _known_columns(
        truthfulqa_rows.mc2_reader("correct_answers", "incorrect_answers", list_column),
        "question",
        ranked=True,
    ),
    "truthfulqa_mc2_csv": _known_columns(
        truthfulqa_rows.mc2_reader("Correct Answers", "Incorrect Answers", split_semicolons),
        "question",
        ranked=True,
    ),
}
