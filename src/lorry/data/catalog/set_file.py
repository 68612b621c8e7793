"""A named set from its YAML file, checked to the last key.

    read_set_file(Path("rivers.yaml")).named_set.item(row)

One file is one set. ``include: NAME`` begins with what ``NAME.yaml`` beside the file says, or else
the shipped set of this name, and replaces whole keys of it, as in the lm-evaluation-harness; a file
whose name begins with ``_`` is there to be included only. A file is data: it names row readers
(`row_readers.py`) and metrics, never code.

Everything a set gets wrong is said when its file is read, with file:line, before any row or model
is: an unknown key or reader, a setting that the reader does not take, a column that it reads but
the layout does not need, a slot of a template that no layout fills (its paragraph would be left out
of every prompt in silence).
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    model_validator,
)

from lorry.config.parsing.files import DescriptionFile, read_description_file
from lorry.data.catalog.item import option_slots, template_slots
from lorry.data.catalog.layouts import ColumnLayout
from lorry.data.catalog.named import NamedSet
from lorry.data.catalog.row_readers import ROW_READERS
from lorry.data.reading.sources import HUB_NAME, SPLITS
from lorry.errors import ConfigError, suggest_nearest

SHIPPED_SETS = Path(__file__).parent / "sets"
SET_FILE_SUFFIXES = (".yaml", ".yml")
MOST_INCLUDES = 8  # files one inside the other; deeper ones are a mistake
_OPTION_SLOTS = tuple(option_slots(["a", "b"]))  # options, lettered, listed
RANKED_METRIC = "accuracy"  # of sets whose options are ranked, and of no others


def _column_group(text: str) -> str:
    """``"answer|answers"``: column names, none empty."""
    if not all(part.strip() for part in text.removesuffix("?").split("|")):
        raise ValueError(f"{text!r} names an empty column; write column or column|other")
    return text


def _identifier(text: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", text):
        raise ValueError(
            f"{text!r} may hold lower-case letters, digits and _, and has to begin with a letter"
        )
    return text


def _set_name(text: str) -> str:
    # it becomes part of settings (data.local.NAME) and of metrics (eval_NAME_accuracy)
    if not re.fullmatch(r"[a-z0-9][a-z0-9_]*", text):
        raise ValueError(f"{text!r} may hold only lower-case letters, digits and _")
    return text


def _alias(text: str) -> str:
    if not re.search(r"[a-zA-Z0-9]", text):
        raise ValueError(f"{text!r} has to hold a letter or a digit")
    return text


def _no_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is blank")
    return text


Columns = Annotated[str, AfterValidator(_column_group)]
Text = Annotated[str, AfterValidator(_no_blank)]
SlotName = Annotated[str, AfterValidator(_identifier)]


class _StrictModel(BaseModel):
    """No unknown key, no conversion: ``max_new_tokens: "16"`` is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class LayoutFields(_StrictModel):
    """A layout of a set's file. ``needs``: the columns that tell it apart, ``a|b`` for one of two;
    ``reader``: a name of ROW_READERS; the others: the reader's settings.
    """

    name: Text
    needs: list[Columns] = Field(min_length=1)
    reader: str
    slots: dict[SlotName, Columns] = Field({}, min_length=1)
    answers: Columns | None = None
    choices: Columns | None = None
    choice_columns: list[Text] | None = Field(None, min_length=2)
    label: Columns | None = None
    first_label: int | None = None
    options: list[Text] | None = Field(None, min_length=2)

    @model_validator(mode="after")
    def _fits_its_reader(self) -> LayoutFields:
        if self.reader not in ROW_READERS:
            near = suggest_nearest(self.reader, ROW_READERS)
            raise ValueError(f"no reader {self.reader!r}{near}; there are {', '.join(ROW_READERS)}")
        reader, settings = ROW_READERS[self.reader], self.settings()
        if missing := [name for name in reader.required if name not in settings]:
            raise ValueError(f"the reader {self.reader} needs {missing[0]!r}")
        takes = (*reader.required, *reader.optional)
        if odd := [name for name in settings if name not in takes]:
            has = f"it takes {', '.join(takes)}" if takes else "it has fixed columns"
            raise ValueError(f"the reader {self.reader} does not take {odd[0]!r}; {has}")
        if odd := [name for name in self.slots if name in _OPTION_SLOTS]:
            raise ValueError(f"the slot {odd[0]!r} is built from the options; rename it")
        if self.reader == "llm_adapters" and len(self.slots) != 1:
            raise ValueError("the reader llm_adapters fills exactly one slot")
        if self.options and len(set(self.options)) != len(self.options):
            raise ValueError("two options are the same")
        needs = [set(group.split("|")) for group in self.needs]
        for name in reader.columns:
            held = settings.get(name)
            for columns in [held] if isinstance(held, str) else held or ():
                if not any(group <= set(columns.split("|")) for group in needs):
                    raise ValueError(
                        f"{name} reads {columns!r}, which has to be named in needs "
                        "too, since a row may lack it"
                    )
        return self

    def settings(self) -> dict[str, Any]:
        """The reader's settings that were given, by name."""
        fixed = ("name", "needs", "reader")
        settings = self.model_dump(exclude=set(fixed), exclude_unset=True)
        return {name: value for name, value in settings.items() if value is not None}

    def layout(self) -> ColumnLayout:
        """The layout that reads rows."""
        return ColumnLayout(
            self.name,
            tuple(tuple(group.split("|")) for group in self.needs),
            ROW_READERS[self.reader].make(**self.settings()),
        )


