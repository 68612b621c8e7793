"""Several jobs in one run (`jobs:`), and the grids that make them (`lorry sweep`): the run, with a
few settings of its own each.

    jobs: [{name: small, r: 8}, {name: large, r: 64, learning_rate: 1e-4}]
    lorry sweep run.yaml r=8,16,32 learning_rate=1e-4,3e-4

A job is read, placed and validated as the run it would be alone; what a `RunConfig` keeps of it is
its name and the values that differ, so that a description written and read back is the same jobs.
`runs_by_adapter` gives them back whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from lorry.config.adapter.belongs import BELONGS_TO, drop_foreign
from lorry.config.parsing.names import SchemaNames, show_value, union_members
from lorry.config.parsing.place import (
    GivenSetting,
    PlacedSetting,
    flag_field,
    parse_typed_list,
    place_setting,
)
from lorry.config.schema.run import JOBS, NO_ADAPTERS_FOR_JOBS, RunConfig
from lorry.errors import ConfigError
from lorry.notes import NoteCallback

# what base weights that train (lora=null) are called where an adapter would have a name
BASE_JOB = "base"
MOST_JOBS = 1000  # a grid of three axes of 100 values would be a million runs: a slip of the hand
EXPANDED_KEYS = ("jobs", "sweep")  # settings that stand for jobs
# What a pass does once for all its jobs. Everything else of a run's `job_groups` may differ.
SHARED_SETTINGS = frozenset(
    f"train.{name}"
    for name in (
        *[
            "gradient_checkpointing",
            "logging_steps",
            "save_strategy",
            "save_steps",
            "save_total_limit",
        ],
        *[
            "resume_from_checkpoint",
            "report_to",
            "run_name",
            "eval_tasks",
            "eval_limit",
            "eval_n_shot",
        ],
    )
) | {
    "lora.adapter_name",
    # one method asks model and start about the sequences of all jobs at once
    *[
        f"unlearn.{name}"
        for name in (
            "method",
            "retain_loss",
            "layer",
            "adaptive",
            "peer_masks",
            "reference",
            "gradient",
        )
    ],
}
# names in a run directory that are not an adapter's
# cannot import runs/layout.py, a room below; tests/test_layout.py holds the two equal
RESERVED_NAMES = frozenset(
    [
        *["checkpoints", "previous", "evals", "start_adapter"],
        *["router", "experts", "tensorboard", "data"],
    ]
)
# of files in a run directory: a folder with such a name would be taken for one
FILE_SUFFIXES = frozenset(
    [".json", ".jsonl", ".yaml", ".html", ".png", ".md", ".safetensors", ".jinja", ".model", ".txt"]
)
# how a setting is called in a job's name; "": its value says it all (cosine, people)
SHORT_LABELS = {
    "learning_rate": "lr",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch",
    "gradient_accumulation_steps": "accumulation",
    "weight_decay": "decay",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "max_grad_norm": "clip",
    "loraplus_lr_ratio": "plus",
    "lr_scheduler_type": "",
    "target_modules": "",
    "target_parameters": "",
    "init_lora_weights": "init",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "variant": "",
    "lora_B_bias": "bias",
    "modules_to_save": "whole",
    "trainable_token_indices": "rows",
    "path": "",
    "data": "",
}


@dataclass(frozen=True)
class JobItem:
    """A job as it was given: its name, its settings, and where the whole of it stands."""

    name: str
    settings: Sequence[GivenSetting]
    where: str


@dataclass(frozen=True)
class JobOverrides:
    """A job's own settings as a tree, with the place of each."""

    name: str
    tree: dict[str, dict[str, Any]]
    origins: dict[str, str] = field(default_factory=dict)

    def apply_to(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of the run with this job's in their place. Raises ConfigError for settings
        of an adapter where the run has none.
        """
        if "lora" in self.tree and "lora" in tree and tree["lora"] is None:
            raise ConfigError(NO_ADAPTERS_FOR_JOBS)
        settings = {
            **tree,
            **{group: {**tree.get(group, {}), **own} for group, own in self.tree.items()},
        }
        if own := self.tree.get("lora"):
            settings["lora"] = {**_shared_with(own, tree.get("lora", {})), **own}
        if row_sources := {"path", "mix"} & self.tree.get("data", {}).keys():
            # what the job reads stands in the place of what the run reads, not beside it
            settings["data"] = {
                k: v
                for k, v in settings["data"].items()
                if k in row_sources or k not in ("path", "mix")
            }
        return settings


def _shared_with(own: Mapping[str, Any], lora: Mapping[str, Any]) -> dict[str, Any]:
    """The run's adapter settings without those that a job's ``own`` leave no meaning: what belongs to another
    variant or start, and AdaLoRA's first rank under either of its names."""
    gone = {"r", "init_r"} if {"r", "init_r"} & own.keys() else set()
    for name, (decides, values) in BELONGS_TO.items():
        if decides in own and own[decides] not in values:
            gone |= {name}
    if "variant" in own:
        gone |= {"use_dora"}
    return {name: value for name, value in lora.items() if name not in gone}


def set_in_tree(tree: dict[str, Any], placed: PlacedSetting) -> None:
    """Put a setting into a tree of groups; an entry of a map beside its other entries."""
    group, _, leaf = placed.dotted.rpartition(".")
    group_tree = {**(tree.get(group) or {})} if group else tree
    entries = group_tree.get(leaf)
    group_tree[leaf] = (
        {**entries, **placed.value} if placed.part and isinstance(entries, dict) else placed.value
    )
    if group:
        tree[group] = group_tree


# --- what was given, as items


def is_sweep_axis(job_names: SchemaNames, setting: GivenSetting) -> bool:
    """Whether a typed setting is several values to try: ``r=8,16``, for a field that takes neither
    text nor a list of its own. ``job_names``: of the settings that a job may have.
    """
    target = flag_field(job_names, setting.key)
    if target is None or not setting.typed or not isinstance(setting.value, str):
        return False
    kinds = union_members(target.annotation)
    # a comma is part of a text, and a field of lists takes r=a,b as one value
    takes_one_value = str not in kinds and not any(
        getattr(kind, "__origin__", None) in (list, dict) for kind in kinds
    )
    return takes_one_value and ("," in setting.value or setting.value.startswith("["))


def expand_jobs(
    expanded: Mapping[str, GivenSetting],
    axes: Sequence[GivenSetting],
    groups: Sequence[str],
    add_note: NoteCallback,
) -> list[JobItem]:
    """The jobs that are meant, with settings of some ``groups``. Raises ConfigError where both a
    list of jobs and a sweep are given.
    """
    jobs, sweep = expanded.get("jobs"), expanded.get("sweep")
    listed = [] if jobs is None or jobs.value is None else _listed_jobs(jobs, groups)
    sweep_items = _sweep_jobs(sweep, axes, groups, add_note)
    if listed and sweep_items:
        raise ConfigError(
            f"{sweep_items[0].where}: a list of jobs and a sweep are both given; keep one"
        )
    items = listed or sweep_items
    if len(items) > MOST_JOBS:
        raise ConfigError(
            f"{items[0].where}: {len(items):,} jobs are too many for a run; at most {MOST_JOBS:,}"
        )
    where_by_name = dict[str, str]()
    for item in items:
        # by lower case: the folders of two such jobs are one on macOS
        if item.name.lower() in where_by_name:
            first = where_by_name[item.name.lower()]
            elsewhere = "" if first == item.where else f" (the first: {first})"
            raise ConfigError(
                f"{item.where}: two {jobs.key if jobs and listed else 'jobs'} are called "
                f"{item.name!r}{elsewhere}; each is written to a folder of its name, so names must differ"
            )
        where_by_name[item.name.lower()] = item.where
    return items


def _listed_jobs(setting: GivenSetting, groups: Sequence[str]) -> list[JobItem]:
    if not isinstance(setting.value, list) or not all(
        isinstance(job, Mapping) for job in setting.value
    ):
        # by the word that was written: `experts` of a mixture, `subjects` of what is unlearnt
        raise ConfigError(
            f"{setting.where}: {setting.key}: got {show_value(setting.value)}; give {JOBS}"
        )
    return [
        _make_job_item(setting, number, job, groups) for number, job in enumerate(setting.value)
    ]


def _make_job_item(
    setting: GivenSetting, number: int, job: Mapping[str, Any], groups: Sequence[str]
) -> JobItem:
    where = setting.inner.get(str(number), setting.where)
    # int: YAML reads name: 8 as a number
    if not isinstance(job.get("name"), (str, int)):
        raise ConfigError(
            f"{where}: {setting.key.removesuffix('s')} {number + 1} has no name; give name: and the "
            "settings that differ"
        )
    name = str(job["name"])
    if name in RESERVED_NAMES or Path(name).suffix in FILE_SUFFIXES:
        raise ConfigError(
            f"{where}: {name!r} cannot be a job's name: a run directory has a file "
            "or folder of that name"
        )
    settings = [
        each
        for key, value in job.items()
        if key != "name"
        for each in _spread_group(setting, f"{number}.", key, value, groups)
    ]
    return JobItem(name, settings, where)


def _spread_group(
    setting: GivenSetting, prefix: str, key: str, value: Any, groups: Sequence[str]
) -> list[GivenSetting]:
    """One setting per field of a group that a job has as a map."""
    where = setting.inner.get(f"{prefix}{key}", setting.where)
    if key in groups and isinstance(value, Mapping):
        lines = {inner: setting.inner.get(f"{prefix}{key}.{inner}", where) for inner in value}
        return [GivenSetting(f"{key}.{inner}", each, lines[inner]) for inner, each in value.items()]
    return [GivenSetting(key, value, where)]


def _sweep_jobs(
    sweep: GivenSetting | None,
    axes: Sequence[GivenSetting],
    groups: Sequence[str],
    add_note: NoteCallback,
) -> list[JobItem]:
    """Every combination of a map of lists, or the maps of a list as they are; names are made from
    the values.
    """
    value = sweep.value if sweep is not None else None
    if sweep is not None and isinstance(value, list) and value:
        if axes or not all(isinstance(combination, Mapping) for combination in value):
            raise ConfigError(
                f"{sweep.where}: a sweep is a map of lists or a list of maps, not both"
            )
        return _name_combinations(
            [
                [
                    each
                    for k, v in combination.items()
                    for each in _spread_group(sweep, f"{n}.", k, v, groups)
                ]
                for n, combination in enumerate(value)
            ]
        )
    if value and not isinstance(value, Mapping):
        raise ConfigError(
            f"{sweep.where if sweep else ''}: a sweep is a map of lists, such as {{r: [8, 16]}}; got {show_value(value)}"
        )
    listed = (
        []
        if sweep is None or not value
        else [each for k, v in value.items() for each in _spread_group(sweep, "", k, v, groups)]
    )
    typed = [GivenSetting(axis.key, parse_typed_list(axis.value), axis.where) for axis in axes]
    # keyed, so that an axis typed on the command line replaces the file's of that name
    grid = list({axis.key: axis for axis in (*listed, *typed)}.values())
    choices = [
        [
            GivenSetting(a.key, combination, a.where)
            for combination in (a.value if isinstance(a.value, list) else [a.value])
        ]
        for a in grid
    ]
    # counted before the product is made: it would not fit into memory
    if (count := prod(map(len, choices))) > MOST_JOBS:
        axes_shown = " x ".join(
            f"{axis.key}: {len(values):,}" for axis, values in zip(grid[:8], choices, strict=False)
        )
        raise ConfigError(
            f"{grid[0].where}: the sweep has {count:,} combinations ({axes_shown}); at most {MOST_JOBS:,} can be trained. "
            "Shorten the lists, or give the combinations themselves as a list of maps"
        )
    return _name_combinations(drop_foreign([*product(*choices)], add_note)) if grid else []


def _name_combinations(combinations: Sequence[Sequence[GivenSetting]]) -> list[JobItem]:
    names = [
        "-".join(_value_label(setting) for setting in settings) or "job"
        for settings in combinations
    ]
    items = list[JobItem]()
    for name, settings in zip(names, combinations, strict=True):
        # a name may have 64 characters, of which the number at the end takes some
        job_name = name if len(name) <= 56 else f"{name[:52]}-{len(items) + 1}"
        if any(job_name == item.name for item in items):
            raise ConfigError(
                f"{settings[0].where}: the sweep has the same combination twice: {job_name}"
            )
        items.append(JobItem(job_name, settings, settings[0].where))
    return items


def _value_label(setting: GivenSetting) -> str:
    """``r8``, ``lr1e-4``, ``cosine``: a setting in a name."""
    leaf = setting.key.rpartition(".")[2]
    value = setting.value
    if isinstance(value, float):
        # 1e-4 and not 0.0001: rates in a name are compared by their exponent
        mantissa, exponent = f"{value:.6e}".split("e")
        value_words = (
            f"{value:g}"
            if 1e-2 <= abs(value) < 1e4 or not value
            else f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        )
    elif isinstance(value, str) and ("/" in value or leaf == "path"):
        # a folder's name cannot hold a path
        value_words = Path(value).stem
    else:
        value_words = "+".join(map(str, value)) if isinstance(value, list) else str(value).lower()
    return re.sub(
        r"[^A-Za-z0-9_-]+",
        lambda m: "." if m[0] == "." else "-",
        f"{SHORT_LABELS.get(leaf, leaf)}{value_words}",
    ).strip(".-")


# --- from items to a run's jobs, and back


def resolve_job_overrides(
    names: SchemaNames, job_names: SchemaNames, item: JobItem, add_note: NoteCallback
) -> JobOverrides:
    """A job's settings under their full names: ``names`` those of the run, ``job_names`` what of
    them a job may have. Raises ConfigError for one that is unknown, or the same for all jobs.
    """
    own = JobOverrides(item.name, {group: {} for group in job_names.groups})
    for setting in item.settings:
        if (
            flag_field(job_names, setting.key) is None
            and not job_names.candidates(setting.key)
            and setting.key not in job_names.groups
        ):
            _refuse_shared(names, setting)
        for placed in place_setting(job_names, setting, add_note):
            if placed.dotted in SHARED_SETTINGS:
                _refuse_setting(setting, placed.dotted)
            group, _, leaf = placed.dotted.partition(".")
            if not leaf:
                raise ConfigError(
                    f"{setting.where}: {setting.key}={show_value(setting.value)} "
                    "cannot be set for a job, since every job trains an adapter"
                )
            # an entry of a map (rank_pattern.q_proj) may come beside others of the same map
            if leaf in own.tree[group] and not placed.part:
                raise ConfigError(
                    f"{setting.where}: {placed.dotted} is given twice for the job {item.name!r}; keep one"
                )
            set_in_tree(own.tree, placed)
            own.origins[placed.dotted] = setting.where
    return JobOverrides(
        own.name, {group: settings for group, settings in own.tree.items() if settings}, own.origins
    )


def _refuse_shared(names: SchemaNames, setting: GivenSetting) -> None:
    """Say of a setting of the run that it cannot differ; an unknown one is left to be refused as
    such.
    """
    if (
        setting.key in names.groups
        or names.candidates(setting.key)
        or flag_field(names, setting.key) is not None
    ):
        _refuse_setting(setting, next(iter(names.candidates(setting.key)), setting.key))


def _refuse_setting(setting: GivenSetting, dotted: str) -> None:
    raise ConfigError(
        f"{setting.where}: {dotted} is the same for all jobs of a run; set it beside jobs, not in one of them"
    )


def job_differences(run: RunConfig, job_run: RunConfig) -> dict[str, dict[str, Any]]:
    """{group: {setting: value}} of a job where it is not the run's, in plain values."""
    # dumped values, not what was given: a default that follows from another setting (warmup_ratio
    # of warmup_steps) differs, too
    run_values, job_values = run.model_dump(mode="json"), job_run.model_dump(mode="json")
    return {
        group: {
            setting: v
            for setting, v in job_values[group].items()
            if v != run_values[group][setting]
        }
        for group in run.job_groups
        if job_values[group] is not None  # lora=null: no job has one
    }


def runs_by_adapter(run: RunConfig) -> dict[str, RunConfig]:
    """{adapter: the run it would be alone}: of a run without `jobs`, itself; without an adapter
    {BASE_JOB: itself}, since its base weights train; of experts that are whole models one for each.
    """
    if not run.jobs:
        return {BASE_JOB if run.lora is None else run.lora.adapter_name: run}
    groups = [group for group in run.job_groups if group != "lora" or run.lora is not None]
    shared_values = run.model_dump(mode="json", exclude={"jobs"})
    runs = {}
    for job in run.jobs:
        job_values: dict[str, Any] = {
            group: {**shared_values[group], **getattr(job, group)} for group in groups
        }
        # the job's name is its adapter's; it cannot be given beside
        if "lora" in job_values:
            job_values["lora"]["adapter_name"] = job.name
        runs[job.name] = type(run).model_validate(
            {**shared_values, **job_values, "output_dir": run.output_dir / job.name}
        )
    return runs
