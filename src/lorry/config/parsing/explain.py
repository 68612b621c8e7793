"""Pydantic's errors as sentences for people: which setting, where it stands, what was given, what
is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from lorry.config.parsing.names import SchemaNames, describe_allowed, show_value, union_members
from lorry.errors import suggest_nearest


def explain_validation(
    error: ValidationError, names: SchemaNames, origins: Mapping[str, str]
) -> str:
    """One line per setting that is wrong. ``origins``: where each given setting stands, by dotted
    name.
    """
    lines: dict[str, str] = {}
    for item in error.errors(include_url=False):
        dotted = _dotted_name(item["loc"], names)
        where = origins.get(dotted, "")
        sentence = _with_place(_error_sentence(item, dotted, names), dotted, where, item["input"])
        # pydantic has an error for every member of a union that a value fits not; one line is
        # enough
        lines.setdefault(dotted or sentence, sentence)
    return "\n".join(lines.values())


def _with_place(sentence: str, dotted: str, where: str, value: Any) -> str:
    """The sentence behind the place where its setting stands. A word of the command line and a
    keyword of Python are the setting itself: it is named once, by whichever tells more."""
    if not where:
        return sentence
    word = re.split(r"[= ]", where.lstrip("-"))[0].replace("-", "_")
    if word not in (dotted, dotted.rpartition(".")[2]) or not sentence.startswith(f"{dotted}: "):
        return f"{where}: {sentence}"
    shows_value = sentence.startswith(f"{dotted}: got ") or show_value(value) in sentence
    if shows_value or word == where:
        return sentence
    return f"{where}: {sentence.removeprefix(f'{dotted}: ')}"


def _dotted_name(loc: tuple[int | str, ...], names: SchemaNames) -> str:
    """The setting an error belongs to; deeper parts of ``loc`` (union members, list indices) are
    left off.
    """
    # one level of groups, see `schema_names`
    pair = ".".join(map(str, loc[:2]))
    return pair if pair in names.fields else ".".join(map(str, loc[:1]))


def _error_sentence(item: ErrorDetails, dotted: str, names: SchemaNames) -> str:
    if item["type"] == "value_error":
        message = str(item["ctx"]["error"])
        return f"{dotted}: {message}" if dotted in names.fields else message
    if item["type"] == "missing":
        return _missing_sentence(dotted, names)
    if dotted not in names.fields:
        return f"{dotted}: got {show_value(item['input'])}; give settings of this group, such as {dotted}.{_first_field(names, dotted)}"
    match item["loc"][dotted.count(".") + 1 :]:
        case (int(at), str(name)):  # of a list of maps, one entry's setting
            return _entry_sentence(item, f"{dotted}.{at}", name)
    field = names.fields[dotted]
    return f"{dotted}: got {show_value(item['input'])}; give {describe_allowed(field)}{_nearest_choice(item['input'], field)}"


def _entry_sentence(item: ErrorDetails, entry: str, name: str) -> str:
    """Of the setting ``name`` of an ``entry`` in a list of maps, ``export.0``."""
    if item["type"] == "extra_forbidden":
        return f"{entry}: unknown setting {name!r}"
    if item["type"] == "missing":
        return f"{entry}: {name} is missing"
    if item["type"] == "value_error":
        return f"{entry}.{name}: {item['ctx']['error']}"
    allowed = (
        f"give one of {item['ctx']['expected']}" if item["type"] == "literal_error" else item["msg"]
    )
    return f"{entry}.{name}: got {show_value(item['input'])}; {allowed}"


def _missing_sentence(dotted: str, names: SchemaNames) -> str:
    """Of a group that is missing as a whole: its first setting without a default, which is not
    always the main one. A setting with a few values is asked for by them.
    """
    inner = [
        name
        for name, field in names.fields.items()
        if name.startswith(f"{dotted}.") and field.is_required()
    ]
    main = inner[0] if inner else names.candidates(dotted)[0]
    group, _, leaf = main.rpartition(".")
    # a group's main setting is given under the group's name: data=FILE
    word = group if group and names.candidates(group) == [main] else leaf
    *others, last = [str(choice) for choice in _choices(names.fields[main])] or ["..."]
    values = f"{', '.join(others)} or {last}" if others else last
    return f"{main} is missing; give {word}={values}"


def _first_field(names: SchemaNames, group: str) -> str:
    return next(dotted for dotted in names.fields if dotted.startswith(f"{group}.")).rpartition(
        "."
    )[2]


def _nearest_choice(value: Any, field: FieldInfo) -> str:
    return suggest_nearest(value[:80], _choices(field)) if isinstance(value, str) else ""


def _choices(field: FieldInfo) -> list[Any]:
    return [
        choice
        for kind in union_members(field.annotation)
        if get_origin(kind) is Literal
        for choice in get_args(kind)
    ]
