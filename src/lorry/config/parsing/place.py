"""Which setting a name means: ours (``group.key``, a unique leaf, a group's main field), a peer's
alias, or an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic.fields import FieldInfo

from lorry.config.left_out import explain_setting
from lorry.config.parsing.aliases import (
    ALIAS_READERS,
    ALIAS_RENAMES,
    HOMONYMS,
    IGNORED_ALIASES,
    NEAREST_SETTINGS,
    OTHER_VERB_SETTINGS,
    UNSUPPORTED_ALIASES,
)
from lorry.config.parsing.files import read_scalar
from lorry.config.parsing.names import SchemaNames, accepts_type, show_value
from lorry.errors import ConfigError, suggest_nearest
from lorry.notes import NoteCallback

# those of YAML's core schema; "None" is text, and refused as such
NULL_WORDS = {"", "~", "null", "Null", "NULL"}


@dataclass(frozen=True)
class GivenSetting:
    """A setting as it was given: its name, its value (text if ``typed`` on the command line), and
    where it stands.

    ``inner``: where the parts of a list of maps stand, by ``0.r`` or ``0.lora.r``.
    """

    key: str
    value: Any
    where: str
    typed: bool = False
    inner: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PlacedSetting:
    """A setting with its place in the schema: ``lora.r``, ``output_dir``, or a whole group (null,
    or an empty map).
    """

    dotted: str
    value: Any
    setting: GivenSetting
    part: str = ""  # of a setting that is a map, the one entry that is given: ``data.local.NAME``


def place_setting(
    names: SchemaNames, setting: GivenSetting, add_note: NoteCallback
) -> list[PlacedSetting]:
    """Find the settings that are meant: one, several for ``lora={r: 8, ...}``, none for a harmless
    word of a peer.

    Raises ConfigError on a name that is ambiguous, not supported yet, left out or unknown.
    """
    if setting.key in names.groups:
        value = _group_value(setting)
        if isinstance(value, dict) and value:
            inner = [
                replace(setting, key=f"{setting.key}.{key}", value=each, typed=False)
                for key, each in value.items()
            ]
            return [placed for each in inner for placed in place_setting(names, each, add_note)]
        if value is None or value == {}:
            return [PlacedSetting(setting.key, value, setting)]
    _refuse_left_out(names, setting)
    candidates = names.candidates(setting.key)
    # before our own reading: adapter: lora in an axolotl file names no directory
    if _is_homonym(setting, add_note):
        return []
    if len(candidates) == 1:
        return [_place_field(names, candidates[0], setting)]
    if candidates:
        raise ConfigError(
            f"{setting.where}: {setting.key!r} is ambiguous; write one of: {', '.join(candidates)}"
        )
    if entry := _place_map_entry(names, setting):
        return [entry]
    if setting.key in names.groups:
        example = next(dotted for dotted in names.fields if dotted.startswith(f"{setting.key}."))
        raise ConfigError(
            f"{setting.where}: {setting.key!r} is a group; set one of its settings, such as {example}"
        )
    return _place_alias(names, setting, add_note)


def _place_map_entry(names: SchemaNames, setting: GivenSetting) -> PlacedSetting | None:
    """One entry of a setting that is a map, ``data.local.NAME=path``: the shortest beginning that
    is such a setting.
    """
    parts = setting.key.split(".")
    # an entry may hold dots (local.NAME.train), so where the setting ends is found by trying
    for cut in range(1, len(parts)):
        fields = names.candidates(".".join(parts[:cut]))
        if len(fields) == 1 and accepts_type(names.fields[fields[0]], dict):
            value, name = (
                _read_typed(setting.value) if setting.typed else setting.value,
                ".".join(parts[cut:]),
            )
            return PlacedSetting(
                fields[0], {name: setting.value if isinstance(value, str) else value}, setting, name
            )
    return None


def _group_value(setting: GivenSetting) -> Any:
    """A group's map or null; text of any other kind is left for its main field."""
    if not setting.typed or not isinstance(setting.value, str):
        return setting.value
    text = setting.value.strip()
    if text in NULL_WORDS:
        return None
    if not text.startswith("{"):
        return text
    return _read_typed(setting.value)


