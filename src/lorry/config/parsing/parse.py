"""From what a person typed or wrote to one checked, frozen description; and back to YAML.

Sources, later over earlier: an experiment's file, CONFIG.yaml, then ``key=value`` and ``--key value``
in their order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lorry.config.adapter.belongs import hand_down
from lorry.config.jobs import (
    EXPANDED_KEYS,
    JobOverrides,
    expand_jobs,
    is_sweep_axis,
    job_differences,
    resolve_job_overrides,
    set_in_tree,
)
from lorry.config.parsing.argv import read_argv
from lorry.config.parsing.experiments import EXPERIMENT, take_experiment
from lorry.config.parsing.explain import explain_validation
from lorry.config.parsing.files import DescriptionFile, read_description_file, write_yaml
from lorry.config.parsing.names import SchemaNames, schema_names
from lorry.config.parsing.open_unlearning import strip_launcher, translate_settings
from lorry.config.parsing.peer_defaults import with_peer_defaults
from lorry.config.parsing.place import GivenSetting, PlacedSetting, place_setting
from lorry.config.schema.run import RunConfig
from lorry.config.sweep import split_model_axes, take_model_axes
from lorry.errors import ConfigError
from lorry.notes import NoteCallback

MOST_ERRORS = 40  # lines of one refusal; another tool's description may have more
# settings, by group, of which one says what is read; a job may have it where the run has none
ROW_SOURCES: dict[str, list[tuple[str, ...]]] = {
    "data": [("path", "mix")],
    "unlearn": [("forget",), ("retain",), ("alternates",)],
}
# of data: what says which rows of a source are meant
ROW_CHOICES: dict[str, tuple[str, ...]] = {"data": ("name", "split")}
Schema = TypeVar("Schema", bound=BaseModel)


def parse_settings(schema: type[Schema], argv: Sequence[str], add_note: NoteCallback) -> Schema:
    """Read ``[CONFIG.yaml] [WORD ...] [key=value ...]`` into ``schema``; peers' names that were
    understood are each worth a note.

    Raises ConfigError: an unknown or ambiguous name, a value that is not allowed, settings that
    exclude each other, a bad file.
    """
    schema = _schema_of_task(schema, argv)
    config, settings = read_argv(schema, strip_launcher(_experiment_kind(schema), argv, add_note))
    return _resolve_settings(
        schema, [_from_file(schema, config, add_note), settings] if config else [settings], add_note
    )


def build_settings(
    schema: type[Schema], settings: Mapping[str, Any], add_note: NoteCallback
) -> Schema:
    """The same from Python values, as keyword arguments give them: ``build_settings(RunConfig, {"data":
    "f.jsonl", "r": 8}, add_note)``.
    """
    plain = {
        key: value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
        for key, value in settings.items()
    }
    return _resolve_settings(
        schema,
        [[setting for key, value in plain.items() for setting in _spread_map(schema, key, value)]],
        add_note,
    )


def _schema_of_task(schema: type[Schema], argv: Sequence[str]) -> type[Schema]:
    """The schema, or that of its ``other_tasks`` which alone knows a setting that is given: `lorry
    plan` reads the settings of several verbs. An experiment decides first, by the verb that it is
    of; a name that marks a task decides before one that it knows, since another project's file has
    names of both.
    """
    keys_by_task = dict[type[Schema], list[str]]()
    for other in getattr(schema, "other_tasks", ()):
        try:
            config, settings = read_argv(other, argv)
        except ConfigError:
            continue  # told when the words are read for what they are meant to be
        values = [(setting.key, setting.value) for setting in settings]
        if config is not None:
            values += read_description_file(config).values.items()
        keys_by_task[other] = [key for key, _ in values]
        experiments = [str(value) for key, value in values if key == EXPERIMENT]
        kind = _experiment_kind(other)
        if kind != _experiment_kind(schema) and any(
            name.startswith(f"{kind}/") for name in experiments
        ):
            return other
    for other, keys in keys_by_task.items():
        if set(getattr(other, "task_marks", ())) & set(keys):
            return other
    for other, keys in keys_by_task.items():
        if any(_is_known(other, key) and not _is_known(schema, key) for key in keys):
            return other
    return schema


def _is_known(schema: type[BaseModel], key: str) -> bool:
    names = schema_names(schema)
    return key in names.groups or bool(names.candidates(key))


def dump_settings(settings: BaseModel) -> str:
    """YAML text that ``parse_settings`` reads back to an equal description."""
    return write_yaml(settings.model_dump(mode="json"))


def _from_file(schema: type[BaseModel], path: Path, add_note: NoteCallback) -> list[GivenSetting]:
    """The settings of a file. A schema's ``translate_description`` knows another project's files."""
    described, translate = (
        read_description_file(path),
        getattr(schema, "translate_description", None),
    )
    if translate is not None:
        described = translate(described, path, add_note)
    return _described_settings(schema, described, path)


def _described_settings(
    schema: type[BaseModel], described: DescriptionFile, path: Path
) -> list[GivenSetting]:
    settings = [
        (key, setting)
        for key, value in described.values.items()
        for setting in _spread_map(schema, key, value)
    ]
    lines = [
        described.lines.get(setting.key, described.lines.get(key)) for key, setting in settings
    ]
    return [
        GivenSetting(
            setting.key,
            setting.value,
            f"{path}:{line}" if line else str(path),
            inner=_nested_origins(described, setting.key, path),
        )
        for (_, setting), line in zip(settings, lines, strict=True)
    ]


def _nested_origins(described: DescriptionFile, key: str, path: Path) -> dict[str, str]:
    """Where the parts of a setting that is a list or a map stand."""
    lines = described.lines.items()
    return {
        name.removeprefix(f"{key}."): f"{path}:{line}"
        for name, line in lines
        if name.startswith(f"{key}.")
    }


def _spread_map(schema: type[BaseModel], key: str, value: Any) -> list[GivenSetting]:
    """One setting per field of a group that is given as a map."""
    if key in schema_names(schema).groups and isinstance(value, Mapping) and value:
        return [
            GivenSetting(f"{key}.{inner}", each, f"{key}.{inner}") for inner, each in value.items()
        ]
    return [GivenSetting(key, value, key)]


def _experiment_kind(schema: type[BaseModel]) -> str:
    return getattr(schema, "experiment_kind", "")


def _with_experiment(
    schema: type[BaseModel], sources: Iterable[Iterable[GivenSetting]], add_note: NoteCallback
) -> list[list[GivenSetting]]:
    """The sources under our names, after that of the experiment that one of them names."""
    kind = _experiment_kind(schema)
    settings = [list(source) for source in sources]
    if not kind:
        return settings
    experiment, rest = take_experiment(kind, settings, add_note)
    if experiment is not None:
        rest.insert(0, _described_settings(schema, experiment.described, experiment.path))
    names = schema_names(schema)
    return [setting for source in rest for setting in translate_settings(names, source, add_note)]


def _resolve_settings(
    schema: type[Schema], sources: Iterable[Iterable[GivenSetting]], add_note: NoteCallback
) -> Schema:
    """Place every setting, lay later ones over earlier ones, validate; then the same for each job,
    on top of the run's.
    """
    names = schema_names(schema)
    groups: Sequence[str] = schema.job_groups if issubclass(schema, RunConfig) else ()
    job_names = names.within(groups)
    tree, origins = dict[str, Any](), dict[str, str]()
    expanded = dict[str, GivenSetting]()
    axes, model_axes, errors = list[GivenSetting](), list[GivenSetting](), list[str]()
    model_names = names.within(["model"] if "models" in names.fields else [])
    described = _with_experiment(schema, sources, add_note)
    for source in with_peer_defaults(names, described, add_note):
        # of one source: the command line may use another name than the file that it overrides
        name_by_setting: dict[str, str] = {}
        earlier_nulls = {
            group: origins[group] for group in names.groups if group in tree and tree[group] is None
        }
        given_in_group: dict[str, PlacedSetting] = {}
        for setting in source:
            if "sweep" in names.fields and is_sweep_axis(job_names, setting):
                axes.append(setting)
                continue
            if is_sweep_axis(model_names, setting):
                model_axes.append(setting)
                continue
            with _collect_errors(errors):
                for placed in place_setting(names, setting, add_note):
                    _refuse_second_name(
                        name_by_setting.setdefault(
                            f"{placed.dotted} {placed.part}", placed.setting.key
                        ),
                        placed,
                    )
                    _refuse_null_with_settings(names, given_in_group, placed)
                    # set aside: they stand for jobs, which are read once the settings below them
                    # are known
                    if placed.dotted in EXPANDED_KEYS:
                        expanded[placed.dotted] = replace(placed.setting, value=placed.value)
                        continue
                    set_in_tree(tree, placed)
                    origins[placed.dotted] = placed.setting.where
        for group, where in earlier_nulls.items():
            if tree[group] is not None:
                now = given_in_group[group].setting.where
                add_note(
                    f"{now} takes the place of {group}=null ({where}): there is a {group} again"
                )
    job_notes, jobs = list[str](), list[JobOverrides]()
    with _collect_errors(errors):
        if "models" in names.fields:
            inner, expanded = split_model_axes(names, expanded)
            if bases := take_model_axes(model_names, [*inner, *model_axes], add_note):
                tree["models"] = [{**tree.get("model", {}), **own} for own in bases]
    with _collect_errors(errors):
        for item in expand_jobs(expanded, axes, groups, job_notes.append):
            with _collect_errors(errors):
                jobs.append(resolve_job_overrides(names, job_names, item, job_notes.append))
    # all of them at once: a description of another tool has a dozen, and nobody wants a dozen tries
    if errors:
        raise ConfigError(_list_errors(errors))
    tree, own = hand_down(tree, [(job.name, job.tree) for job in jobs], job_notes.append)
    jobs = [replace(job, tree=each) for job, each in zip(jobs, own, strict=True)]
    # a hundred jobs have the same alias; its note comes once
    for note in dict.fromkeys(job_notes):
        add_note(note)
    settings, jobs = _adopt_job_rows(tree, jobs)
    # without its jobs first, so that an error of the run is not told once for each of them
    run = _validate_schema(schema, names, settings, origins)
    if not jobs or not isinstance(run, RunConfig):
        return run
    return _validate_schema(
        schema,
        names,
        {**settings, "jobs": _validate_jobs(names, run, settings, origins, jobs)},
        origins,
    )


def _adopt_job_rows(
    tree: Mapping[str, Any], jobs: Sequence[JobOverrides]
) -> tuple[dict[str, Any], list[JobOverrides]]:
    """The run's settings and its jobs; where every job brings rows of its own, those of the first stand for the
    run's. Nothing else of its data does: what one job is given is no other's. Raises ConfigError
    for a job without rows that the others bring.
    """
    adopted, resolved = dict(tree), list(jobs)
    for group, several in ROW_SOURCES.items():
        for sources in several:
            job_settings = adopted.get(group, {})
            own = [job.tree.get(group, {}) for job in resolved]
            if (
                not isinstance(job_settings, dict)
                or set(sources) & job_settings.keys()
                or not any(set(sources) & rows.keys() for rows in own)
            ):
                continue
            for n, (job, rows) in enumerate(zip(resolved, own, strict=True)):
                # an adapter that is there trains on nothing, and the first job's rows are not its
                if not set(sources) & rows.keys() and "adapter" in job.tree.get("expert", {}):
                    unread = {**job.tree, group: {**rows, sources[0]: None}}
                    resolved[n] = replace(job, tree=unread)
                elif not set(sources) & rows.keys():
                    raise ConfigError(
                        f"job {job.name!r}: {group}.{sources[0]} is missing: "
                        "neither the run nor this job names rows"
                    )
            chosen = (*sources, *ROW_CHOICES.get(group, ()))
            first = next(rows for rows in own if set(sources) & rows.keys())
            adopted[group] = {**{k: first[k] for k in chosen if k in first}, **job_settings}
    return adopted, resolved


@contextlib.contextmanager
def _collect_errors(errors: list[str]) -> Iterator[None]:
    """Keep what is wrong with one setting, and go on to the next."""
    try:
        yield
    except ConfigError as error:
        errors.append(str(error))


def _list_errors(errors: Sequence[str]) -> str:
    """Errors a line each, the first `MOST_ERRORS` of them."""
    lines = list(dict.fromkeys(errors))
    more = [f"and {len(lines) - MOST_ERRORS} more"] if len(lines) > MOST_ERRORS else []
    return "\n".join([*lines[:MOST_ERRORS], *more])


def _validate_schema(
    schema: type[Schema],
    names: SchemaNames,
    tree: Mapping[str, Any],
    origins: Mapping[str, str],
    who: str = "",
) -> Schema:
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        lines = explain_validation(error, names, origins).splitlines()
        # from None: pydantic's own text, with its addresses, is no help beside ours
        raise ConfigError("\n".join(who + line for line in lines)) from None


def _validate_jobs(
    names: SchemaNames,
    run: RunConfig,
    tree: Mapping[str, Any],
    origins: Mapping[str, str],
    jobs: Sequence[JobOverrides],
) -> list[dict[str, Any]]:
    """Each job validated as the whole run it would be alone; kept are its name and the values that
    are not the run's. Raises ConfigError.
    """
    differences = []
    for job in jobs:
        job_run = _validate_schema(
            type(run), names, job.apply_to(tree), {**origins, **job.origins}, f"job {job.name!r}: "
        )
        # one suite is asked of every adapter; its split follows from rows that a job may have its own of
        if job_run.suite != run.suite:
            raise ConfigError(
                f"job {job.name!r}: suite={run.suite.name} evaluates every job on "
                f"{run.suite.forget_split}, but this job forgets "
                f"{job_run.suite.forget_split}; give forget_split, or leave suite "
                "out and evaluate each job (lorry eval)"
            )
        differences.append({"name": job.name, **job_differences(run, job_run)})
    return differences


def _refuse_null_with_settings(
    names: SchemaNames, given: dict[str, PlacedSetting], placed: PlacedSetting
) -> None:
    """A group that one source sets to null and gives a setting of leaves open whether there is to be one.
    ``given``: of each group what came last, which `placed` joins."""
    group = placed.dotted if placed.dotted in names.groups else placed.dotted.rpartition(".")[0]
    if not group:
        return
    other = given.setdefault(group, placed)
    given[group] = placed
    nulls = [each.dotted == group and each.value is None for each in (other, placed)]
    if nulls[0] != nulls[1]:
        setting = placed if nulls[0] else other
        raise ConfigError(
            f"{setting.setting.where}: {setting.setting.key} sets something of {group}, and {group}=null says "
            "that there is none; keep one"
        )


def _refuse_second_name(first: str, placed: PlacedSetting) -> None:
    """Two names for one setting in one source leave open which value is meant; the same name again
    overrides.
    """
    if first != placed.setting.key:
        raise ConfigError(
            f"{placed.setting.where}: {first} and {placed.setting.key} both set {placed.dotted}; keep one"
        )
