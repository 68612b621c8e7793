"""What a row means once its columns are understood: a ``Conversation`` or a ``TextDocument``, and
the checks of single fields.

Whatever a turn says is part of what is trained, or its row is refused, or it is counted and named;
nothing of a turn is dropped in silence. Keys that say what is learnt:

| key | from | meaning |
|---|---|---|
| weight | OpenAI, ShareGPT | 0: not learnt, 1: learnt; anything between is refused |
| train, loss | axolotl; ms-swift, XTuner | false: not learnt, true: learnt |
| train_detail | axolotl | [{begin_offset, end_offset, train}] in characters of the content, both ends included |

What no entry of train_detail covers is not learnt; the end of the turn is.

The columns weight, train and loss of a row say the same of all of it (`row_is_learnt`): 0 or false
leaves the row out with a count, 1, true or nothing changes nothing; a weight between and words are
refused by name, other numbers are not used.

A content may be a list of parts ``{"type": "text", "text": ...}``. They are joined; a part of
another type, or with a key that says anything else, is refused by name. `cache_control` alone may
stand there: it tells a server what to keep.

`mask` and the like mean opposite things in different tools (masked out; counted in the loss) and
are refused.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from lorry.data.reading.bad_rows import BadRow
from lorry.data.reading.json_decoder import RowDecoder
from lorry.disk.documents import parse_json
from lorry.errors import DataError

Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {
    "system": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
}  # fmt: skip
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
SWITCHES = ("weight", "train", "loss")  # of a turn, and as columns of a whole row
LEARNING_KEYS = (*SWITCHES, "train_detail")
# as a CSV file writes a switch
SPELT = {
    "0": False,
    "0.0": False,
    "false": False,
    "1": True,
    "1.0": True,
    "true": True,
}
AMBIGUOUS_KEYS = (
    "mask",
    "masked",
    "loss_mask",
    "train_mask",
    "loss_weight",
    "weights",
    "loss_scale",
    "trainable",
    "training",
    "learn",
    "ignore",
)
# of a part of a content; the last changes nothing that a model reads
PART_KEYS = (
    "type",
    "text",
    "cache_control",
)


@dataclass(frozen=True)
class ChatMessage:
    """One turn. ``reasoning`` is what a thinking model writes before its answer (templates know it
    as reasoning_content); ``name`` whose turn it is, for templates that write it; ``learnt`` False
    for an answer that is only read; ``unlearnt`` the (start, end) characters of the content that
    are not learnt; ``unread`` keys that mean nothing to Lorry.
    """

    role: Role
    content: str
    reasoning: str = ""
    name: str = ""
    learnt: bool = True
    unlearnt: tuple[tuple[int, int], ...] = ()
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """A chat with at least one assistant turn. ``tools``: JSON of the list of tools that the
    template gets, or "".

    ``plain`` is (prompt, completion) as running text, for a tokenizer that has no chat template;
    None when the row was a chat to begin with.
    """

    messages: tuple[ChatMessage, ...]
    plain: tuple[str, str] | None = None
    tools: str = ""

    @property
    def size(self) -> int:
        """Characters of its messages."""
        return sum(len(message.content) for message in self.messages)


@dataclass(frozen=True)
class TextDocument:
    """A document: every token is learnt."""

    text: str

    @property
    def size(self) -> int:
        """Characters."""
        return len(self.text)


ExampleContent = Conversation | TextDocument


class UnusableRowError(Exception):
    """Raised while a row is read, and turned into a ``BadRow`` by ``formats.normalise`` or
    ``places.read_items``.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.bad = BadRow(kind, reason)


def text_of(value: Any, column: str) -> str:
    """A column's value as text; whole numbers are unambiguous, other values are not and are
    refused.
    """
    if isinstance(value, str):
        return _require_utf8(value, column)
    # 3.0 and True have several spellings, and the model would learn the one of Python
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and all(isinstance(part, Mapping) for part in value):
        return "".join(_part_text(part, f"{column}[{number}]") for number, part in enumerate(value))
    raise UnusableRowError("format", f"{column!r} holds {describe_type(value)}, expected text")


