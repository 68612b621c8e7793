"""What a row means once its columns are understood: a ``Conversation`` or a ``Text``, and the checks of single fields."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lorry.data.badrows import BadRow

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
    """A list of {role, content} or {from, value}, checked one by one."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise Unusable("format", f"{column!r} holds {kind_of(value)}, expected a list of messages")
    return [_message(item, f"{column}[{index}]") for index, item in enumerate(value)]


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, Mapping):
        raise Unusable("format", f"{place} is {kind_of(item)}, expected {{role, content}} or {{from, value}}")
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
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
