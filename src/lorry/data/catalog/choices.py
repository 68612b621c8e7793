"""Named sets of a passage or a pair of texts with a few options: the right one's text is learnt, all are ranked.

Try: ``named("bool_q").item({"question": "is ice cold", "answer": True}).options`` is ("yes", "no").
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lorry.data.catalog.item import Fields, chosen, outside, said
from lorry.data.catalog.layouts import (
    Row,
    adapters_parts,
    answers_in,
    choice_columns,
    choice_list,
    is_place,
    layout,
    need,
    question_mark,
    slots,
)
from lorry.data.catalog.named import NO_TEST, WHOLE, NamedSet
from lorry.data.reading.content import column_of

YES_NO = ("yes", "no")
_TRUTHS = {"true": 0, "yes": 0, "1": 0, "false": 1, "no": 1, "0": 1}  # a truth, however it is written, to its place in YES_NO
RELATIONS = ("entailment", "neutral", "contradiction")


def _truth(value: Any) -> int:
    word = str(value).strip().lower().rstrip(".")
    if word not in _TRUTHS:
        raise outside(value, YES_NO)
    return _TRUTHS[word]


def _bool_q(row: Row) -> Fields:
    label = row[column_of(row, ("answer", "label"))]
    return chosen(_passage(row, "question|query"), YES_NO, [_truth(label)])


def _bool_q_adapters(row: Row) -> Fields:
    asked, _, _ = adapters_parts(need(row, "instruction"))
    return chosen({"question": question_mark(asked)}, YES_NO, [_truth(need(row, "answer", "output").split()[-1])])


def _bool_q_long(row: Row) -> Fields:
    told = said({"question": question_mark(need(row, "input")), "passage": need(row, "context")}, answers_in(row, "answers"))
    return chosen(told.slots, YES_NO, [_truth(told.answer)])


def _passage(row: Row, question: str) -> dict[str, str]:
    found = slots(row, question=question, passage="passage|context?")
    return {**found, "question": question_mark(found["question"])}


BOOL_Q = NamedSet(
    name="bool_q",
    about="yes/no questions that people typed into a search engine, with a Wikipedia passage",
    hub="google/boolq",
    splits=NO_TEST,  # the hub has no test split
    layouts=(
        layout("boolq", "question|query answer|label", _bool_q),
        layout("llm_adapters", "instruction answer|output", _bool_q_adapters),  # questions without their passages
        layout("longbench", "input context answers", _bool_q_long),
    ),
    templates=(
        "{passage}\n\nQuestion: {question}\nAnswer yes or no.",
        "Going by this text:\n{passage}\n\nReply with a single word, yes or no: {question}",
        "{question}\n\nThe answer can be found here:\n{passage}\n\nSay {listed}.",
        "Background: {passage}\n\nA reader asks: {question}\nWhat do you tell them?\n\n{options}",
        "Yes or no: {question}\n\n{passage}",
    ),
    metrics=("accuracy",),
    max_new_tokens=4,
    limit=("passage", 2000),
    licence="CC-BY-SA-3.0",
    source="Clark et al. 2019, BoolQ (arXiv 1905.10044)",
)
BOOL_Q_LONG = replace(
    BOOL_Q, name="boolq_long", about="BoolQ questions over whole Wikipedia articles", hub=None, splits=None, limit=None
)


def _anli(row: Row) -> Fields:
    label = row["label"]
    place = RELATIONS.index(label) if label in RELATIONS else label
    if isinstance(place, bool) or not is_place(str(place)) or not 0 <= int(place) < len(RELATIONS):
        raise outside(label, RELATIONS)
    return chosen(slots(row, "premise", "hypothesis"), RELATIONS, [int(place)])


ANLI = NamedSet(
    name="anli",
    about="adversarial entailment, round 1: does a statement follow from a text",
    hub="facebook/anli",
    splits={"train": "train_r1", "validation": "dev_r1", "test": "test_r1"},
    layouts=(layout("anli", "premise hypothesis label", _anli),),
    templates=(
        "Premise: {premise}\nHypothesis: {hypothesis}\n\nIs the relation {listed}?",
        "Suppose we know this:\n{premise}\n\nHow does the next sentence relate to it?\n{hypothesis}\n\n{options}",
        "Text: {premise}\n\nClaim: {hypothesis}\n\nLabel the claim as {listed}, given nothing but the text.",
        "Someone reads \"{premise}\" and concludes \"{hypothesis}\"\n\nPick the word that describes that conclusion:\n{options}",
    ),
    metrics=("accuracy",),
    max_new_tokens=6,
    licence="CC-BY-NC-4.0",
    source="Nie et al. 2020, Adversarial NLI (arXiv 1910.14599)",
)  # fmt: skip


def _round(number: int) -> NamedSet:
    splits = {ours: f"{theirs}_r{number}" for ours, theirs in (("train", "train"), ("validation", "dev"), ("test", "test"))}
    about = f"adversarial entailment, round {number}: does a statement follow from a text"
    return replace(ANLI, name=f"anli_r{number}", about=about, splits=splits)


def _paws(row: Row) -> Fields:
    label = row["label"]
    if str(label) not in ("0", "1"):
        raise outside(label, ("no", "yes"))
    return chosen(slots(row, "sentence1", "sentence2"), YES_NO, [1 - int(label)])


PAWS = NamedSet(
    name="paws",
    about="sentence pairs with nearly the same words: do they mean the same",
    hub="google-research-datasets/paws",
    config="labeled_final",
    splits=WHOLE,
    layouts=(layout("paws", "sentence1 sentence2 label", _paws),),
    templates=(
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n\nDo the two sentences mean the same? Answer yes or no.",
        "Could the second sentence stand for the first with nothing changed?\n1) {sentence1}\n2) {sentence2}\n\n{options}",
        "First version: {sentence1}\n\nSecond version: {sentence2}\n\nAre these paraphrases ({listed})?",
        "\"{sentence1}\"\n\"{sentence2}\"\n\nTell me whether both lines state the same facts, {listed}.",
    ),
    metrics=("accuracy",),
    max_new_tokens=4,
    licence="free for any purpose, with attribution (Google LLC)",
    source="Zhang et al. 2019, PAWS (arXiv 1904.01130)",
)  # fmt: skip


def _story(row: Row) -> dict[str, str]:
    return slots(row, "context", "question")


_COSMOS = ("answer0", "answer1", "answer2", "answer3")
COSMOS_QA = NamedSet(
    name="cosmos_qa",
    about="what is likely to have caused or to follow everyday events, read between the lines",
    hub="allenai/cosmos_qa",
    converted="default",
    splits=NO_TEST,  # test labels are -1
    layouts=(
        layout(
            "cosmos_qa", "context question answer0 answer1 answer2 answer3 label",
            choice_columns(_story, _COSMOS, "label"),
        ),
        layout("choices", "context question choices|options answer|label", choice_list(_story)),
    ),
    templates=(
        "{context}\n\nQuestion: {question}\n{options}",
        "Read what somebody wrote:\n{context}\n\n{question}\nChoose the most plausible of these:\n{options}",
        "{question}\n\nYou know only this much:\n{context}\n\nPossible answers:\n{lettered}\n\nGive the text of the best one.",
        "Story: {context}\n\nThink about what is left unsaid. {question}\n\n{options}",
    ),
    metrics=("accuracy",),
    max_new_tokens=48,
    licence="CC-BY-4.0",
    source="Huang et al. 2019, Cosmos QA (arXiv 1909.00277)",
)  # fmt: skip

SETS = (BOOL_Q, BOOL_Q_LONG, ANLI, _round(2), _round(3), PAWS, COSMOS_QA)