def _part_text(part: Mapping[str, Any], place: str) -> str:
    """The text of one part of a content. Raises UnusableRowError for one that is not text, or says more
    than its text.
    """
    if part.get("type") != "text":
        raise UnusableRowError(
            "format",
            f"{place} is a part of type {str(part.get('type'))[:40]!r}; Lorry trains on parts of type 'text'",
        )
    for key, held in part.items():
        if key not in PART_KEYS and held not in (None, "", [], {}):
            hint = (
                "; weights belong beside a turn's role and content"
                if str(key).lower() in (*LEARNING_KEYS, *AMBIGUOUS_KEYS)
                else ""
            )
            raise UnusableRowError(
                "keys",
                f"{place}.{str(key)[:40]}: a content part has the keys type and text only{hint}",
            )
    return text_of(part.get("text"), f"{place}.text")


def _require_utf8(value: str, column: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        reason = f"{column!r} holds half a surrogate pair at character {error.start + 1}; it is not valid Unicode"
        raise UnusableRowError("encoding", reason) from error
    return value


def describe_type(value: Any) -> str:
    """What a value is, in words, for a message."""
    if isinstance(value, bool | float):
        return (
            f"the {'boolean' if isinstance(value, bool) else 'number'} {value} (write "
            "it as the text that the model should answer)"
        )
    return {list: "a list", dict: "an object", type(None): "nothing"}.get(
        type(value), f"a {type(value).__name__}"
    )


def column_of(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first of these names that is a column with a value, or an empty string."""
    return next((name for name in names if row.get(name) is not None), "")


def optional_text(row: Mapping[str, Any], *names: str) -> str:
    """The first of these columns that has a value, as text, or an empty string."""
    name = column_of(row, names)
    return text_of(row[name], name) if name else ""


def answer_of(value: Any, column: str) -> str:
    """Text that the model is to learn, so not empty."""
    text = text_of(value, column)
    if not text.strip():
        raise UnusableRowError(
            "empty answer", f"{column!r} is empty, so there is nothing to train on"
        )
    return text


def messages_of(value: Any, column: str) -> list[ChatMessage]:
    """A list of {role, content} or {from, value}, or such a list as JSON text, checked one by one."""
    value = parse_json_column(value, column)
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UnusableRowError(
            "format", f"{column!r} holds {describe_type(value)}, expected a list of messages"
        )
    return [
        _read_message(parse_json_column(item, f"{column}[{index}]"), f"{column}[{index}]")
        for index, item in enumerate(value)
    ]


def parse_json_column(value: Any, column: str) -> Any:
    """A list or an object that stands in its column as JSON text, since CSV has neither; anything
    else as it is.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    value_in_text = RowDecoder().only(value)
    if isinstance(value_in_text, BadRow):
        raise UnusableRowError(
            "json",
            f"{column!r} as JSON text: {value_in_text.reason} (Python's json.dumps writes JSON, str and repr do not)",
        )
    return value_in_text


def parse_turns(value: Any) -> Any:
    """A prompt or completion that is JSON text of a list of turns and of nothing else, as that
    list; other text as it is.
    """
    # a prompt in brackets is a text, too: only a list of nothing but turns is read as one
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    turns = RowDecoder().only(value)
    return turns if isinstance(turns, list) and turns and all(map(_is_turn, turns)) else value


def _is_turn(item: Any) -> bool:
    return isinstance(item, dict) and any(
        isinstance(item.get(name), str) and item[name] in ROLES for name in ("role", "from")
    )


def _read_message(item: Any, place: str) -> ChatMessage:
    if not isinstance(item, Mapping):
        raise UnusableRowError(
            "format",
            f"{place} is {describe_type(item)}, expected {{role, content}} or {{from, value}}",
        )
    # tables merged from both spellings have both pairs of keys in every turn, one of them null
    role_key, content_key = (
        ("from", "value") if item.get("from") is not None else ("role", "content")
    )
    if (
        role_key == "from"
        and item.get("role") is not None
        and item.get("content") != item.get("value")
    ):
        raise UnusableRowError(
            "format",
            f"{place}: 'from', 'value' and 'role', 'content' differ; keep one pair",
        )
    spoken = item.get(role_key)
    if not isinstance(spoken, str) or spoken not in ROLES:
        hint = (
            "; tool calls are not supported"
            if spoken in ("tool", "function", "function_call", "observation")
            else ""
        )
        raise UnusableRowError(
            "roles", f"{place}: unknown {role_key} {spoken!r}; known are {', '.join(ROLES)}{hint}"
        )
    if item.get("tool_calls") or item.get("function_call"):
        raise UnusableRowError("roles", f"{place}: tool calls are not supported")
    text = text_of(item.get(content_key), f"{place}.{content_key}")
    # an empty answer teaches the model to say nothing
    if ROLES[spoken] == "assistant":
        answer_of(text, f"{place}.{content_key}")
    reasoning = [name for name in REASONING_KEYS if item.get(name)]
    # exports write the thoughts under several names at once
    if len({str(item[name]) for name in reasoning}) > 1:
        raise UnusableRowError(
            "keys",
            f"{place}: {' and '.join(map(repr, reasoning))} differ; keep one of them",
        )
    thought = text_of(item[reasoning[0]], f"{place}.{reasoning[0]}") if reasoning else ""
    learnt, unlearnt = _read_learning_marks(item, ROLES[spoken], text, place)
    name = text_of(item.get("name") or "", f"{place}.name")
    known = {
        role_key,
        content_key,
        "name",
        "tool_calls",
        "function_call",
        *REASONING_KEYS,
        *LEARNING_KEYS,
    }
    unread = tuple(
        str(key)
        for key, held in item.items()
        if key not in known and held not in (None, "", [], {})
    )
    return ChatMessage(ROLES[spoken], text, thought, name, learnt, unlearnt, unread)


def _read_learning_marks(
    item: Mapping[str, Any], role: Role, text: str, place: str
) -> tuple[bool, tuple[tuple[int, int], ...]]:
    """(whether an answer is learnt, the characters of it that are not), from the keys that other
    tools have for this.
    """
    for key, held in item.items():
        if held is not None and str(key).lower() in AMBIGUOUS_KEYS:
            raise UnusableRowError(
                "keys",
                (
                    f"{place}.{key}: its meaning differs between tools; write weight: 0 "
                    "(no loss) or 1 (loss)"
                ),
            )
        if held is not None and key not in LEARNING_KEYS and str(key).lower() in LEARNING_KEYS:
            raise UnusableRowError(
                "keys", f"{place}.{key}: names are case-sensitive; write {str(key).lower()}"
            )
    marks = {
        key: _read_switch(item[key], f"{place}.{key}")
        for key in SWITCHES
        if item.get(key) is not None
    }
    if len(set(marks.values())) > 1:
        raise UnusableRowError(
            "keys",
            f"{place}: {' and '.join(map(repr, marks))} contradict each other; keep one of them",
        )
    learnt = next(iter(marks.values()), True)
    detail = item.get("train_detail")
    # saying that a question is learnt would be a promise nobody keeps; that it is not is true
    # anyway
    if role != "assistant" and (detail or any(marks.values())):
        key = "train_detail" if detail else next(iter(marks))
        raise UnusableRowError(
            "keys",
            (
                f"{place}.{key}: only answers have a loss, and this is a turn of the "
                f"{role}; remove it there"
            ),
        )
    if not detail or not learnt:
        return learnt, ()
    spans = _learnt_characters(detail, len(text), f"{place}.train_detail")
    # what lies between the learnt stretches, behind the last one, too
    gaps, at = list[tuple[int, int]](), 0
    for start, end in [*spans, (len(text), len(text))]:
        if start > at:
            gaps.append((at, start))
        at = max(at, end)
    return bool(spans), tuple(gaps) if spans else ()


def _read_switch(value: Any, place: str) -> bool:
    """true, false, 0 or 1, as Arrow and CSV may write them. Raises UnusableRowError for a weight between."""
    # also 1.0, as a column of floats has it
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise UnusableRowError(
        "keys",
        (
            f"{place} is {str(value)[:40]!r}; a turn has a loss (1, true) or none (0, "
            "false), nothing between"
        ),
    )


def row_is_learnt(row: Mapping[str, Any], read: Collection[str]) -> bool:
    """Whether the columns weight, train and loss let the row teach anything; ``read``: columns that
    are its content.

    A number that can be no such mark (`loss: 2.31`, `weight: 70`) is a column that is not used.
    Raises UnusableRowError for a weight between 0 and 1, for words that are neither, and for columns that
    contradict each other.
    """
    marks = dict[str, bool]()
    for name in SWITCHES:
        value = row.get(name)
        # a column that is the content says nothing of what is learnt
        if name in read or value is None or (isinstance(value, str) and not value.strip()):
            continue
        switch = SPELT.get(value.strip().lower()) if isinstance(value, str) else None
        if isinstance(value, int | float) and (
            value < 0 or value > 1 or (name == "loss" and value not in (0, 1))
        ):
            # a measurement, such as kilograms or what another model found hard: a column like any
            # other
            continue
        if switch is None and not (isinstance(value, int | float) and value in (0, 1)):
            reason = (
                f"column {name!r} is {str(value)[:40]!r}; a row is used (1, true) or "
                "skipped (0, false), nothing between"
            )
            raise UnusableRowError(
                "keys", f"{reason}; rename the column if it means something else"
            )
        marks[name] = bool(value) if switch is None else switch
    if len(set(marks.values())) > 1:
        raise UnusableRowError(
            "keys",
            f"the columns {' and '.join(map(repr, marks))} contradict each other; keep one of them",
        )
    return next(iter(marks.values()), True)


def _learnt_characters(detail: Any, length: int, place: str) -> list[tuple[int, int]]:
    """The (start, end) of each learnt stretch, in order, end excluded. Raises UnusableRowError for
    stretches that cannot be.
    """
    stretches = []
    for number, part in enumerate(detail if isinstance(detail, list | tuple) else [detail]):
        where = f"{place}[{number}]"
        bounds = (
            [part.get(name) for name in ("begin_offset", "end_offset")]
            if isinstance(part, Mapping)
            else []
        )
        whole = [at for at in bounds if isinstance(at, int) and not isinstance(at, bool)]
        if len(whole) != 2:
            raise UnusableRowError(
                "keys", f"{where} is not {{begin_offset, end_offset, train}} with whole numbers"
            )
        if set(part) - {"begin_offset", "end_offset", "train"} or part.get("train") is None:
            raise UnusableRowError(
                "keys", f"{where} has other keys than begin_offset, end_offset and train"
            )
        start, end = whole
        if not 0 <= start <= end < length:
            raise UnusableRowError(
                "keys",
                f"{where}: characters {start} to {end} are not in a content of {length} (0 to {length - 1})",
            )
        # axolotl counts both ends in
        stretches.append((start, end + 1, _read_switch(part["train"], f"{where}.train")))
    stretches.sort()
    # sorted, so only neighbours can overlap
    if any(stretch[1] > other[0] for stretch, other in pairwise(stretches)):
        raise UnusableRowError("keys", f"{place}: two ranges overlap; name each character once")
    return [(start, end) for start, end, train in stretches if train]


def tools_of(value: Any, column: str) -> str:
    """A column of tools (a list of objects, or that as JSON text) as JSON, "" for none. Raises
    Unusable.

    A table gives every object of a column the keys of all of them, null where a tool has no such
    key: these are left out of a list. JSON text is no table's and keeps its nulls.
    """
    read = value
    if isinstance(value, str) and value.strip():
        try:
            read = parse_json(value, column)
        except DataError as error:
            raise UnusableRowError("tools", f"{error}; expected a list of tools") from error
    if read is None or (isinstance(read, str) and not read.strip()):
        return ""
    if not isinstance(read, list) or not all(isinstance(tool, dict) for tool in read):
        raise UnusableRowError(
            "tools",
            f"{column!r} holds {describe_type(read)}, expected a list of objects, one for each tool",
        )
    try:
        return (
            json.dumps(read if isinstance(value, str) else _without_nulls(read), ensure_ascii=False)
            if read
            else ""
        )
    except (TypeError, ValueError) as error:
        raise UnusableRowError(
            "tools", f"{column!r} holds what JSON cannot write: {error}"
        ) from error


def _without_nulls(value: Any) -> Any:
    """Without the keys whose value is null, at any depth; a null that is an element of a list
    stays.
    """
    if isinstance(value, Mapping):
        return {key: _without_nulls(held) for key, held in value.items() if held is not None}
    return [_without_nulls(held) for held in value] if isinstance(value, list) else value
