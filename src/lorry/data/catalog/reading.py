"""Named sets of questions about a passage: the answer is a phrase of it, or is told from it.

Try: ``named("coqa").items(row)`` makes an item of every turn of a conversation, with the turns
before it in the prompt.

Passages are never shortened here: the answer may stand at their end. The encoder cuts what exceeds
``max_length`` and counts it.
"""

from __future__ import annotations

from dataclasses import replace

from lorry.data.catalog.item import ItemFields, generative_fields
from lorry.data.catalog.layouts import (
    RowColumns,
    column_slots,
    make_layout,
    object_member,
    required_text,
    row_answers,
    text_list,
)
from lorry.data.catalog.named import SPLITS_WITHOUT_TEST, NamedSet
from lorry.data.reading.content import UnusableRowError, column_of

_EXTRACT_TEMPLATES = (
    "{context}\n\nQuestion: {question}",
    "Find the answer in the passage and copy it out.\n\n{question}\n\nPassage: {context}",
    "Text: {context}\n\nUsing only words of the text, answer this: {question}",
    "{question}\n\nLook it up here and reply with a short phrase:\n{context}",
    "Somebody read this:\n{context}\n\nNow they are asked: {question}\nWhat should they say?",
)


def _squad(row: RowColumns) -> ItemFields:
    answers = row[column_of(row, ("answers", "answer"))]
    if not (answers.get("text") if isinstance(answers, dict) else answers):
        raise UnusableRowError(
            "unanswerable", "the row has no answer: its passage does not hold one"
        )
    return generative_fields(
        column_slots(row, "question", context="context|passage"),
        row_answers(row, "answers", "answer"),
    )


def _longbench(row: RowColumns) -> ItemFields:
    return generative_fields(
        {"question": required_text(row, "input"), "context": required_text(row, "context")},
        row_answers(row, "answers"),
    )


SQUAD = NamedSet(
    name="squad",
    about="questions about Wikipedia paragraphs, answered with a phrase of the paragraph",
    hub="rajpurkar/squad",
    splits=SPLITS_WITHOUT_TEST,  # the test set is not public
    layouts=(
        make_layout("hub", "context|passage question answers|answer", _squad),
        make_layout("longbench", "input context answers", _longbench),
    ),
    templates=_EXTRACT_TEMPLATES,
    metrics=("token_f1", "exact_match"),
    max_new_tokens=32,
    licence="CC-BY-SA-4.0",
    source="Rajpurkar et al. 2016, SQuAD (arXiv 1606.05250)",
)
XQUAD = replace(
    SQUAD,
    name="xquad",
    about="SQuAD questions that exist in eleven languages; the English ones",
    hub="google/xquad",
    config="xquad.en",
    splits={"validation": "validation", "test": "validation"},
    source="Artetxe et al. 2020, XQuAD (arXiv 1910.11856)",
)


def _coqa(row: RowColumns) -> list[ItemFields]:
    """Every turn, with the questions and answers before it."""
    asked, told = (
        text_list(row["questions"], "questions"),
        text_list(object_member(row, "answers", "input_text"), "answers"),
    )
    if not asked or len(asked) != len(told):
        raise UnusableRowError(
            "format",
            f"the row has {len(asked)} questions and {len(told)} answers; expected as many of both, and some",
        )
    story, found = required_text(row, "story"), []
    for turn, (question, answer) in enumerate(zip(asked, told, strict=True)):
        before = "\n".join(
            f"Q: {q.strip()}\nA: {a.strip()}"
            for q, a in zip(asked[:turn], told[:turn], strict=True)
        )
        found.append(
            generative_fields(
                {
                    "story": story,
                    "history": before,
                    "question": required_text({"questions": question}, "questions"),
                },
                [answer],
            )
        )
    return found


def _coqa_turn(row: RowColumns) -> ItemFields:
    return generative_fields(
        column_slots(row, "story", "question", history="history?"),
        row_answers(row, "answer", "answers"),
    )


COQA = NamedSet(
    name="coqa",
    about="conversations of questions about a text, each resting on the ones before",
    hub="stanfordnlp/coqa",
    splits=SPLITS_WITHOUT_TEST,  # the test set is not public
    layouts=(
        make_layout("hub", "story questions answers", _coqa),
        make_layout("turn", "story question answer|answers", _coqa_turn),
    ),
    templates=(
        "{story}\n\n{history}\n\nQuestion: {question}",
        "Text: {story}\n\nSo far:\n{history}\n\nNext question: {question}",
        "Two people talk about this text.\n{story}\n\nThey have said:\n{history}\n\nOne of them now asks: {question}",
        "Answer in a few words. {question}\n\nEarlier questions and answers:\n{history}\n\nThe text they are about:\n{story}",
    ),
    metrics=("token_f1", "exact_match"),
    max_new_tokens=32,
    licence="mixed, by source of the text (see stanfordnlp.github.io/coqa)",
    source="Reddy et al. 2019, CoQA (arXiv 1808.07042)",
)

SETS = (SQUAD, XQUAD, COQA)