class LimitFields(_StrictModel):
    """Which slot loses its end beyond how many characters."""

    slot: SlotName
    characters: PositiveInt


class SetFields(_StrictModel):
    """A set's file. What each key means: `NamedSet`, whose fields they become; ``aliases`` are
    other names that it is found by.
    """

    name: Annotated[str, AfterValidator(_set_name)]
    about: Text
    hub: Text | None = None
    config: Text | None = None
    splits: dict[str, Text] | None = None
    converted: Text | None = None
    layouts: list[LayoutFields] = Field(min_length=1)
    templates: list[Text] = Field(min_length=1)
    metrics: list[str] = Field(min_length=1)
    max_new_tokens: PositiveInt
    cue: str = "Answer:"
    limit: LimitFields | None = None
    licence: Text = "not stated"
    source: str = ""
    aliases: list[Annotated[str, AfterValidator(_alias)]] = []

    @model_validator(mode="after")
    def _lies_somewhere(self) -> SetFields:
        if self.hub is not None and not HUB_NAME.fullmatch(self.hub):
            raise ValueError(f"hub: {self.hub!r} is not a hub id, such as google/boolq")
        known = (*SPLITS, "shots")
        if odd := [name for name in self.splits or {} if name not in known]:
            near = suggest_nearest(odd[0], known)
            raise ValueError(f"splits: no split {odd[0]!r}{near}; they are {', '.join(known)}")
        for name in ("config", "splits", "converted"):
            if self.hub is None and getattr(self, name) is not None:
                raise ValueError(f"{name}: is only for a set on the hub, and hub is not given")
        if self.hub is not None and not self.splits:
            raise ValueError("splits: missing; which of the hub's splits are train and test?")
        return self

    @model_validator(mode="after")
    def _is_asked_as_it_is_read(self) -> SetFields:
        for field, names in (
            ("layouts", [layout.name for layout in self.layouts]),
            ("templates", self.templates),
            ("metrics", self.metrics),
        ):
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{field}: {twice[0]!r} is given twice")
        readers = [ROW_READERS[layout.reader] for layout in self.layouts]
        if len({reader.ranked for reader in readers}) > 1:
            raise ValueError("layouts: some have options and some do not; split them into two sets")
        ranked = readers[0].ranked
        if ranked != (self.metrics == [RANKED_METRIC]):
            raise ValueError(
                f"metrics: a set with options is measured by {RANKED_METRIC} only"
                if ranked
                else f"metrics: {RANKED_METRIC} needs options, and no layout reads any"
            )
        slots = {
            slot
            for layout, reader in zip(self.layouts, readers, strict=True)
            for slot in (*layout.slots, *reader.slots)
        }
        if self.limit is not None and self.limit.slot not in slots:
            raise ValueError(f"limit: no layout fills the slot {self.limit.slot!r}")
        for template in self.templates:
            _check_template(template, [*sorted(slots), *(_OPTION_SLOTS if ranked else ())])
        return self

    def named_set(self, file: Path) -> NamedSet:
        """The set, as the rest of the package knows it."""
        return NamedSet(
            name=self.name,
            about=self.about,
            hub=self.hub,
            layouts=tuple(layout.layout() for layout in self.layouts),
            templates=tuple(self.templates),
            metrics=tuple(self.metrics),
            max_new_tokens=self.max_new_tokens,
            licence=self.licence,
            source=self.source,
            config=self.config,
            splits=self.splits,
            converted=self.converted,
            cue=self.cue,
            limit=None if self.limit is None else (self.limit.slot, self.limit.characters),
            aliases=tuple(self.aliases),
            file=file,
        )


