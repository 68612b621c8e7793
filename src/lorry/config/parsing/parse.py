"""From what a person typed or wrote to one checked, frozen description; and back to YAML.

Sources, later over earlier: CONFIG.yaml, then ``key=value`` and ``--key value`` in their order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lorry.config.jobs import EXPANDED, Own, differences, is_axis, items_of, lay, own_settings
from lorry.config.parsing.argv import read_argv
from lorry.config.parsing.explain import explain
from lorry.config.parsing.files import Described, read_file, write_yaml
from lorry.config.parsing.names import Names, names_of
from lorry.config.parsing.place import Given, Placed, place
from lorry.errors import ConfigError

MOST_ERRORS = 40
ROWS = frozenset(["path", "mix"])  # of data: either says what is read
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
        Given(given.key, given.value, f"{path}:{line}" if line else str(path), inner=_inside(described, given.key, path))
        for (_, given), line in zip(settings, lines, strict=True)
    ]


def _inside(described: Described, key: str, path: Path) -> dict[str, str]:
    """Where the parts of a setting that is a list or a map stand."""
    lines = described.lines.items()
    return {name.removeprefix(f"{key}."): f"{path}:{line}" for name, line in lines if name.startswith(f"{key}.")}


def _spread(schema: type[BaseModel], key: str, value: Any) -> list[Given]:
    """One setting per field of a group that is given as a map."""
    if key in names_of(schema).groups and isinstance(value, Mapping) and value:
        return [Given(f"{key}.{inner}", each, f"{key}.{inner}") for inner, each in value.items()]
    return [Given(key, value, key)]


def _settle(schema: type[Schema], sources: Iterable[Iterable[Given]], notes: list[str]) -> Schema:
    """Place every setting, lay later ones over earlier ones, validate; then the same for each job, on top of the run's."""
    names = names_of(schema)
    tree, origins = dict[str, Any](), dict[str, str]()
    several = dict[str, Given]()
    axes, wrong = list[Given](), list[str]()
    for source in sources:
        spelled: dict[str, str] = {}
        for given in source:
            if "sweep" in names.fields and is_axis(given):
                axes.append(given)
                continue
            with _collecting(wrong):
                for placed in place(names, given, notes):
                    _refuse_second_name(spelled.setdefault(f"{placed.dotted} {placed.part}", placed.given.key), placed)
                    if placed.dotted in EXPANDED:
                        several[placed.dotted] = replace(placed.given, value=placed.value)
                        continue
                    lay(tree, placed)
                    origins[placed.dotted] = placed.given.where
    said, jobs = list[str](), list[Own]()
    with _collecting(wrong):
        for item in items_of(several, axes):
            with _collecting(wrong):
                jobs.append(own_settings(names, item, said))
    if wrong:  # all of them at once: a description of another tool has a dozen, and nobody wants a dozen tries
        raise ConfigError(_listed(wrong))
    notes += dict.fromkeys(said)
    whole = _with_rows(tree, jobs)
    run = _validated(schema, names, whole, origins)
    if not jobs:
        return run
    return _validated(schema, names, {**whole, "jobs": _differences(names, run, whole, origins, jobs)}, origins)


def _with_rows(tree: Mapping[str, Any], jobs: Sequence[Own]) -> dict[str, Any]:
    """The run's settings; where every job brings its own rows, those of the first stand for the run's. Nothing else of its data
    does: what one job is given is no other's. Raises ConfigError for a job without rows."""
    data = tree.get("data", {})
    own = [job.tree.get("data", {}) for job in jobs]
    if not jobs or not isinstance(data, dict) or ROWS & data.keys() or not any(ROWS & one.keys() for one in own):
        return dict(tree)
    for job, one in zip(jobs, own, strict=True):
        if not ROWS & one.keys():
            raise ConfigError(f"job {job.name!r}: data.path is missing: the run has no rows of its own, and this job brings none")
    return {**tree, "data": {**{key: own[0][key] for key in sorted(ROWS | {"name", "split"}) if key in own[0]}, **data}}


@contextlib.contextmanager
def _collecting(wrong: list[str]) -> Iterator[None]:
    """Keep what is wrong with one setting, and go on to the next."""
    try:
        yield
    except ConfigError as error:
        wrong.append(str(error))


def _listed(wrong: Sequence[str]) -> str:
    """Errors a line each, the first `MOST_ERRORS` of them."""
    lines = list(dict.fromkeys(wrong))
    more = [f"and {len(lines) - MOST_ERRORS} more"] if len(lines) > MOST_ERRORS else []
    return "\n".join([*lines[:MOST_ERRORS], *more])


def _validated(schema: type[Schema], names: Names, tree: Mapping[str, Any], origins: Mapping[str, str], who: str = "") -> Schema:
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        lines = explain(error, names, origins).splitlines()
        raise ConfigError("\n".join(who + line for line in lines)) from None


def _differences(
    names: Names, run: BaseModel, tree: Mapping[str, Any], origins: Mapping[str, str], jobs: Sequence[Own]
) -> list[dict[str, Any]]:
    """Each job validated as the whole run it would be alone; kept are its name and the values that are not the run's."""
    kept = []
    for job in jobs:
        alone = _validated(type(run), names, job.over(tree), {**origins, **job.origins}, f"job {job.name!r}: ")
        kept.append({"name": job.name, **differences(run, alone)})
    return kept


def _refuse_second_name(first: str, placed: Placed) -> None:
    """Two names for one setting in one source leave open which value is meant; the same name again overrides."""
    if first != placed.given.key:
        raise ConfigError(f"{placed.given.where}: {first} and {placed.given.key} both set {placed.dotted}; keep one")
