"""Named sets of questions about a passage: the answer is a phrase of it, or is told from it.

Try: ``named("coqa").items(row)`` makes an item of every turn of a conversation, with the turns before it in the prompt.

Passages are never shortened here: the answer may stand at their end. The encoder cuts what exceeds ``max_length`` and counts it.
"""

from __future__ import annotations

from dataclasses import replace

from lorry.data.catalog.item import Fields, said
from lorry.data.catalog.layouts import Row, answers_in, layout, listed, need, part, slots
from lorry.data.catalog.named import NO_TEST, NamedSet
from lorry.data.reading.content import Unusable, column_of

_EXTRACT = (
    "{context}\n\nQuestion: {question}",
    "Find the answer in the passage and copy it out.\n\n{question}\n\nPassage: {context}",
    "Text: {context}\n\nUsing only words of the text, answer this: {question}",
    "{question}\n\nLook it up here and reply with a short phrase:\n{context}",
    "Somebody read this:\n{context}\n\nNow they are asked: {question}\nWhat should they say?",
)


def _squad(row: Row) -> Fields:
    answers = row[column_of(row, ("answers", "answer"))]
    if not (answers.get("text") if isinstance(answers, dict) else answers):
        raise Unusable("unanswerable", "the row has no answer: its passage does not hold one")
    return said(slots(row, "question", context="context|passage"), answers_in(row, "answers", "answer"))


def _longbench(row: Row) -> Fields:
    return said({"question": need(row, "input"), "context": need(row, "context")}, answers_in(row, "answers"))


SQUAD = NamedSet(
    name="squad",
    about="questions about Wikipedia paragraphs, answered with a phrase of the paragraph",
    hub="rajpurkar/squad",
    splits=NO_TEST,  # the test set is not public
    layouts=(
        layout("hub", "context|passage question answers|answer", _squad),
        layout("longbench", "input context answers", _longbench),
    ),
    templates=_EXTRACT,
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


def _coqa(row: Row) -> list[Fields]:
    """Every turn, with the questions and answers before it."""
    asked, told = listed(row["questions"], "questions"), listed(part(row, "answers", "input_text"), "answers")
    if not asked or len(asked) != len(told):
        raise Unusable(
            "format", f"the row has {len(asked)} questions and {len(told)} answers; expected as many of both, and some"
        )
    story, found = need(row, "story"), []
    for turn, (question, answer) in enumerate(zip(asked, told, strict=True)):
        before = "\n".join(f"Q: {q.strip()}\nA: {a.strip()}" for q, a in zip(asked[:turn], told[:turn], strict=True))
        found.append(said({"story": story, "history": before, "question": need({"questions": question}, "questions")}, [answer]))
    return found


def _turn(row: Row) -> Fields:
    return said(slots(row, "story", "question", history="history?"), answers_in(row, "answer", "answers"))


COQA = NamedSet(
    name="coqa",
    about="conversations of questions about a text, each resting on the ones before",
    hub="stanfordnlp/coqa",
    splits=NO_TEST,  # the test set is not public
    layouts=(
        layout("hub", "story questions answers", _coqa),
        layout("turn", "story question answer|answers", _turn),
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