def _read_typed(text: str) -> Any:
    try:
        return read_scalar(text)
    except ValueError:
        return text


def _place_field(names: SchemaNames, dotted: str, setting: GivenSetting) -> PlacedSetting:
    """Read what was typed as the kind of value its field takes; a value from YAML or Python has its
    kind already.
    """
    value = (
        parse_typed_value(setting.value, names.fields[dotted]) if setting.typed else setting.value
    )
    return PlacedSetting(dotted, value, setting)


def parse_typed_value(text: str, field: FieldInfo) -> Any:
    """``"8"`` for a number is 8, for a text field ``"8"``; a list may be written ``[a, b]`` or
    ``a,b``.
    """
    value = _read_typed(text)
    if isinstance(value, str) or (value is None and text.strip() not in NULL_WORDS):
        # YAML would drop what follows ' #' and read anchors
        # quotes are how one says that 8 is a text, so YAML's reading stands there
        value = value if text[:1] in ("'", '"') else text
    if accepts_type(field, type(value)):
        return value
    # after the exact kind: r=8 for a field of number or text is the number
    if accepts_type(field, str):
        return text
    if accepts_type(field, list) and value is not None:
        return [_read_typed(part) for part in text.split(",")]
    return value


def _place_alias(
    names: SchemaNames, setting: GivenSetting, add_note: NoteCallback
) -> list[PlacedSetting]:
    word = _peer_word(names, setting.key)
    if word in ALIAS_READERS:
        value = _read_typed(setting.value) if setting.typed else setting.value
        try:
            reading = ALIAS_READERS[word](value)
        except ValueError as error:
            raise ConfigError(f"{setting.where}: {setting.key} {error}") from None
        if reading is None:
            add_note(f"{_quote_setting(setting.key, value)} changes nothing")
            return []
        readings = reading if isinstance(reading, list) else [reading]
        settings = [
            (target, meant)
            for dotted, meant in readings
            if (target := _alias_target(names, setting.key, dotted))
        ]
        if settings:
            add_note(
                f"{_quote_setting(setting.key, value)} is read as {' '.join(_quote_setting(*pair) for pair in settings)}"
            )
            return [PlacedSetting(target, meant, setting) for target, meant in settings]
    if word in ALIAS_RENAMES and (target := _alias_target(names, setting.key, ALIAS_RENAMES[word])):
        if setting.value is None and not accepts_type(names.fields[target], type(None)):
            return []  # axolotl's files list every name they know, most of them empty
        extra = names.fields[target].json_schema_extra
        # `experts` of `lorry moe`: how we write it ourselves, so there is nothing to tell
        if not (isinstance(extra, dict) and extra.get("own_word") == word):
            add_note(f"{setting.key} is read as {target}")
        return [_place_field(names, target, setting)]
    if word in IGNORED_ALIASES:
        if setting.value is None:
            return []
        # told, since the person may have counted on it
        add_note(f"{setting.key} changes nothing: {IGNORED_ALIASES[word]}")
        return []
    if word in UNSUPPORTED_ALIASES:
        value = _read_typed(setting.value) if setting.typed else setting.value
        # a value that asks for what happens anyway is no reason to refuse a whole file
        if value in UNSUPPORTED_ALIASES[word]:
            if word in ("optim", "optimizer") and value != "adamw":
                add_note(
                    f"{_quote_setting(setting.key, value)} changes nothing: the optimizer is AdamW, its moments in float32"
                )
            elif value is False:
                add_note(
                    f"{_quote_setting(setting.key, value)} changes nothing: it is off in Lorry too"
                )
            elif value not in (
                None,
                [],
                {},
            ):  # another tool's file lists names that it leaves empty
                add_note(
                    f"{_quote_setting(setting.key, value)} changes nothing: Lorry does so anyway"
                )
            return []
        nearest = f"; nearest: {NEAREST_SETTINGS[word]}" if word in NEAREST_SETTINGS else ""
        raise ConfigError(f"{_place_of(setting, value)} is not supported yet{nearest}")
    if word in OTHER_VERB_SETTINGS:
        raise ConfigError(
            f"{setting.where}: {setting.key!r} is a setting of {OTHER_VERB_SETTINGS[word]}"
        )
    raise unknown_setting_error(names, setting.key, setting.where)


