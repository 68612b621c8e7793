"""The catalogue: every named set by its name, Lorry's own and those of a user's files.

    catalog = open_catalog("rivers.yaml")        # None: Lorry's own alone
    catalog.find_set("google/boolq").name        # "bool_q"
    catalog.expand_suites(["commonsense", "rivers"])

A name means one set, whatever files are added: a set of a user's that has the name or an alias of
another is refused, in any spelling, and the hub id of one never takes a spelling away.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lorry.config.parsing.files import read_description_file
from lorry.data.catalog.named import NamedSet
from lorry.data.catalog.set_file import SHIPPED_SETS, list_set_files, read_set_file
from lorry.errors import ConfigError, suggest_nearest

SHIPPED_SUITES = Path(__file__).parent / "suites.yaml"


@dataclass(frozen=True)
class Catalog:
    """Sets by name, suites of them, and what each set may be called, as `_spelling_key` has it."""

    sets: Mapping[str, NamedSet]
    suites: Mapping[str, tuple[str, ...]]
    spellings: Mapping[str, str]

    def find_set(self, name: str) -> NamedSet:
        """The set of this name, in any spelling (boolq, BoolQ, google/boolq). Raises ConfigError
        listing what exists.
        """
        set_name = self.spellings.get(_spelling_key(name))
        if set_name is None:
            raise self._unknown_set_error(name)
        return self.sets[set_name]

    def expand_suites(self, names: str | Iterable[str]) -> list[str]:
        """Names of sets, with suites spelt out, in order and without repetition. Raises ConfigError
        for an unknown name.
        """
        expanded: dict[str, None] = {}
        for name in [names] if isinstance(names, str) else names:
            expanded.update(
                dict.fromkeys(
                    self.suites[name] if name in self.suites else (self.find_set(name).name,)
                )
            )
        return list(expanded)

    def _unknown_set_error(self, name: str) -> ConfigError:
        if name in self.suites:
            return ConfigError(
                f"{name!r} is a suite, but a single set is needed here; give one of "
                f"{', '.join(self.suites[name])}"
            )
        near = suggest_nearest(name.lower(), [*self.sets, *self.suites])
        return ConfigError(
            f"unknown set {name!r}{near}. Sets: {', '.join(self.sets)}. Suites of them: {', '.join(self.suites)}"
        )

    def with_sets(self, added: Iterable[NamedSet]) -> Catalog:
        """This catalogue and more sets. Raises ConfigError, naming the file, for a name or an alias
        that is taken.
        """
        sets, spellings, added = dict(self.sets), dict(self.spellings), list(added)
        # a set called as a suite could be meant by neither name
        suites = {_spelling_key(name): name for name in self.suites}
        for named_set in added:
            for name in (named_set.name, *named_set.aliases):
                key = _spelling_key(name)
                other = sets.get(spellings.get(key, ""))
                if key in suites or other not in (None, named_set):
                    raise _taken_error(named_set, name, other)
                spellings[key] = named_set.name
                sets[named_set.name] = named_set
        counts = Counter(named_set.hub for named_set in added if named_set.hub)
        for named_set in added:
            # a hub id stands for the set where it is that of no other one
            if named_set.hub and counts[named_set.hub] == 1:
                spellings.setdefault(_spelling_key(named_set.hub), named_set.name)
        return Catalog(sets, self.suites, spellings)


def open_catalog(path: str | None, field: str = "data.catalog") -> Catalog:
    """Lorry's sets and those of ``path``, a YAML file or a folder of such; None: Lorry's alone.
    ``field``: what people call the setting. Raises ConfigError with file:line.

    A user's files are read at every call: a Python session that edits one means the new text.
    """
    if path is None:
        return shipped_catalog()
    place = Path(path).expanduser()
    if not place.exists():
        raise ConfigError(f"{field}={path}: there is no such file or folder")
    return shipped_catalog().with_sets([read_set_file(file) for file in list_set_files(place)])


@cache
def shipped_catalog() -> Catalog:
    """The sets that Lorry brings (``sets/NAME.yaml``) and its suites (``suites.yaml``), read once."""
    suites = read_description_file(SHIPPED_SUITES, "suites by name").values
    # Lorry's own sets go through the same check of names as a user's
    empty = Catalog({}, {name: tuple(sets) for name, sets in suites.items()}, {})
    return empty.with_sets(read_set_file(file) for file in list_set_files(SHIPPED_SETS))


def _spelling_key(name: str) -> str:
    """A name without case and punctuation."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _taken_error(named_set: NamedSet, name: str, other: NamedSet | None) -> ConfigError:
    whose = "a suite" if other is None else f"the set {other.name!r} of {other.file}"
    return ConfigError(
        f"{named_set.file}: the set {named_set.name!r}: {name!r} is already the "
        f"name of {whose}; rename the set"
    )
