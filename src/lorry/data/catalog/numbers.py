"""Named sets whose answer is a number: it is learnt with the reasoning where there is one, and
compared as a number.

Try: ``bare_number("$1,450.00")`` is "1450".
"""

from __future__ import annotations

import re
from typing import Any

from lorry.data.catalog.item import ItemFields
from lorry.data.catalog.layouts import RowColumns, column_slots, make_layout, required_text
from lorry.data.catalog.named import NamedSet
from lorry.data.reading.content import UnusableRowError, column_of

_CALCULATOR_NOTES = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator notes: 16 - 3 = <<16-3=13>>13
_NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)")


def bare_number(value: Any) -> str:
    """A number as text: no thousands commas, currency, percent sign or trailing zeros. Raises
    Unusable for anything else.
    """
    text = re.sub(r"[\s,$€£%]", "", str(value)).rstrip(".")
    if isinstance(value, bool) or not _NUMBER.fullmatch(text):
        raise UnusableRowError("no number", f"the answer {value!r} is not a number")
    return re.sub(r"\.0*$|(\.\d*?)0+$", r"\1", text)


def _gsm8k(row: RowColumns) -> ItemFields:
    text = str(row["answer"])
    reasoning, mark, last = text.rpartition("####")
    number = bare_number(last)
    shown = _CALCULATOR_NOTES.sub("", reasoning).strip() if mark else ""
    return ItemFields(column_slots(row, "question"), f"{shown}\n#### {number}".strip(), (number,))


def _svamp(row: RowColumns) -> ItemFields:
    body, question = required_text(row, "Body"), required_text(row, "Question")
    number = bare_number(row["Answer"])
    # an unfinished clause: "If each costs 3 dollars" + "How much ..."
    if not body.endswith((".", "?", "!", ",")):
        body, question = f"{body},", question[0].lower() + question[1:]
    return ItemFields({"question": f"{body} {question}"}, number, (number,))


def _word_problem(row: RowColumns) -> ItemFields:
    number = bare_number(row[column_of(row, ("answer", "Answer"))])
    return ItemFields(column_slots(row, question="question|question_concat"), number, (number,))


GSM8K = NamedSet(
    name="gsm8k",
    about="grade-school word problems in several steps, answered with the reasoning and then the number",
    hub="openai/gsm8k",
    config="main",
    splits={"train": "train", "validation": "test", "test": "test"},
    layouts=(make_layout("hub", "question answer", _gsm8k),),
    templates=(
        "Question: {question}",
        "{question}\n\nWork it out step by step and put the final number after ####.",
        "Here is a word problem:\n{question}\n\nShow each step, then close with a line that reads #### and the number.",
        "Calculate, explaining as you go. {question}",
        "How would you solve this?\n\n{question}\n\nThe last line must be #### followed by the result.",
    ),
    metrics=("number_match",),
    max_new_tokens=256,
    licence="MIT",
    source="Cobbe et al. 2021, GSM8K (arXiv 2110.14168)",
)
SVAMP = NamedSet(
    name="svamp",
    about="one-step arithmetic in a short story, varied so that word patterns mislead",
    hub="ChilleD/SVAMP",
    splits={"train": "train", "validation": "test", "test": "test"},
    layouts=(
        make_layout("hub", "Body Question Answer", _svamp),
        make_layout("question_answer", "question|question_concat answer|Answer", _word_problem),
    ),
    templates=(
        "Question: {question}",
        "{question}\n\nAnswer with a number only.",
        "Solve this and give nothing but the result: {question}",
        "A child is asked the following.\n{question}\nWhich number is right?",
    ),
    metrics=("number_match",),
    max_new_tokens=12,
    licence="MIT",
    source="Patel et al. 2021, SVAMP (arXiv 2103.07191)",
)
SETS = (GSM8K, SVAMP)
