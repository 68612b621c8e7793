"""What a row means once its columns are understood: a ``Conversation`` or a ``Text``, and the checks of single fields."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lorry.data.badrows import BadRow
from lorry.data.json_rows import RowDecoder

Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {
    "system": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
}  # fmt: skip


@dataclass(frozen=True)
class Message:
    """One turn. ``reasoning`` is what a thinking model writes before its answer (templates know it as reasoning_content)."""

    role: Role
    content: str
    reasoning: str = ""


@dataclass(frozen=True)
class Conversation:
    """A chat with at least one assistant turn.

    ``plain`` is (prompt, completion) as running text, for a tokenizer that has no chat template; None when the row was a
    chat to begin with.
    """

    messages: tuple[Message, ...]
    plain: tuple[str, str] | None = None


@dataclass(frozen=True)
class Text:
    """A document: every token is learnt."""

    text: str


Content = Conversation | Text


class Unusable(Exception):
    """Raised while a row is read, and turned into a ``BadRow`` by ``formats.normalise`` or ``places.read_items``."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.bad = BadRow(kind, reason)


def text_of(value: Any, column: str) -> str:
    """A column's value as text; whole numbers are unambiguous, other values are not and are refused."""
    if isinstance(value, str):
        return _encodable(value, column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        return "".join(text_of(part.get("text"), column) for part in value)
    raise Unusable("format", f"{column!r} holds {kind_of(value)}, expected text")


def _encodable(value: str, column: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        reason = f"{column!r} holds half a surrogate pair at character {error.start + 1}; it is not valid Unicode"
        raise Unusable("encoding", reason) from error
    return value


def kind_of(value: Any) -> str:
    """What a value is, in words, for a message."""
    if isinstance(value, bool | float):
        return f"the {'boolean' if isinstance(value, bool) else 'number'} {value} (write it as the text the model should say)"
    return {list: "a list", dict: "an object", type(None): "nothing"}.get(type(value), f"a {type(value).__name__}")


def column_of(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first of these names that is a column with a value, or an empty string."""
    return next((name for name in names if row.get(name) is not None), "")


def optional(row: Mapping[str, Any], *names: str) -> str:
    """The first of these columns that has a value, as text, or an empty string."""
    name = column_of(row, names)
    return text_of(row[name], name) if name else ""


def answer_of(value: Any, column: str) -> str:
    """Text that the model is to learn, so not empty."""
    text = text_of(value, column)
    if not text.strip():
        raise Unusable("empty answer", f"{column!r} is empty: there is nothing to learn")
    return text


def messages_of(value: Any, column: str) -> list[Message]:
    """A list of {role, content} or {from, value}, or such a list as JSON text, checked one by one."""
    value = from_json(value, column)
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise Unusable("format", f"{column!r} holds {kind_of(value)}, expected a list of messages")
    return [_message(from_json(item, f"{column}[{index}]"), f"{column}[{index}]") for index, item in enumerate(value)]


def from_json(value: Any, column: str) -> Any:
    """A list or an object that stands in its column as JSON text, since CSV has neither; anything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    found = RowDecoder().only(value)
    if isinstance(found, BadRow):
        raise Unusable("json", f"{column!r} as JSON text: {found.reason} (Python's json.dumps writes JSON, str and repr do not)")
    return found


def turns_in(value: Any) -> Any:
    """A prompt or completion that is JSON text of a list of turns and of nothing else, as that list; other text as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    found = RowDecoder().only(value)
    return found if isinstance(found, list) and found and all(map(_is_turn, found)) else value


def _is_turn(item: Any) -> bool:
    return isinstance(item, dict) and any(isinstance(item.get(name), str) and item[name] in ROLES for name in ("role", "from"))


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, Mapping):
        raise Unusable("format", f"{place} is {kind_of(item)}, expected {{role, content}} or {{from, value}}")
    # tables merged from both spellings have both pairs of keys in every turn, one of them null
    role_key, content_key = ("from", "value") if item.get("from") is not None else ("role", "content")
    if role_key == "from" and item.get("role") is not None and item.get("content") != item.get("value"):
        raise Unusable("format", f"{place}: 'from', 'value' and 'role', 'content' say different things; keep one pair")
    spoken = item.get(role_key)
    if not isinstance(spoken, str) or spoken not in ROLES:
        hint = "; tool calls are not supported" if spoken in ("tool", "function", "function_call", "observation") else ""
        raise Unusable("roles", f"{place}: unknown {role_key} {spoken!r}; known are {', '.join(ROLES)}{hint}")
    if item.get("tool_calls"):
        raise Unusable("roles", f"{place}: tool calls are not supported")
    text = text_of(item.get(content_key), f"{place}.{content_key}")
    if ROLES[spoken] == "assistant":
        answer_of(text, f"{place}.{content_key}")
    reasoning = item.get("reasoning_content") or item.get("reasoning") or item.get("thinking") or ""
    return Message(ROLES[spoken], text, text_of(reasoning, f"{place}.reasoning_content"))
