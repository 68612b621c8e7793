"""Named sets of a question with its options: school science, common sense, exams.

Try: ``named("winogrande").item({"sentence": "The cup fell off the table as _ was wet.", "option1":
"the cup", "option2": "the table", "answer": "2"}).answer`` is "the table".
"""

from __future__ import annotations

import re
from dataclasses import replace

from lorry.data.catalog.item import ItemFields
from lorry.data.catalog.layouts import (
    ColumnLayout,
    RowColumns,
    choice_columns_reader,
    choice_list_reader,
    column_slots,
    llm_adapters_layout,
    make_layout,
    required_text,
    text_list,
)
from lorry.data.catalog.named import SPLITS_WITHOUT_TEST, WHOLE_SPLITS, NamedSet
from lorry.data.reading.content import column_of, optional_text

_CLOSED_BOOK_TEMPLATES = (
    "Question: {question}\n{options}",
    "{question}\n\nChoose one of these answers and repeat it:\n{options}",
    "Which of the answers below is right?\n\n{question}\n\n{lettered}\n\nWrite out the answer's text.",
    "A quiz asks: {question}\nThe choices are {listed}. What is correct?",
    "Here are some candidate answers:\n{options}\n\nOnly one fits this question: {question}",
)


def _question_layouts(column: str) -> tuple[ColumnLayout, ...]:
    def asked(row: RowColumns) -> dict[str, str]:
        return column_slots(row, question=column)

    return (
        make_layout(
            "hub", f"{column} choices|options answerKey|label|answer", choice_list_reader(asked)
        ),
        llm_adapters_layout("question"),
    )


ARC_CHALLENGE = NamedSet(
    name="arc_challenge",
    about="grade-school science questions that retrieval and word statistics get wrong",
    hub="allenai/ai2_arc",
    config="ARC-Challenge",
    splits=WHOLE_SPLITS,
    layouts=_question_layouts("question"),
    templates=_CLOSED_BOOK_TEMPLATES,
    metrics=("accuracy",),
    max_new_tokens=48,
    licence="CC-BY-SA-4.0",
    source="Clark et al. 2018, AI2 Reasoning Challenge (arXiv 1803.05457)",
)
ARC_EASY = replace(
    ARC_CHALLENGE,
    name="arc_easy",
    about="grade-school science questions, the easier part",
    config="ARC-Easy",
)
OPENBOOKQA = NamedSet(
    name="openbookqa",
    about="elementary science facts put to use",
    hub="allenai/openbookqa",
    config="main",
    splits=WHOLE_SPLITS,
    layouts=_question_layouts("question_stem|question"),
    templates=_CLOSED_BOOK_TEMPLATES,
    metrics=("accuracy",),
    max_new_tokens=48,
    licence="Apache-2.0",
    source="Mihaylov et al. 2018, OpenBookQA (arXiv 1809.02789)",
)
WINOGRANDE = NamedSet(
    name="winogrande",
    about="which of two names fills the blank, where only common sense tells",
    hub="allenai/winogrande",
    config="winogrande_xl",
    splits=SPLITS_WITHOUT_TEST,  # test answers are empty
    layouts=(
        make_layout(
            "hub",
            "sentence option1 option2 answer",
            choice_columns_reader(
                lambda row: column_slots(row, "sentence"), ("option1", "option2"), "answer", first=1
            ),
        ),
        llm_adapters_layout("sentence"),
    ),
    templates=(
        "{sentence}\n\nWhat belongs in the blank (_): {listed}?",
        "Fill the gap marked _ in this sentence with {listed}:\n{sentence}",
        "The underscore below stands for a word that was left out.\n\n{sentence}\n\nWhich one makes sense?\n{options}",
        "Who or what is meant by _ here?\n{sentence}\n\n{options}",
    ),
    metrics=("accuracy",),
    max_new_tokens=12,
    licence="CC-BY-4.0",
    source="Sakaguchi et al. 2020, WinoGrande (arXiv 1907.10641)",
)

_HEADINGS = re.compile(r"\s*\[title\]\s*")
_MARKS = re.compile(r"\[[a-z_]+\]\s*")


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


_ENDINGS = choice_list_reader(_scene_slots, "endings")


def _hellaswag(row: RowColumns) -> ItemFields:
    column = column_of(row, ("endings", "choices"))
    return _ENDINGS(
        {
            **row,
            "endings": [_strip_wikihow_marks(ending) for ending in text_list(row[column], column)],
        }
    )


HELLASWAG = NamedSet(
    name="hellaswag",
    about="how an everyday scene or a how-to goes on",
    hub="Rowan/hellaswag",
    splits=SPLITS_WITHOUT_TEST,  # test labels are empty
    layouts=(
        make_layout("hub", "ctx endings|choices label|answer", _hellaswag),
        llm_adapters_layout("context"),
    ),
    templates=(
        "{activity}\n\nContinue: {context}\n{options}",
        "What comes next?\n{context}\n\nPick a continuation:\n{options}",
        "Only one of these endings is sensible.\n{options}\n\nThe beginning was: {context}",
        "{context} ...\n\nFinish the text with one of the following.\n{lettered}\n\nWrite the ending itself.",
    ),
    metrics=("accuracy",),
    max_new_tokens=64,
    licence="MIT",
    source="Zellers et al. 2019, HellaSwag (arXiv 1905.07830)",
)


def _subject_slots(row: RowColumns) -> dict[str, str]:
    found = column_slots(row, "question", subject="subject?")
    return {**found, "subject": found["subject"].replace("_", " ")}


_MMLU_COLUMNS = ("choice0", "choice1", "choice2", "choice3")
MMLU = NamedSet(
    name="mmlu",
    about="exam questions of 57 subjects",
    hub="cais/mmlu",
    config="all",
    # the five examples a subject that the paper shows come from a split of their own
    splits={"train": "auxiliary_train", "validation": "validation", "test": "test", "shots": "dev"},
    layouts=(
        make_layout("hub", "question choices answer", choice_list_reader(_subject_slots)),
        make_layout(
            "columns",
            "question choice0 choice1 choice2 choice3 answer",
            choice_columns_reader(_subject_slots, _MMLU_COLUMNS, "answer"),
        ),
    ),
    templates=(
        "The subject is {subject}.\n\nQuestion: {question}\n{options}",
        "{question}\n\nWhich of these is the right answer?\n{options}",
        "Exam in {subject}.\n\nRead the question, then copy out the right answer.\n\n{question}\n\n{lettered}",
        "Pick the one correct answer to the question.\n{options}\n\nQuestion: {question}",
    ),
    metrics=("accuracy",),
    max_new_tokens=64,
    licence="MIT",
    source="Hendrycks et al. 2021, MMLU (arXiv 2009.03300)",
)

SETS = (ARC_EASY, ARC_CHALLENGE, OPENBOOKQA, WINOGRANDE, HELLASWAG, MMLU)
