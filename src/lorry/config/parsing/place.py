"""Which setting a name means: ours (``group.key``, a unique leaf, a group's main field), a peer's alias, or an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic.fields import FieldInfo

from lorry.config.parsing.aliases import ELSEWHERE, HOMONYMS, NOT_YET, NOTED, READINGS, RENAMES
from lorry.config.parsing.files import read_scalar
from lorry.config.parsing.names import Names, accepts, show
from lorry.errors import ConfigError, nearest

NULL_WORDS = {"", "~", "null", "Null", "NULL"}


@dataclass(frozen=True)
class Given:
    """A setting as it was given: its name, its value (text if ``typed`` on the command line), and where it stands.

    ``inner``: where the parts of a list of maps stand, by ``0.r`` or ``0.lora.r``.
    """

    key: str
    value: Any
    where: str
    typed: bool = False
    inner: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Placed:
    """A setting with its place in the schema: ``lora.r``, ``output_dir``, or a whole group (null, or an empty map)."""

    dotted: str
    value: Any
    given: Given
    part: str = ""  # of a setting that is a map, the one entry that is given: ``data.local.NAME``


def place(names: Names, given: Given, notes: list[str]) -> list[Placed]:
    """Find the settings that are meant: one, several for ``lora={r: 8, ...}``, none for a harmless word of a peer.

    Raises ConfigError on a name that is ambiguous, not supported yet or unknown.
    """
    if given.key in names.groups:
        value = _group_value(given)
        if isinstance(value, dict) and value:
            inner = [replace(given, key=f"{given.key}.{key}", value=each, typed=False) for key, each in value.items()]
            return [placed for each in inner for placed in place(names, each, notes)]
        if value is None or value == {}:
            return [Placed(given.key, value, given)]
    candidates = names.candidates(given.key)
    if _is_homonym(given, notes):
        return []
    if len(candidates) == 1:
        return [_at(names, candidates[0], given)]
    if candidates:
        raise ConfigError(f"{given.where}: {given.key!r} is ambiguous; write one of: {', '.join(candidates)}")
    if entry := _entry(names, given):
        return [entry]
    if given.key in names.groups:
        example = next(dotted for dotted in names.fields if dotted.startswith(f"{given.key}."))
        raise ConfigError(f"{given.where}: {given.key!r} is a group; set one of its settings, such as {example}")
    return _place_alias(names, given, notes)


def _entry(names: Names, given: Given) -> Placed | None:
    """One entry of a setting that is a map, ``data.local.NAME=path``: the shortest beginning that is such a setting."""
    parts = given.key.split(".")
    for cut in range(1, len(parts)):
        found = names.candidates(".".join(parts[:cut]))
        if len(found) == 1 and accepts(names.fields[found[0]], dict):
            value, name = _typed(given.value) if given.typed else given.value, ".".join(parts[cut:])
            return Placed(found[0], {name: given.value if isinstance(value, str) else value}, given, name)
    return None


def _group_value(given: Given) -> Any:
    """A group's map or null; text of any other kind is left for its main field."""
    if not given.typed or not isinstance(given.value, str):
        return given.value
    text = given.value.strip()
    if text in NULL_WORDS:
        return None
    if not text.startswith("{"):
        return text
    return _typed(given.value)


def _typed(text: str) -> Any:
    try:
        return read_scalar(text)
    except ValueError:
        return text


def _at(names: Names, dotted: str, given: Given) -> Placed:
    """Read what was typed as the kind of value its field takes; a value from YAML or Python has its kind already."""
    value = typed_value(given.value, names.fields[dotted]) if given.typed else given.value
    return Placed(dotted, value, given)


def typed_value(text: str, field: FieldInfo) -> Any:
    """``"8"`` for a number is 8, for a text field ``"8"``; a list may be written ``[a, b]`` or ``a,b``."""
    value = _typed(text)
    if isinstance(value, str) or (value is None and text.strip() not in NULL_WORDS):
        value = value if text[:1] in ("'", '"') else text  # YAML would drop what follows ' #' and read anchors
    if accepts(field, type(value)):
        return value
    if accepts(field, str):
        return text
    if accepts(field, list) and value is not None:
        return [_typed(part) for part in text.split(",")]
    return value


