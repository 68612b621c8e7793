"""Formats: which columns a row has says what it means. Every format becomes a ``Conversation`` or a
``TextDocument``.

    for found in read_examples(open_source("people.jsonl")): ...    # found.content, found.where

| format | columns |
|---|---|
| messages | messages: [{role, content}], optional system, tools |
| conversations | conversations: [{from, value}], optional system, tools |
| prompt_completion | prompt + completion, texts or lists of messages, optional system, tools |
| alpaca | instruction + output, optional input, system, tools, history |
| question_answer | question + answer, optional context or passage, system, tools |
| text | text |

The columns weight, train and loss beside any of them say whether the row is learnt
(`content.row_is_learnt`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorry.data.reading.bad_rows import BadRow
from lorry.data.reading.content import (
    SWITCHES,
    ChatMessage,
    Conversation,
    ExampleContent,
    TextDocument,
    UnusableRowError,
    answer_of,
    column_of,
    describe_type,
    messages_of,
    optional_text,
    parse_json_column,
    parse_turns,
    row_is_learnt,
    text_of,
    tools_of,
)
from lorry.data.reading.rows import file_of
from lorry.data.reading.sources import DataSource
from lorry.errors import DataError, shortlist_names, suggest_nearest
from lorry.notes import NoteCallback, ignore_note

# a sound row, never an error
NOT_LEARNT = BadRow("marked as not for training", "its column weight, train or loss is 0 or false")


@dataclass(frozen=True)
class RowFormat:
    """One way to write examples down: ``needs`` holds groups of names, one of each group must be a
    column.
    """

    name: str
    needs: tuple[tuple[str, ...], ...]
    may: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], ExampleContent]

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
class DataExample:
    """A usable row: its content, its number among the source's readable rows, where it stands, its
    columns as read.
    """

    content: ExampleContent
    number: int
    where: str
    values: Mapping[str, Any]

    @property
    def raw(self) -> str:
        """The columns as one line of JSON, for the quarantine."""
        return json.dumps(self.values, default=str)


def detect_format(columns: Iterable[str], where: str = "the data") -> RowFormat:
    """The format of rows with these columns. Raises DataError listing the columns found and the
    formats known.
    """
    there = list(columns)
    choices = [
        name
        for name in there
        if name.lower().rstrip("0123456789_") in ("choice", "choices", "option", "options")
    ]
    for form in FORMATS.values():
        # a question with its options would be taught as if the options were not there
        if form.fits(there) and not (choices and form.name == "question_answer"):
            return form
    listed = "; ".join(map(str, FORMATS.values()))
    if choices:
        hint = (
            f" {shortlist_names(map(repr, choices))}: this is multiple choice, which "
            "needs a named set, not a question with one answer."
        )
    else:
        known = {name for form in FORMATS.values() for group in form.needs for name in group}
        close = [
            f"{name!r} is not {name.lower()!r}"
            for name in there
            if name not in known and name.lower() in known
        ]
        hint = f" Names are case-sensitive: {shortlist_names(close)}." if close else ""
    raise DataError(
        f"{where}: no known format has the columns {shortlist_names(map(repr, there)) or '(none)'}.{hint} Known: {listed}"
    )


def format_named(name: str = "auto", text_field: str | None = None) -> RowFormat | None:
    """The format of this name, None for ``auto``; ``text_field`` makes that column the text. Raises
    DataError.
    """
    if text_field is not None:
        return RowFormat(
            "text",
            ((text_field,),),
            (),
            lambda row: TextDocument(answer_of(row[text_field], text_field)),
        )
    if name != "auto" and name not in FORMATS:
        raise DataError(
            f"unknown data format {name!r}; choose one of: auto, {', '.join(FORMATS)}{suggest_nearest(name, FORMATS)}"
        )
    return FORMATS.get(name)


def normalise_row(row: Mapping[str, Any], form: RowFormat) -> ExampleContent | BadRow:
    """The row's content, or why it is a bad row (a column missing, an unknown role, an empty
    answer), or ``NOT_LEARNT``.
    """
    try:
        if not row_is_learnt(row, form.content):
            return NOT_LEARNT
    except UnusableRowError as error:
        return error.bad
    missing = next(
        (group for group in form.needs if all(row.get(name) is None for name in group)), None
    )
    if missing is not None:
        return BadRow(
            "columns",
            f"column {'|'.join(missing)!r} is missing or null; the file is in the format {form}",
        )
    try:
        content = form.read(row)
        if (
            "tools" in form.may
            and isinstance(content, Conversation)
            and (tools := tools_of(row.get("tools"), "tools"))
        ):
            content = replace(content, tools=tools)
        return content
    except UnusableRowError as error:
        return error.bad


def read_examples(
    source: DataSource,
    form: RowFormat | None = None,
    *,
    start: int = 0,
    add_note: NoteCallback = ignore_note,
) -> Iterator[DataExample]:
    """The usable rows of a source from readable row ``start`` on. Bad rows go to ``source.bad``;
    ``add_note`` hears, once a file, of columns that are not used.

    Each file's first row settles that file's format, whatever ``start`` is, so that a resumed
    reader sees the same rows.
    """
    # by file: the files of a folder may be written differently
    format_by_file: dict[str, RowFormat] = {}

    def settle(columns: Iterable[str], where: str) -> RowFormat:
        chosen = format_by_file[file_of(where)] = form or detect_format(columns, where)
        unused = chosen.unused(columns)
        if unused:
            add_note(
                f"{file_of(where)}: read as {chosen.name}; columns not used: {shortlist_names(unused)}"
            )
        return chosen

    def select(columns: Sequence[str], where: str) -> list[str]:
        unused = settle(columns, where).unused(columns)
        return [name for name in columns if name not in unused or name in ALSO_READ]

    for number, row in enumerate(source.read(select=select)):
        if row.file not in format_by_file:
            settle(row.values, row.where)
        # read all the same, so that counts and places are those of the first time
        if number < start:
            continue
        content = normalise_row(row.values, format_by_file[row.file])
        if content is NOT_LEARNT:
            source.bad.drop(row.where, NOT_LEARNT, json.dumps(row.values, default=str))
        elif isinstance(content, BadRow):
            source.bad.report(row.where, content, json.dumps(row.values, default=str))
        else:
            yield DataExample(content, number, row.where, row.values)
    # a set, whose order changes from process to process
    for remark in sorted(source.remarks):
        add_note(remark)


def _make_conversation(
    messages: list[ChatMessage], column: str, plain: tuple[str, str] | None = None
) -> Conversation:
    if not messages:
        raise UnusableRowError("no answer", f"{column!r} is an empty list")
    if not any(message.role == "assistant" for message in messages):
        raise UnusableRowError(
            "no answer", f"{column!r} has no assistant turn, so there is nothing to train on"
        )
    if not any(message.role == "assistant" and message.learnt for message in messages):
        raise UnusableRowError(
            "no answer",
            (
                f"{column!r}: every assistant turn is marked as not for "
                "training (weight 0, train false)"
            ),
        )
    return Conversation(tuple(messages), plain)


def _messages_after_system(
    row: Mapping[str, Any], messages: list[ChatMessage]
) -> list[ChatMessage]:
    """The turns behind the system message of the row's own column. Raises UnusableRowError where the turns
    bring another one.
    """
    system = _system_message(row)
    own = [message for message in messages if message.role == "system"]
    if system and own:
        # exports repeat the system message; the same one twice is no contradiction
        if own[0].content == system[0].content:
            return messages
        raise UnusableRowError(
            "roles",
            (
                "the column 'system' and a system turn of the messages are both given; "
                "keep one of them"
            ),
        )
    return system + messages


def _system_message(row: Mapping[str, Any]) -> list[ChatMessage]:
    text = optional_text(row, "system")
    return [ChatMessage("system", text)] if text.strip() else []


def _read_messages(row: Mapping[str, Any]) -> Conversation:
    return _make_conversation(
        _messages_after_system(row, messages_of(row["messages"], "messages")), "messages"
    )


def _read_conversations(row: Mapping[str, Any]) -> Conversation:
    column = column_of(row, ("conversations", "conversation"))
    return _make_conversation(_messages_after_system(row, messages_of(row[column], column)), column)


def _read_prompt(row: Mapping[str, Any]) -> Conversation:
    column = column_of(row, COMPLETIONS)
    prompt, completion = parse_turns(row["prompt"]), parse_turns(row[column])
    if not isinstance(prompt, list) and not isinstance(completion, list):
        prompt_value, completion_value, system = (
            text_of(prompt, "prompt"),
            answer_of(completion, column),
            _system_message(row),
        )
        # running text for a tokenizer without a template has the system message in front
        opening = f"{system[0].content}\n\n" if system else ""
        messages = [
            *system,
            ChatMessage("user", prompt_value),
            ChatMessage("assistant", completion_value),
        ]
        return _make_conversation(messages, column, (opening + prompt_value, completion_value))
    before = (
        messages_of(prompt, "prompt")
        if isinstance(prompt, list)
        else [ChatMessage("user", text_of(prompt, "prompt"))]
    )
    if not isinstance(completion, list):
        return _make_conversation(
            _messages_after_system(
                row, [*before, ChatMessage("assistant", answer_of(completion, column))]
            ),
            column,
        )
    after = _make_conversation(messages_of(completion, column), column).messages
    return _make_conversation(_messages_after_system(row, [*before, *after]), column)


def _read_instruction(row: Mapping[str, Any]) -> Conversation:
    column = column_of(row, OUTPUTS)
    instruction, input_text = (
        text_of(row["instruction"], "instruction"),
        optional_text(row, "input", "context"),
    )
    answer, system, history = (
        answer_of(row[column], column),
        _system_message(row),
        _history_messages(parse_json_column(row.get("history"), "history")),
    )
    user = f"{instruction}\n\n{input_text}" if input_text.strip() else instruction
    # Alpaca's own frame for running text (Taori et al. 2023)
    section = f"### Input:\n{input_text}\n\n" if input_text.strip() else ""
    opening = f"{system[0].content}\n\n" if system else ""
    plain = (f"{opening}### Instruction:\n{instruction}\n\n{section}### Response:\n", answer)
    messages = [*system, *history, ChatMessage("user", user), ChatMessage("assistant", answer)]
    # the frame has no place for earlier turns
    return _make_conversation(messages, column, None if history else plain)


def _history_messages(value: Any) -> list[ChatMessage]:
    """Earlier turns as [[question, answer], ...]."""
    turns: list[ChatMessage] = []
    if not isinstance(value, list | None):
        raise UnusableRowError(
            "format", f"'history' is {describe_type(value)}, expected [[question, answer], ...]"
        )
    for index, pair in enumerate(value or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UnusableRowError(
                "format",
                f"'history[{index}]' is {describe_type(pair)}, expected [question, answer]",
            )
        turns.append(ChatMessage("user", text_of(pair[0], f"history[{index}][0]")))
        turns.append(ChatMessage("assistant", answer_of(pair[1], f"history[{index}][1]")))
    return turns


def _read_question(row: Mapping[str, Any]) -> Conversation:
    question_column, column = column_of(row, ("question", "query")), column_of(row, ANSWERS)
    question, context, system = (
        text_of(row[question_column], question_column),
        optional_text(row, "context", "passage"),
        _system_message(row),
    )
    answer_value = row[column]
    if column == "answers":  # several references, any of which is right: the first is learnt
        # SQuAD: {text: [...], answer_start: [...]}
        answer_value = (
            answer_value.get("text") if isinstance(answer_value, Mapping) else answer_value
        )
        if not isinstance(answer_value, str):
            answer_value = (
                next(iter(answer_value), "") if isinstance(answer_value, Iterable) else answer_value
            )
    answer = answer_of(answer_value, column)
    before = f"{context}\n\n" if context.strip() else ""
    opening = f"{system[0].content}\n\n" if system else ""
    messages = [*system, ChatMessage("user", before + question), ChatMessage("assistant", answer)]
    return _make_conversation(
        messages, column, (f"{opening}{before}Question: {question}\nAnswer:", f" {answer.lstrip()}")
    )


def _read_text(row: Mapping[str, Any]) -> TextDocument:
    return TextDocument(answer_of(row["text"], "text"))


COMPLETIONS = ("completion", "response", "answer", "output")
OUTPUTS = ("output", "response")
ANSWERS = ("answer", "answers", "response")
# of a table of columns, whatever the format: evaluation counts each of them as right
ALSO_READ = ("answers",)
# in order of precedence: rows that fit several formats are read as the first, the most explicit one
FORMATS: dict[str, RowFormat] = {
    form.name: form
    for form in (
        RowFormat("messages", (("messages",),), ("system", "tools"), _read_messages),
        RowFormat(
            "conversations",
            (("conversations", "conversation"),),
            ("system", "tools"),
            _read_conversations,
        ),
        RowFormat(
            "prompt_completion", (("prompt",), COMPLETIONS), ("system", "tools"), _read_prompt
        ),
        RowFormat(
            "alpaca",
            (("instruction",), OUTPUTS),
            ("input", "context", "system", "tools", "history"),
            _read_instruction,
        ),
        RowFormat(
            "question_answer",
            (("question", "query"), ANSWERS),
            ("context", "passage", "system", "tools"),
            _read_question,
        ),
        RowFormat("text", (("text",),), (), _read_text),
    )
}
