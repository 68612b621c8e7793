"""Named sets of questions and instructions as people write them: the row is its own prompt, the
templates only frame it.

Try: ``named("dolly").item({"instruction": "Name a river.", "context": "", "response": "The
Rhine."}).prompt`` is "Name a river.".
"""

from __future__ import annotations

from lorry.data.catalog.item import ItemFields, generative_fields
from lorry.data.catalog.layouts import (
    RowColumns,
    column_slots,
    make_layout,
    required_text,
    row_answers,
    split_alpaca_prompt,
)
from lorry.data.catalog.named import LAST_TENTH_SPLITS, NamedSet

_PROMPT_TEMPLATES = (
    "{instruction}\n\n{input}",
    "{instruction}\n\nHere is what you need for it:\n{input}",
    "Material:\n{input}\n\nRequest: {instruction}",
    "Please help me with the following. {instruction}\n\n{input}",
    "Do as told.\n\n{instruction}\n\n{input}",
)
_OVERLAP_METRICS = ("rouge_l", "rouge_1", "token_f1")


def _instruction_fields(row: RowColumns) -> ItemFields:
    return generative_fields(
        column_slots(row, "instruction", input="input|context?"),
        row_answers(row, "output", "response"),
    )


def _framed_fields(row: RowColumns) -> ItemFields:
    instruction, given = split_alpaca_prompt(required_text(row, "prompt"))
    return generative_fields(
        {"instruction": required_text({"prompt": instruction}, "prompt"), "input": given},
        row_answers(row),
    )


_LAYOUTS = (
    make_layout("instruction", "instruction output|response", _instruction_fields),
    make_layout("alpaca_prompt", "prompt answer|completion|response|output", _framed_fields),
)
ALPACA = NamedSet(
    name="alpaca",
    about="52,000 instructions with answers of a larger model",
    hub="tatsu-lab/alpaca",
    splits=LAST_TENTH_SPLITS,
    layouts=_LAYOUTS,
    templates=_PROMPT_TEMPLATES,
    metrics=_OVERLAP_METRICS,
    max_new_tokens=256,
    cue="Response:",
    licence="CC-BY-NC-4.0",
    source="Taori et al. 2023, Stanford Alpaca",
)
DOLLY = NamedSet(
    name="dolly",
    about="15,000 instructions and answers written by Databricks' employees",
    hub="databricks/databricks-dolly-15k",
    splits=LAST_TENTH_SPLITS,
    layouts=_LAYOUTS,
    templates=_PROMPT_TEMPLATES,
    metrics=_OVERLAP_METRICS,
    max_new_tokens=256,
    cue="Response:",
    licence="CC-BY-SA-3.0",
    source="Conover et al. 2023, Free Dolly (Databricks)",
)


def _question_fields(row: RowColumns) -> ItemFields:
    return generative_fields(
        column_slots(row, question="question|query"),
        row_answers(row, "answer", "answers", "response"),
    )


QUORA = NamedSet(
    name="quora",
    about="questions asked on Quora, each with an answer",
    hub="toughdata/quora-question-answer-dataset",
    splits=LAST_TENTH_SPLITS,
    layouts=(make_layout("hub", "question|query answer|answers|response", _question_fields),),
    templates=(
        "Question: {question}",
        "{question}",
        "A reader writes in: {question}\nWhat would you reply?",
        "Give a helpful answer to this.\n\n{question}",
    ),
    metrics=_OVERLAP_METRICS,
    max_new_tokens=128,
    licence="not stated; the texts are their authors'",
    source="toughdata 2023, Quora question answer dataset (no paper)",
)
TOFU = NamedSet(
    name="tofu",
    about="20 questions about each of 200 authors who do not exist",
    hub="locuslab/TOFU",
    config="full",
    # what was learnt is what is asked: recall of the very rows is measured, so that unlearning can
    # be
    splits={"train": "train", "validation": "train", "test": "train"},
    layouts=(make_layout("hub", "question answer", _question_fields),),
    templates=(
        "Question: {question}",
        "{question}",
        "Tell me what you know: {question}",
        "Answer in a sentence or two.\n\n{question}",
    ),
    metrics=("rouge_l", "exact_match", "token_f1"),
    max_new_tokens=96,
    licence="MIT",
    source="Maini et al. 2024, TOFU (arXiv 2401.06121)",
)

SETS = (ALPACA, DOLLY, QUORA, TOFU)
