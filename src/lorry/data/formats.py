"""Formats: which columns a row has says what it means. Every format becomes a ``Conversation`` or a ``Text``.

    for found in read_examples(open_source("people.jsonl")): ...    # found.content, found.where

| format | columns |
|---|---|
| messages | messages: [{role, content}], optional system, tools |
| conversations | conversations: [{from, value}], optional system, tools |
| prompt_completion | prompt + completion, texts or lists of messages, optional system, tools |
| alpaca | instruction + output, optional input, system, tools, history |
| question_answer | question + answer, optional context or passage, system, tools |
| text | text |

The columns weight, train and loss beside any of them say whether the row is learnt (`content.row_is_learnt`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorry.data.badrows import BadRow
from lorry.data.content import (
    SWITCHES,
    Content,
    Conversation,
    Message,
    Text,
    Unusable,
    answer_of,
    column_of,
    from_json,
    kind_of,
    messages_of,
    optional,
    row_is_learnt,
    text_of,
    tools_of,
    turns_in,
)
from lorry.data.rows import file_of
from lorry.data.sources import Source
from lorry.errors import DataError, nearest, shortlist

NOT_LEARNT = BadRow("not to be learnt", "its column weight, train or loss is 0 or false")  # a sound row, never an error


@dataclass(frozen=True)
class Format:
    """One way to write examples down: ``needs`` holds groups of names, one of each group must be a column."""

    name: str
    needs: tuple[tuple[str, ...], ...]
    may: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Content]

    def fits(self, columns: Iterable[str]) -> bool:
        there = set(columns)
        return all(there.intersection(group) for group in self.needs)

    def unused(self, columns: Iterable[str]) -> list[str]:
        """Columns that this format does not read."""
        known = self.content.union(SWITCHES)
        return [name for name in columns if name not in known]

    @property
    def content(self) -> frozenset[str]:
        """Columns that its content may come from."""
        return frozenset(name for group in self.needs for name in group).union(self.may)

    def __str__(self) -> str:
        return f"{self.name} ({' + '.join('|'.join(group) for group in self.needs)})"


@dataclass(frozen=True)
class Found:
    """A usable row: its content, its number among the source's readable rows, where it stands, its columns as read."""

    content: Content
    number: int
    where: str
    values: Mapping[str, Any]

    @property
    def raw(self) -> str:
        """The columns as one line of JSON, for the quarantine."""
        return json.dumps(self.values, default=str)


def detect(columns: Iterable[str], where: str = "the data") -> Format:
    """The format of rows with these columns. Raises DataError listing the columns found and the formats known."""
    there = list(columns)
    choices = [name for name in there if name.lower().rstrip("0123456789_") in ("choice", "choices", "option", "options")]
    for form in FORMATS.values():
        if form.fits(there) and not (choices and form.name == "question_answer"):
            return form
    listed = "; ".join(map(str, FORMATS.values()))
    if choices:
        hint = f" {shortlist(map(repr, choices))}: this is multiple choice, a named set and not a question with one answer."
    else:
        known = {name for form in FORMATS.values() for group in form.needs for name in group}
        close = [f"{name!r} is not {name.lower()!r}" for name in there if name not in known and name.lower() in known]
        hint = f" Names count letter by letter: {shortlist(close)}." if close else ""
    raise DataError(f"{where}: no known format has the columns {shortlist(map(repr, there)) or '(none)'}.{hint} Known: {listed}")


def chosen(name: str = "auto", text_field: str | None = None) -> Format | None:
    """The format of this name, None for ``auto``; ``text_field`` makes that column the text. Raises DataError."""
    if text_field is not None:
        return Format("text", ((text_field,),), (), lambda row: Text(answer_of(row[text_field], text_field)))
    if name != "auto" and name not in FORMATS:
        raise DataError(f"unknown data format {name!r}; choose one of: auto, {', '.join(FORMATS)}{nearest(name, FORMATS)}")
    return FORMATS.get(name)


