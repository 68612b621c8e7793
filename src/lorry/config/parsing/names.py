"""What a schema's settings are called, which values they take, and how that is said to a person."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as limits
from pydantic import BaseModel
from pydantic.fields import FieldInfo

TYPE_WORDS = {
    str: "text",
    Path: "a path",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    NoneType: "null",
}


class _ShortRepr(reprlib.Repr):
    """Values shortened for a message. Python refuses to write integers of over 4,300 digits; here
    they have a size instead.
    """

    def repr_int(self, x: int, level: int) -> str:
        return (
            f"a whole number of {x.bit_length()} bits"
            if x.bit_length() > 128
            else super().repr_int(x, level)
        )


SHORT_REPR = _ShortRepr()
# a value is a hint in one line of a message, not a copy of what was given
SHORT_REPR.maxstring = SHORT_REPR.maxother = 80
SHORT_REPR.maxlist = SHORT_REPR.maxdict = 4
SHORT_REPR.maxlevel = 2


@dataclass(frozen=True)
class SchemaNames:
    """The settings of one schema: groups by name, fields by their dotted name, dotted names by
    leaf.
    """

    groups: dict[str, type[BaseModel]]
    fields: dict[str, FieldInfo]
    leaves: dict[str, list[str]]

    def candidates(self, key: str) -> list[str]:
        """Dotted names that ``key`` may stand for: itself, a group's main field, or every field
        with that last part.
        """
        if key in self.fields:
            return [key]
        if key in self.groups:
            main = getattr(self.groups[key], "main", "")
            return [f"{key}.{main}"] if main else []
        return self.leaves.get(key, [])

    def within(self, groups: Sequence[str]) -> SchemaNames:
        """Those of some groups alone."""
        fields = {name: f for name, f in self.fields.items() if name.partition(".")[0] in groups}
        groups_within = {name: kind for name, kind in self.groups.items() if name in groups}
        return SchemaNames(groups_within, fields, _by_leaf(fields))


@cache
def schema_names(schema: type[BaseModel]) -> SchemaNames:
    """The names of a schema whose fields are plain values or groups (one level)."""
    groups: dict[str, type[BaseModel]] = {}
    fields: dict[str, FieldInfo] = {}
    for name, field in schema.model_fields.items():
        inner = next(
            (
                kind
                for kind in union_members(field.annotation)
                if isinstance(kind, type) and issubclass(kind, BaseModel)
            ),
            None,
        )
        if inner is None:
            fields[name] = field
        else:
            groups[name] = inner
            fields |= {f"{name}.{leaf}": each for leaf, each in inner.model_fields.items()}
    return SchemaNames(groups, fields, _by_leaf(fields))


def _by_leaf(fields: Iterable[str]) -> dict[str, list[str]]:
    """Dotted names by their last part."""
    leaves: dict[str, list[str]] = {}
    for dotted in fields:
        leaves.setdefault(dotted.rpartition(".")[2], []).append(dotted)
    return leaves


def union_members(annotation: Any) -> list[Any]:
    """The kinds of a union, Annotated's wrapping taken off: ``PathText | list[str] | None -> [str,
    list[str], NoneType]``.
    """
    if get_origin(annotation) is Annotated:
        return union_members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in union_members(part)]
    return [annotation]


def accepts_type(field: FieldInfo, kind: type) -> bool:
    """Whether a field takes values of a Python type: one of str, int, float, bool, list, dict,
    NoneType.
    """
    member_types = {get_origin(member) or member for member in union_members(field.annotation)}
    choices = {
        type(choice)
        for member in union_members(field.annotation)
        if get_origin(member) is Literal
        for choice in get_args(member)
    }
    # pydantic makes a Path of text and a float of an int
    converted: dict[type, set[Any]] = {str: {Path}, int: {float}}
    return bool(({kind} | converted.get(kind, set())) & (member_types | choices))


def describe_allowed(field: FieldInfo) -> str:
    """What a field takes, in words: ``a whole number above 0 or null``."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "allowed" in extra:
        return str(extra["allowed"])
    return _join_alternatives(_type_words(field.annotation, field.metadata))


def _join_alternatives(words: list[str]) -> str:
    """``a or b``, without ``a whole number`` where any number does."""
    numbers = any(word.startswith("a number") for word in words)
    return " or ".join(
        dict.fromkeys(word for word in words if not (numbers and word.startswith("a whole number")))
    )


def _type_words(annotation: Any, metadata: Iterable[Any] = ()) -> list[str]:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_words(args[0], [*args[1:], *metadata])
    if origin in (Union, UnionType):
        return [word for part in args for word in _type_words(part, metadata)]
    if origin is Literal:
        return ["one of " + ", ".join(map(str, args)) if len(args) > 1 else str(args[0])]
    if origin is list:
        return [f"a list ({_join_alternatives(_type_words(args[0]))} each)"]
    if origin is dict:
        return [f"a map of name: {_join_alternatives(_type_words(args[1]))}"]
    # limits of a union's number do not hold for its text or null
    bounds = " and ".join(_bound_words(metadata)) if annotation in (int, float) else ""
    return [f"{TYPE_WORDS[annotation]} {bounds}".rstrip()]


def _bound_words(metadata: Iterable[Any]) -> Iterable[str]:
    for limit in metadata:
        match limit:
            case limits.Ge(ge=bound):
                yield f"of at least {bound}"
            case limits.Gt(gt=bound):
                yield f"above {bound}"
            case limits.Lt(lt=bound):
                yield f"below {bound}"
            case limits.Le(le=bound):
                yield f"at most {bound}"
            case _:
                pass


def show_value(value: Any) -> str:
    """A value in a message, shortened, in YAML's words where Python has others: true, null, 8,
    'text'.
    """
    return {"True": "true", "False": "false", "None": "null"}.get(
        SHORT_REPR.repr(value), SHORT_REPR.repr(value)
    )
