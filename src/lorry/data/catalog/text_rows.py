"""Rows whose answer is a text or a number, in columns that need more than naming: what a set's file
names as ``reader`` where ``generate`` and ``number`` (`row_readers.py`) do not reach.

Try: ``bare_number("$1,450.00")`` is "1450".

Each is a pure function from the columns to `ItemFields`, ``read_coqa`` to several: a row of it is a
whole conversation. Raises UnusableRowError for a row that cannot be used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lorry.data.catalog.item import ItemFields, generative_fields
from lorry.data.catalog.layouts import (
    RowColumns,
    column_slots,
    object_member,
    required_text,
    row_answers,
    split_alpaca_prompt,
    strip_end_mark,
    text_list,
)
from lorry.data.reading.content import UnusableRowError, column_of, describe_type, text_of

_CALCULATOR_NOTES = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator notes: 16 - 3 = <<16-3=13>>13
_NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)")


def bare_number(value: Any) -> str:
    """A number as text: no thousands commas, currency, percent sign or trailing zeros. Raises
    UnusableRowError for anything else.
    """
    text = re.sub(r"[\s,$€£%]", "", str(value)).rstrip(".")
    if isinstance(value, bool) or not _NUMBER.fullmatch(text):
        raise UnusableRowError("no number", f"the answer {value!r} is not a number")
    return re.sub(r"\.0*$|(\.\d*?)0+$", r"\1", text)


def read_gsm8k(row: RowColumns) -> ItemFields:
    """GSM8K: the reasoning is learnt, then ``#### NUMBER``; the bare number is the reference."""
    text = str(row["answer"])
    # without the mark all of it is the number
    reasoning, mark, last = text.rpartition("####")
    number = bare_number(last)
    shown = _CALCULATOR_NOTES.sub("", reasoning).strip() if mark else ""
    return ItemFields(column_slots(row, "question"), f"{shown}\n#### {number}".strip(), (number,))


def read_svamp(row: RowColumns) -> ItemFields:
    """SVAMP: the story and its question as one text."""
    body, question = required_text(row, "Body"), required_text(row, "Question")
    number = bare_number(row["Answer"])
    # an unfinished clause: "If each costs 3 dollars" + "How much ..."
    if not body.endswith((".", "?", "!", ",")):
        body, question = f"{body},", question[0].lower() + question[1:]
    return ItemFields({"question": f"{body} {question}"}, number, (number,))


def _concept_fields(words: Sequence[str], sentences: Sequence[str]) -> ItemFields:
    listed = [word.strip() for word in words if word.strip()]
    if not listed:
        raise UnusableRowError("empty prompt", "there are no concepts, so there is no question")
    return generative_fields({"concepts": ", ".join(listed)}, sentences, listed)


def read_common_gen(row: RowColumns) -> ItemFields:
    """CommonGen as the hub has it."""
    return _concept_fields(text_list(row["concepts"], "concepts"), row_answers(row, "target"))


def read_common_gen_authors(row: RowColumns) -> ItemFields:
    """CommonGen as its authors released it: ``ski#mountain`` and the scenes of it."""
    return _concept_fields(required_text(row, "concept_set").split("#"), row_answers(row, "scene"))


# How the prompts of the T0 templates (P3, Sanh et al. 2022) hold their concepts, by what they open
# with. The last two are inverted, sentence to concepts; they are turned round, since what they hold
# is the same row.
_T0_PATTERNS = (
    re.compile(
        r"Humans can .*with the concepts (?P<words>.*), a simple sentence can be", re.DOTALL
    ),
    re.compile(
        r"(?:Given the list|Ignoring the order) of (?:the )?concepts: (?P<words>.*); \nGenerate",
        re.DOTALL,
    ),
    re.compile(r"Put the concepts together to form a sentence: (?P<words>.*)\."),
    re.compile(
        r"Construct a sentence with the word .*Hint: Use (?P<words>.*) to restrict", re.DOTALL
    ),
    re.compile(r"Can you write a sentence about the topic (?P<words>.*)\?"),
    re.compile(r"We have the sentence: (?P<sentence>.*); \nExtract all", re.DOTALL),
    re.compile(r"What are the topics in the sentence: (?P<sentence>.*)", re.DOTALL),
    re.compile(r"[^\n]*:\n(?P<words>[^\n]*)\n?"),
)