def _place_alias(names: Names, given: Given, notes: list[str]) -> list[Placed]:
    word = _peer_word(names, given.key)
    if word in READINGS:
        value = _typed(given.value) if given.typed else given.value
        try:
            reading = READINGS[word](value)
        except ValueError as error:
            raise ConfigError(f"{given.where}: {given.key} {error}") from None
        if reading is None:
            notes.append(f"{_said(given.key, value)} changes nothing")
            return []
        several = reading if isinstance(reading, list) else [reading]
        found = [(target, meant) for dotted, meant in several if (target := _target(names, given.key, dotted))]
        if found:
            notes.append(f"{_said(given.key, value)} is read as {' '.join(_said(*pair) for pair in found)}")
            return [Placed(target, meant, given) for target, meant in found]
    if word in RENAMES and (target := _target(names, given.key, RENAMES[word])):
        if given.value is None and not accepts(names.fields[target], type(None)):
            return []  # axolotl's files list every name they know, most of them empty
        notes.append(f"{given.key} is read as {target}")
        return [_at(names, target, given)]
    if word in NOTED:
        if given.value is None:
            return []
        notes.append(f"{given.key} changes nothing: {NOTED[word]}")
        return []
    if word in NOT_YET:
        value = _typed(given.value) if given.typed else given.value
        if value in NOT_YET[word]:
            if word in ("optim", "optimizer") and value != "adamw":
                notes.append(f"{_said(given.key, value)} changes nothing: the optimizer is AdamW, its moments in float32")
            elif value is False:
                notes.append(f"{_said(given.key, value)} changes nothing: it is off here, too")
            elif value not in (None, [], {}):  # another tool's file lists names that it leaves empty
                notes.append(f"{_said(given.key, value)} changes nothing: Lorry does so anyway")
            return []
        raise ConfigError(f"{given.where}: {_said(given.key, value)} is not supported yet")
    if word in ELSEWHERE:
        raise ConfigError(f"{given.where}: {given.key!r} is a setting of {ELSEWHERE[word]}")
    raise unknown(names, given.key, given.where)


def _is_homonym(given: Given, notes: list[str]) -> bool:
    """Whether a name of ours has a peer's meaning here; that it changes nothing is told then."""
    theirs, why = HOMONYMS.get(given.key, (None, ""))
    if theirs is None or not theirs(given.value):
        return False
    notes.append(f"{_said(given.key, given.value)} changes nothing: it {why}")
    return True


def _peer_word(names: Names, key: str) -> str:
    """``rank`` of ``lora.rank``: peers' names are understood inside our groups, too."""
    group, _, leaf = key.rpartition(".")
    return leaf if group in names.groups else key


def _target(names: Names, key: str, dotted: str) -> str | None:
    """Our setting behind an alias, where this schema has it and the group before the alias, if any, is its own."""
    group, _, leaf = dotted.rpartition(".")
    if "." in key and key.rpartition(".")[0] != group:
        return None
    return dotted if dotted in names.fields else leaf if leaf in names.fields else None


def field_of(names: Names, key: str) -> FieldInfo | None:
    """The field a flag ``--key`` sets, under our name or a peer's; None where there is no single one."""
    found = names.candidates(key)
    if not found and (word := _peer_word(names, key)) in RENAMES:
        target = _target(names, key, RENAMES[word])
        found = [target] if target else []
    return names.fields[found[0]] if len(found) == 1 else None


def is_known(names: Names, key: str) -> bool:
    """Whether a name means anything: ours, even if ambiguous or a group, or a peer's."""
    word = _peer_word(names, key)
    ours = key in names.groups or bool(names.candidates(key)) or _entry(names, Given(key, "", "")) is not None
    return ours or any(word in table for table in (RENAMES, READINGS, NOTED, NOT_YET, ELSEWHERE))


def unknown(names: Names, key: str, where: str) -> ConfigError:
    """The error for a name that means nothing, with the nearest that does."""
    return ConfigError(f"{where}: unknown setting {key[:80]!r}{_suggestion(names, key)}")


def _suggestion(names: Names, key: str) -> str:
    """`` (did you mean 'lora.r'?)``: the same leaf in another group, else the nearest of our names, else of peers' names."""
    leaf = key.rpartition(".")[2]
    if leaf != key and leaf in names.leaves:
        return f" (did you mean {names.leaves[leaf][0]!r}?)"
    known = [*names.leaves, *names.fields, *names.groups]
    peers = [word for word in (*RENAMES, *READINGS) if word not in RENAMES or _target(names, word, RENAMES[word])]
    return nearest(key[:80], known) or nearest(key[:80], peers)


def _said(key: str, value: Any) -> str:
    return f"{key}={show(value).strip(chr(39))}"


def typed_list(text: str) -> list[Any]:
    """``8,16`` and ``[8, 16]`` as lists of what their parts are."""
    value = _typed(text) if text.startswith("[") else [_typed(part) for part in text.split(",")]
    return value if isinstance(value, list) else [value]
