"""``lorry VERB --help``: every setting of a verb with its default and its line of help, as plain
text.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lorry.config.parsing.experiments import experiment_names
from lorry.config.parsing.names import schema_names, union_members

INDENT, COLUMN = "  ", 32  # settings are indented, their help starts in this column


def format_help(schema: type[BaseModel], usage: str, line: str) -> str:
    """The whole page, as wide as the terminal (at most 110 columns)."""
    names = schema_names(schema)
    # longer lines are hard to read, however wide the window is
    width = min(shutil.get_terminal_size().columns, 110)
    page = [f"Usage: {usage}", "", f"{INDENT}{line}", ""]
    own = {dotted: field for dotted, field in names.fields.items() if "." not in dotted}
    if own:
        page += ["Settings", *_help_rows(own, width), ""]
    groups = dict(names.groups)
    for other in getattr(schema, "other_tasks", ()):  # a verb that reads another's settings, too
        groups |= {n: g for n, g in schema_names(other).groups.items() if n not in groups}
    for group, inner in groups.items():
        main = getattr(inner, "main", "")
        page.append(
            f"{group}: {inner.__doc__}" + (f" ({group}=X sets {group}.{main})" if main else "")
        )
        page += [*_help_rows(inner.model_fields, width), ""]
    verbs = (schema, *getattr(schema, "other_tasks", ()))
    kinds = dict.fromkeys(getattr(verb, "experiment_kind", "") for verb in verbs)
    if listed := ", ".join(name for kind in kinds if kind for name in experiment_names(kind)):
        text = (
            "experiment=NAME loads the settings of a published experiment; settings "
            f"that you give override them: {listed}"
        )
        page += [*textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False), ""]
    page += [
        "A setting may be written alone (r=8) where its name is unique, with its group (lora.r=8), or as a flag (--lora_r 8).",
        "--dump-config prints the resolved settings as YAML and exits.",
    ]
    return "\n".join(page)


def _help_rows(fields: dict[str, FieldInfo], width: int) -> Iterator[str]:
    for name, field in fields.items():
        head = f"{INDENT}{name}"
        default = shown_default(field)
        choices = [
            str(choice)
            for kind in union_members(field.annotation)
            if get_origin(kind) is Literal
            for choice in get_args(kind)
        ]
        listed = f" ({', '.join(choices)})" if len(choices) > 1 else ""
        text = f"{field.description or ''}{listed} [{default}]"
        # paths and names stay in one piece, to be copied
        lines = textwrap.wrap(text, max(width - COLUMN, 30), break_long_words=False)
        yield f"{head:<{COLUMN - 1}} {lines[0]}"
        yield from (" " * COLUMN + more for more in lines[1:])


def shown_default(field: FieldInfo) -> str:
    """A field's default as one would type it: ``16``, ``null``, ``required``, or words where it
    depends on others.
    """
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "shown" in extra:
        return str(extra["shown"])
    if field.default is PydanticUndefined:
        return "required"
    return {"None": "null", "True": "true", "False": "false", "[]": "none"}.get(
        str(field.default), str(field.default)
    )