def _refuse_left_out(names: SchemaNames, setting: GivenSetting) -> None:
    """Raises ConfigError for a method that is known and left out, whichever way it is asked for."""
    value = _read_typed(setting.value) if setting.typed else setting.value
    if method := explain_setting(_peer_word(names, setting.key), value):
        raise ConfigError(f"{_place_of(setting, value)}: {method}")


def _place_of(setting: GivenSetting, value: Any) -> str:
    """A setting and where it stands; a word of the command line is where it stands."""
    quoted = _quote_setting(setting.key, value)
    return quoted if setting.where == quoted else f"{setting.where}: {quoted}"


def _is_homonym(setting: GivenSetting, add_note: NoteCallback) -> bool:
    """Whether a name of ours has a peer's meaning here; that it changes nothing is told then."""
    theirs, why = HOMONYMS.get(setting.key, (None, ""))
    if theirs is None or not theirs(setting.value):
        return False
    add_note(f"{_quote_setting(setting.key, setting.value)} changes nothing: it {why}")
    return True


def _peer_word(names: SchemaNames, key: str) -> str:
    """``rank`` of ``lora.rank``: peers' names are understood inside our groups, too."""
    group, _, leaf = key.rpartition(".")
    return leaf if group in names.groups else key


def _alias_target(names: SchemaNames, key: str, dotted: str) -> str | None:
    """Our setting behind an alias, where this schema has it and the group before the alias, if any,
    is its own.
    """
    group, _, leaf = dotted.rpartition(".")
    if "." in key and key.rpartition(".")[0] != group:
        return None
    return dotted if dotted in names.fields else leaf if leaf in names.fields else None


def flag_field(names: SchemaNames, key: str) -> FieldInfo | None:
    """The field a flag ``--key`` sets, under our name or a peer's; None where there is no single
    one.
    """
    fields = names.candidates(key)
    if not fields and (word := _peer_word(names, key)) in ALIAS_RENAMES:
        target = _alias_target(names, key, ALIAS_RENAMES[word])
        fields = [target] if target else []
    return names.fields[fields[0]] if len(fields) == 1 else None


def is_known_setting(names: SchemaNames, key: str) -> bool:
    """Whether a name means anything: ours, even if ambiguous or a group, or a peer's."""
    word = _peer_word(names, key)
    ours = (
        key in names.groups
        or bool(names.candidates(key))
        or _place_map_entry(names, GivenSetting(key, "", "")) is not None
    )
    return ours or any(
        word in table
        for table in (
            ALIAS_RENAMES,
            ALIAS_READERS,
            IGNORED_ALIASES,
            UNSUPPORTED_ALIASES,
            OTHER_VERB_SETTINGS,
        )
    )


def unknown_setting_error(names: SchemaNames, key: str, where: str) -> ConfigError:
    """The error for a name that means nothing, with the nearest that does."""
    return ConfigError(f"{where}: unknown setting {key[:80]!r}{_suggest_setting(names, key)}")


def _suggest_setting(names: SchemaNames, key: str) -> str:
    """`` (did you mean 'lora.r'?)``: the same leaf in another group, else the nearest of our names,
    else of peers' names.
    """
    leaf = key.rpartition(".")[2]
    if leaf != key and leaf in names.leaves:
        return f" (did you mean {names.leaves[leaf][0]!r}?)"
    known = [*names.leaves, *names.fields, *names.groups]
    peers = [
        word
        for word in (*ALIAS_RENAMES, *ALIAS_READERS)
        if word not in ALIAS_RENAMES or _alias_target(names, word, ALIAS_RENAMES[word])
    ]
    # ours first: with lr-like words in both tables the nearer one should be a name that stays
    return suggest_nearest(key[:80], known) or suggest_nearest(key[:80], peers)


def _quote_setting(key: str, value: Any) -> str:
    return f"{key}={show_value(value).strip(chr(39))}"


def parse_typed_list(text: str) -> list[Any]:
    """``8,16`` and ``[8, 16]`` as lists of what their parts are."""
    value = (
        _read_typed(text)
        if text.startswith("[")
        else [_read_typed(part) for part in text.split(",")]
    )
    return value if isinstance(value, list) else [value]