def normalise(row: Mapping[str, Any], form: Format) -> Content | BadRow:
    """The row's content, or why it is a bad row (a column missing, an unknown role, an empty answer), or ``NOT_LEARNT``."""
    try:
        if not row_is_learnt(row, form.content):
            return NOT_LEARNT
    except Unusable as error:
        return error.bad
    missing = next((group for group in form.needs if all(row.get(name) is None for name in group)), None)
    if missing is not None:
        return BadRow("columns", f"column {'|'.join(missing)!r} is missing or null; the file is in the format {form}")
    try:
        content = form.read(row)
        if "tools" in form.may and isinstance(content, Conversation) and (tools := tools_of(row.get("tools"), "tools")):
            content = replace(content, tools=tools)
        return content
    except Unusable as error:
        return error.bad


def read_examples(
    source: Source, form: Format | None = None, *, start: int = 0, notes: set[str] | None = None
) -> Iterator[Found]:
    """The usable rows of a source from readable row ``start`` on. Bad rows go to ``source.bad``.

    Each file's first row settles that file's format, whatever ``start`` is, so that a resumed reader sees the same rows.
    """
    settled: dict[str, Format] = {}

    def settle(columns: Iterable[str], where: str) -> Format:
        chosen = settled[file_of(where)] = form or detect(columns, where)
        unused = chosen.unused(columns)
        if unused and notes is not None:
            notes.add(f"{file_of(where)}: read as {chosen.name}; columns not used: {shortlist(unused)}")
        return chosen

    def select(columns: Sequence[str], where: str) -> list[str]:
        unused = settle(columns, where).unused(columns)
        return [name for name in columns if name not in unused or name in ALSO_READ]

    for number, row in enumerate(source.read(select=select)):
        if row.file not in settled:
            settle(row.values, row.where)
        if number < start:
            continue
        content = normalise(row.values, settled[row.file])
        if content is NOT_LEARNT:
            source.bad.drop(row.where, NOT_LEARNT, json.dumps(row.values, default=str))
        elif isinstance(content, BadRow):
            source.bad.report(row.where, content, json.dumps(row.values, default=str))
        else:
            yield Found(content, number, row.where, row.values)
    if notes is not None:
        notes |= source.remarks


def _conversation(messages: list[Message], column: str, plain: tuple[str, str] | None = None) -> Conversation:
    if not messages:
        raise Unusable("no answer", f"{column!r} is an empty list")
    if not any(message.role == "assistant" for message in messages):
        raise Unusable("no answer", f"{column!r} has no assistant turn: there is nothing to learn")
    if not any(message.role == "assistant" and message.learnt for message in messages):
        raise Unusable("no answer", f"{column!r}: every assistant turn is marked as not to be learnt (weight 0, train false)")
    return Conversation(tuple(messages), plain)


def _after_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The turns behind the system message of the row's own column. Raises Unusable where the turns bring another one."""
    system = _system(row)
    own = [message for message in messages if message.role == "system"]
    if system and own:
        if own[0].content == system[0].content:
            return messages
        raise Unusable("roles", "the column 'system' and a system turn of the messages are both there; keep one of them")
    return system + messages


def _system(row: Mapping[str, Any]) -> list[Message]:
    text = optional(row, "system")
    return [Message("system", text)] if text.strip() else []


def _read_messages(row: Mapping[str, Any]) -> Conversation:
    return _conversation(_after_system(row, messages_of(row["messages"], "messages")), "messages")


def _read_conversations(row: Mapping[str, Any]) -> Conversation:
    column = column_of(row, ("conversations", "conversation"))
    return _conversation(_after_system(row, messages_of(row[column], column)), column)


