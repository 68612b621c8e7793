"""Named sets of a passage or a pair of texts with a few options: the right one's text is learnt,
all are ranked.

Try: ``named("bool_q").item({"question": "is ice cold", "answer": True}).options`` is ("yes", "no").
"""

from __future__ import annotations

from dataclasses import replace
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
    is_position,
    make_layout,
    required_text,
    row_answers,
    split_adapters_instruction,
)
from lorry.data.catalog.named import SPLITS_WITHOUT_TEST, WHOLE_SPLITS, NamedSet
from lorry.data.reading.content import column_of

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
RELATIONS = ("entailment", "neutral", "contradiction")


def _yes_no_index(value: Any) -> int:
    word = str(value).strip().lower().rstrip(".")
    if word not in _YES_NO_LABELS:
        raise unknown_label_error(value, YES_NO)
    return _YES_NO_LABELS[word]


def _bool_q(row: RowColumns) -> ItemFields:
    label = row[column_of(row, ("answer", "label"))]
    return choice_fields(_passage_slots(row, "question|query"), YES_NO, [_yes_no_index(label)])


def _bool_q_adapters(row: RowColumns) -> ItemFields:
    asked, _, _ = split_adapters_instruction(required_text(row, "instruction"))
    return choice_fields(
        {"question": add_question_mark(asked)},
        YES_NO,
        [_yes_no_index(required_text(row, "answer", "output").split()[-1])],
    )


def _bool_q_long(row: RowColumns) -> ItemFields:
    told = generative_fields(
        {
            "question": add_question_mark(required_text(row, "input")),
            "passage": required_text(row, "context"),
        },
        row_answers(row, "answers"),
    )
    return choice_fields(told.slots, YES_NO, [_yes_no_index(told.answer)])


def _passage_slots(row: RowColumns, question: str) -> dict[str, str]:
    found = column_slots(row, question=question, passage="passage|context?")
    return {**found, "question": add_question_mark(found["question"])}


BOOL_Q = NamedSet(
    name="bool_q",
    about="yes/no questions that people typed into a search engine, with a Wikipedia passage",
    hub="google/boolq",
    splits=SPLITS_WITHOUT_TEST,  # the hub has no test split
    layouts=(
        make_layout("boolq", "question|query answer|label", _bool_q),
        make_layout(
            "llm_adapters", "instruction answer|output", _bool_q_adapters
        ),  # questions without their passages
        make_layout("longbench", "input context answers", _bool_q_long),
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
    BOOL_Q,
    name="boolq_long",
    about="BoolQ questions over whole Wikipedia articles",
    hub=None,
    splits=None,
    limit=None,
)


def _anli(row: RowColumns) -> ItemFields:
    label = row["label"]
    place = RELATIONS.index(label) if label in RELATIONS else label
    if (
        isinstance(place, bool)
        or not is_position(str(place))
        or not 0 <= int(place) < len(RELATIONS)
    ):
        raise unknown_label_error(label, RELATIONS)
    return choice_fields(column_slots(row, "premise", "hypothesis"), RELATIONS, [int(place)])


ANLI = NamedSet(
    name="anli",
    about="adversarial entailment, round 1: does a statement follow from a text",
    hub="facebook/anli",
    splits={"train": "train_r1", "validation": "dev_r1", "test": "test_r1"},
    layouts=(make_layout("anli", "premise hypothesis label", _anli),),
    templates=(
        "Premise: {premise}\nHypothesis: {hypothesis}\n\nIs the relation {listed}?",
        "Suppose we know this:\n{premise}\n\nHow does the next sentence relate to it?\n{hypothesis}\n\n{options}",
        "Text: {premise}\n\nClaim: {hypothesis}\n\nLabel the claim as {listed}, given nothing but the text.",
        'Someone reads "{premise}" and concludes "{hypothesis}"\n\nPick the word that describes that conclusion:\n{options}',
    ),
    metrics=("accuracy",),
    max_new_tokens=6,
    licence="CC-BY-NC-4.0",
    source="Nie et al. 2020, Adversarial NLI (arXiv 1910.14599)",
)


def _anli_round(number: int) -> NamedSet:
    splits = {
        ours: f"{theirs}_r{number}"
        for ours, theirs in (("train", "train"), ("validation", "dev"), ("test", "test"))
    }
    about = f"adversarial entailment, round {number}: does a statement follow from a text"
    return replace(ANLI, name=f"anli_r{number}", about=about, splits=splits)


def _paws(row: RowColumns) -> ItemFields:
    label = row["label"]
    if str(label) not in ("0", "1"):
        raise unknown_label_error(label, ("no", "yes"))
    return choice_fields(column_slots(row, "sentence1", "sentence2"), YES_NO, [1 - int(label)])


PAWS = NamedSet(
    name="paws",
    about="sentence pairs with nearly the same words: do they mean the same",
    hub="google-research-datasets/paws",
    config="labeled_final",
    splits=WHOLE_SPLITS,
    layouts=(make_layout("paws", "sentence1 sentence2 label", _paws),),
    templates=(
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n\nDo the two sentences mean the same? Answer yes or no.",
        "Could the second sentence stand for the first with nothing changed?\n1) {sentence1}\n2) {sentence2}\n\n{options}",
        "First version: {sentence1}\n\nSecond version: {sentence2}\n\nAre these paraphrases ({listed})?",
        '"{sentence1}"\n"{sentence2}"\n\nTell me whether both lines state the same facts, {listed}.',
    ),
    metrics=("accuracy",),
    max_new_tokens=4,
    licence="free for any purpose, with attribution (Google LLC)",
    source="Zhang et al. 2019, PAWS (arXiv 1904.01130)",
)


def _story_slots(row: RowColumns) -> dict[str, str]:
    return column_slots(row, "context", "question")


_COSMOS_COLUMNS = ("answer0", "answer1", "answer2", "answer3")
COSMOS_QA = NamedSet(
    name="cosmos_qa",
    about="what is likely to have caused or to follow everyday events, read between the lines",
    hub="allenai/cosmos_qa",
    converted="default",
    splits=SPLITS_WITHOUT_TEST,  # test labels are -1
    layouts=(
        make_layout(
            "cosmos_qa",
            "context question answer0 answer1 answer2 answer3 label",
            choice_columns_reader(_story_slots, _COSMOS_COLUMNS, "label"),
        ),
        make_layout(
            "choices",
            "context question choices|options answer|label",
            choice_list_reader(_story_slots),
        ),
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
)

SETS = (BOOL_Q, BOOL_Q_LONG, ANLI, _anli_round(2), _anli_round(3), PAWS, COSMOS_QA)