def read_common_gen_t0(row: RowColumns) -> ItemFields:
    """CommonGen as prompt and completion of the T0 templates."""
    prompt, answer = (
        text_of(row["prompt"], "prompt"),
        strip_end_mark(text_of(row["completion"], "completion")),
    )
    for pattern in _T0_PATTERNS:
        match = pattern.match(prompt)
        if match:
            parts = match.groupdict()
            words, sentence = (
                (parts["words"], answer) if "words" in parts else (answer, parts["sentence"])
            )
            return _concept_fields(words.split(", "), [sentence])
    raise UnusableRowError(
        "format", f"'prompt' is not one of T0's common_gen templates: {prompt[:60]!r}"
    )


def read_scitldr(row: RowColumns) -> ItemFields:
    """SciTLDR: the source is a list of sentences."""
    source = row["source"]
    # hub rows are sentences; other copies have one text
    if isinstance(source, list):
        source = " ".join(sentence.strip() for sentence in text_list(source, "source"))
    return generative_fields(
        {"text": required_text({"source": source}, "source")}, row_answers(row, "target")
    )


def read_translation(row: RowColumns) -> ItemFields:
    """English and Spanish in one column, the hub's ``{en, es}``."""
    if not isinstance(row["translation"], Mapping):
        raise UnusableRowError(
            "format",
            f"'translation' holds {describe_type(row['translation'])}, expected {{en, es}}",
        )
    return generative_fields(
        column_slots(row["translation"], text="en|eng"),
        row_answers(row["translation"], "es", "spa"),
    )


def read_python_code(row: RowColumns) -> ItemFields:
    """Programming tasks, whose input may be none ("Not applicable")."""
    input_text = str(row.get("input") or "").strip()
    return generative_fields(
        {
            **column_slots(row, task="instruction"),
            "input": "" if input_text.lower() == "not applicable" else input_text,
        },
        row_answers(row, "output", "response"),
    )


def read_alpaca_prompt(row: RowColumns) -> ItemFields:
    """An instruction, and what it is given, out of a prompt in Alpaca's frame."""
    instruction, input_text = split_alpaca_prompt(required_text(row, "prompt"))
    return generative_fields(
        {"instruction": required_text({"prompt": instruction}, "prompt"), "input": input_text},
        row_answers(row),
    )


def read_squad(row: RowColumns) -> ItemFields:
    """SQuAD; a question that its passage does not answer (version 2) is a bad row of that kind."""
    answers = row[column_of(row, ("answers", "answer"))]
    if not (answers.get("text") if isinstance(answers, dict) else answers):
        raise UnusableRowError(
            "unanswerable", "the row has no answer: its passage does not contain one"
        )
    return generative_fields(
        column_slots(row, "question", context="context|passage"),
        row_answers(row, "answers", "answer"),
    )


def read_coqa(row: RowColumns) -> list[ItemFields]:
    """Every turn of a conversation, with the questions and answers before it."""
    questions, answers = (
        text_list(row["questions"], "questions"),
        text_list(object_member(row, "answers", "input_text"), "answers"),
    )
    if not questions or len(questions) != len(answers):
        raise UnusableRowError(
            "format",
            (
                f"the row has {len(questions)} questions and {len(answers)} answers; "
                "expected equal numbers, above 0"
            ),
        )
    story, turns = required_text(row, "story"), []
    for turn, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        before = "\n".join(
            f"Q: {q.strip()}\nA: {a.strip()}"
            for q, a in zip(questions[:turn], answers[:turn], strict=True)
        )
        slots = {
            "story": story,
            "history": before,
            "question": required_text({"questions": question}, "questions"),
        }
        turns.append(generative_fields(slots, [answer]))
    return turns