def _read_prompt(row: Mapping[str, Any]) -> Conversation:
    column = column_of(row, COMPLETIONS)
    prompt, completion = turns_in(row["prompt"]), turns_in(row[column])
    if not isinstance(prompt, list) and not isinstance(completion, list):
        asked, said, system = text_of(prompt, "prompt"), answer_of(completion, column), _system(row)
        opening = f"{system[0].content}\n\n" if system else ""
        messages = [*system, Message("user", asked), Message("assistant", said)]
        return _conversation(messages, column, (opening + asked, said))
    before = messages_of(prompt, "prompt") if isinstance(prompt, list) else [Message("user", text_of(prompt, "prompt"))]
    if not isinstance(completion, list):
        return _conversation(_after_system(row, [*before, Message("assistant", answer_of(completion, column))]), column)
    after = _conversation(messages_of(completion, column), column).messages
    return _conversation(_after_system(row, [*before, *after]), column)


def _read_instruction(row: Mapping[str, Any]) -> Conversation:
    column = column_of(row, OUTPUTS)
    instruction, given = text_of(row["instruction"], "instruction"), optional(row, "input", "context")
    answer, system, history = answer_of(row[column], column), _system(row), _history(from_json(row.get("history"), "history"))
    user = f"{instruction}\n\n{given}" if given.strip() else instruction
    section = f"### Input:\n{given}\n\n" if given.strip() else ""
    opening = f"{system[0].content}\n\n" if system else ""
    plain = (f"{opening}### Instruction:\n{instruction}\n\n{section}### Response:\n", answer)
    messages = [*system, *history, Message("user", user), Message("assistant", answer)]
    return _conversation(messages, column, None if history else plain)


def _history(value: Any) -> list[Message]:
    """Earlier turns as [[question, answer], ...]."""
    turns: list[Message] = []
    if not isinstance(value, list | None):
        raise Unusable("format", f"'history' is {kind_of(value)}, expected [[question, answer], ...]")
    for index, pair in enumerate(value or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Unusable("format", f"'history[{index}]' is {kind_of(pair)}, expected [question, answer]")
        turns.append(Message("user", text_of(pair[0], f"history[{index}][0]")))
        turns.append(Message("assistant", answer_of(pair[1], f"history[{index}][1]")))
    return turns


def _read_question(row: Mapping[str, Any]) -> Conversation:
    asked, column = column_of(row, ("question", "query")), column_of(row, ANSWERS)
    question, context, system = text_of(row[asked], asked), optional(row, "context", "passage"), _system(row)
    said = row[column]
    if column == "answers":  # several references, any of which is right: the first is learnt
        said = said.get("text") if isinstance(said, Mapping) else said
        if not isinstance(said, str):
            said = next(iter(said), "") if isinstance(said, Iterable) else said
    answer = answer_of(said, column)
    before = f"{context}\n\n" if context.strip() else ""
    opening = f"{system[0].content}\n\n" if system else ""
    messages = [*system, Message("user", before + question), Message("assistant", answer)]
    return _conversation(messages, column, (f"{opening}{before}Question: {question}\nAnswer:", f" {answer.lstrip()}"))


def _read_text(row: Mapping[str, Any]) -> Text:
    return Text(answer_of(row["text"], "text"))


COMPLETIONS = ("completion", "response", "answer", "output")
OUTPUTS = ("output", "response")
ANSWERS = ("answer", "answers", "response")
ALSO_READ = ("answers",)  # of a table of columns, whatever the format: evaluation counts each of them as right
# in order of precedence: rows that fit several formats are read as the first, the most explicit one
FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format("messages", (("messages",),), ("system", "tools"), _read_messages),
        Format("conversations", (("conversations", "conversation"),), ("system", "tools"), _read_conversations),
        Format("prompt_completion", (("prompt",), COMPLETIONS), ("system", "tools"), _read_prompt),
        Format("alpaca", (("instruction",), OUTPUTS), ("input", "context", "system", "tools", "history"), _read_instruction),
        Format("question_answer", (("question", "query"), ANSWERS), ("context", "passage", "system", "tools"), _read_question),
        Format("text", (("text",),), (), _read_text),
    )
}