def _check_template(template: str, slots: Sequence[str]) -> None:
    """Raises ValueError for anything in braces but a slot by its name."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"templates: {template[:60]!r}: {error}; {{{{ writes a brace") from None
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if name not in slots or spec or conversion:
            shown = (
                f"{{{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}}}"
            )
            near = suggest_nearest(name, slots)
            raise ValueError(
                f"templates: {shown} in {template[:60]!r} is not a slot that a "
                f"layout fills{near}; there are {', '.join(slots)}"
            )
    if not template_slots(template):
        raise ValueError(
            f"templates: {template[:60]!r} has no slot, so every row would be the same question"
        )


@dataclass(frozen=True)
class _MergedFile:
    """What a file and those it includes say, and where (``path:line``) each key stands."""

    values: dict[str, Any]
    origins: dict[str, str]


def read_set_file(path: Path) -> NamedSet:
    """The set of a file. Raises ConfigError, a line for each thing that is wrong."""
    merged = _read_merged(path, ())
    try:
        return SetFields.model_validate(merged.values).named_set(path)
    except ValidationError as error:
        # a key that is spelt wrong first: that another one is missing follows from it
        paths = sorted(
            error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden"
        )
        lines = [_explain(item, merged, path) for item in paths]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def list_set_files(path: Path) -> list[Path]:
    """The files of sets at ``path``: itself, or those in a folder by name, without ``_NAME.yaml``.
    Raises ConfigError where there are none.
    """
    try:
        if not path.is_dir():
            return [path]
        inside = sorted(entry for entry in path.iterdir() if entry.suffix in SET_FILE_SUFFIXES)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    set_files = [entry for entry in inside if not entry.name.startswith("_")]
    if not set_files:
        raise ConfigError(f"{path}: the folder holds no named set (a file NAME.yaml)")
    return set_files


def _read_merged(path: Path, within: tuple[Path, ...]) -> _MergedFile:
    """``within``: the files that include this one, outermost first."""
    described = _read_keys(path)
    origins = {key: f"{path}:{line}" for key, line in described.lines.items()}
    values = {key: value for key, value in described.values.items() if key != "include"}
    name = described.values.get("include")
    if name is None:
        return _MergedFile(values, origins)
    where = origins["include"]
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise ConfigError(f"{where}: include: got {name!r}; give the name of a set or _file")
    base = _find_included(name, path, where)
    if base in (path, *within) or len(within) >= MOST_INCLUDES:
        raise ConfigError(f"{where}: include: {name!r} includes this file again")
    below = _read_merged(base, (*within, path))
    # aliases are of the one set: two sets cannot be called alike
    shared_keys = {key: value for key, value in below.values.items() if key != "aliases"}
    inherited = {k: at for k, at in below.origins.items() if k.partition(".")[0] not in values}
    return _MergedFile({**shared_keys, **values}, {**inherited, **origins})


def _read_keys(path: Path) -> DescriptionFile:
    if path.parent == SHIPPED_SETS:
        return _read_shipped_keys(path)
    return read_description_file(path, "a named set is a map of keys, such as 'name: rivers'")


@cache
def _read_shipped_keys(path: Path) -> DescriptionFile:
    # twenty sets of LongBench begin with the same files, and YAML is slow to read
    return read_description_file(path)


def _find_included(name: str, path: Path, where: str) -> Path:
    folders = dict.fromkeys((path.parent, SHIPPED_SETS))
    for file in (folder / f"{name}{end}" for folder in folders for end in SET_FILE_SUFFIXES):
        # a set may build on the shipped one of its own file's name
        if file.exists() and file != path:
            return file
    known = [file.stem for folder in folders for file in sorted(folder.glob("*.yaml"))]
    raise ConfigError(f"{where}: include: no set {name!r} here or among Lorry's{suggest_nearest(name, known)}")  # fmt: skip


def _explain(item: Any, merged: _MergedFile, path: Path) -> str:
    """``file:line: key: what is wrong``, of the deepest key of the error that has a line."""
    keys = [str(part) for part in item["loc"]]
    below = [".".join(keys[:end]) for end in range(len(keys), 0, -1)]
    # a check of the whole set says which key it means
    message = str(item["ctx"]["error"]) if item["type"] == "value_error" else item["msg"]
    if not keys and (named := message.partition(":")[0]) in merged.origins:
        below = [named]
    where = next((merged.origins[key] for key in below if key in merged.origins), str(path))
    dotted = f"{'.'.join(keys)}: " if keys else ""
    if item["type"] == "missing":
        return f"{where}: {dotted}is missing"
    if item["type"] == "extra_forbidden":
        known = {
            "layouts": [*LayoutFields.model_fields],
            "limit": [*LimitFields.model_fields],
        }.get(keys[0], [*SetFields.model_fields, "include"])
        return f"{where}: {dotted}no such key{suggest_nearest(keys[-1], known)}; there are {', '.join(known)}"  # fmt: skip
    if item["type"] != "value_error":
        message = f"got {_shown(item['input'])}; {message[:1].lower()}{message[1:]}"
    return f"{where}: {dotted}{message}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
