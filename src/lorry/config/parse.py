"""From what a person typed or wrote to one checked, frozen description; and back to YAML.

Sources, later over earlier: CONFIG.yaml, then ``key=value`` and ``--key value`` in their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lorry.config.argv import read_argv
from lorry.config.explain import explain
from lorry.config.files import read_file, write_yaml
from lorry.config.names import names_of
from lorry.config.place import Given, Placed, place
from lorry.errors import ConfigError

Schema = TypeVar("Schema", bound=BaseModel)


def parse(schema: type[Schema], argv: Sequence[str], notes: list[str]) -> Schema:
    """Read ``[CONFIG.yaml] [WORD ...] [key=value ...]`` into ``schema``; peers' names that were understood are told in ``notes``.

    Raises ConfigError: an unknown or ambiguous name, a value that is not allowed, settings that exclude each other, a bad file.
    """
    config, settings = read_argv(schema, argv)
    return _settle(schema, [_from_file(schema, config), settings] if config else [settings], notes)


def build(schema: type[Schema], settings: Mapping[str, Any], notes: list[str]) -> Schema:
    """The same from Python values, as keyword arguments give them: ``build(Run, {"data": "f.jsonl", "r": 8}, notes)``."""
    plain = {
        key: value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value for key, value in settings.items()
    }
    return _settle(schema, [[given for key, value in plain.items() for given in _spread(schema, key, value)]], notes)


def dump(settings: BaseModel) -> str:
    """YAML text that ``parse`` reads back to an equal description."""
    return write_yaml(settings.model_dump(mode="json"))


def _from_file(schema: type[BaseModel], path: Path) -> list[Given]:
    described = read_file(path)
    settings = [(key, given) for key, value in described.values.items() for given in _spread(schema, key, value)]
    lines = [described.lines.get(given.key, described.lines.get(key)) for key, given in settings]
    return [
        Given(given.key, given.value, f"{path}:{line}" if line else str(path))
        for (_, given), line in zip(settings, lines, strict=True)
    ]


def _spread(schema: type[BaseModel], key: str, value: Any) -> list[Given]:
    """One setting per field of a group that is given as a map."""
    if key in names_of(schema).groups and isinstance(value, Mapping) and value:
        return [Given(f"{key}.{inner}", each, f"{key}.{inner}") for inner, each in value.items()]
    return [Given(key, value, key)]


def _settle(schema: type[Schema], sources: Iterable[Iterable[Given]], notes: list[str]) -> Schema:
    """Place every setting, lay later ones over earlier ones, validate."""
    names = names_of(schema)
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source in sources:
        spelled: dict[str, str] = {}
        for placed in (each for given in source for each in place(names, given, notes)):
            _refuse_second_name(spelled.setdefault(placed.dotted, placed.given.key), placed)
            _lay(tree, placed)
            origins[placed.dotted] = placed.given.where
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, names, origins)) from None


def _refuse_second_name(first: str, placed: Placed) -> None:
    """Two names for one setting in one source leave open which value is meant; the same name again overrides."""
    if first != placed.given.key:
        raise ConfigError(f"{placed.given.where}: {first} and {placed.given.key} both set {placed.dotted}; keep one")


def _lay(tree: dict[str, Any], placed: Placed) -> None:
    group, _, leaf = placed.dotted.rpartition(".")
    if group:
        tree[group] = {**(tree.get(group) or {}), leaf: placed.value}
    else:
        tree[leaf] = placed.value
