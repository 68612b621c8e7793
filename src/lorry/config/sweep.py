"""`lorry sweep`: what is tried, and the runs that try it.

    lorry sweep data=people.jsonl test_size=0.1 r=8,16 learning_rate=1e-4,3e-4 seeds=3
    sweep: {r: [8, 16], quantize: [null, nf4]}      # the base as well: a pass of its own for each

What a job may have of its own (`RunConfig.job_groups`) is tried in one pass over one base. Another
base, or the same held in another way, is another pass.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from lorry.config.base import config_field
from lorry.config.parsing.names import SchemaNames
from lorry.config.parsing.place import GivenSetting, parse_typed_list, place_setting
from lorry.config.schema.job import JobConfig
from lorry.config.schema.model import ModelConfig
from lorry.config.schema.run import RunConfig
from lorry.notes import NoteCallback


class SweepSettings(RunConfig):
    """Runs that differ in a few settings, trained in one pass and ranked."""

    sweep: dict[str, Any] | list[dict[str, Any]] = config_field(
        {},
        (
            "map of setting to list of values, where every combination is a job; or a "
            "list of combinations"
        ),
        json_schema_extra={"allowed": "a map of lists, such as {r: [8, 16]}, or a list of maps"},
    )
    models: list[ModelConfig] = config_field(
        [],
        "bases to try everything over, a pass each; made from the values of model and quantize in sweep",
        json_schema_extra={
            "allowed": "a list of maps, such as [{quantize: null}, {quantize: nf4}]"
        },
    )
    seeds: PositiveInt = config_field(
        1, "train each combination under this many seeds (seed, seed + 1, ...): an interval each"
    )
    jobs_per_pass: PositiveInt = config_field(
        8, "jobs trained at once: memory grows with the tokens of their batches"
    )

    def tried_jobs(self) -> list[JobConfig]:
        """Every combination, under every seed."""
        if self.seeds == 1:
            return self.jobs
        tried = list[JobConfig]()
        for job in self.jobs or [JobConfig(name="all")]:
            # a job that has a seed of its own begins with that
            first = job.train.get("seed", self.train.seed)
            for seed in range(first, first + self.seeds):
                name = f"{job.name}-seed{seed}" if self.jobs else f"seed{seed}"
                tried.append(
                    job.model_copy(update={"name": name, "train": {**job.train, "seed": seed}})
                )
        return tried

    def passes(self) -> list[RunConfig]:
        """The runs to make, one after the other: one in `output_dir`, or several in its folders
        pass-1, pass-2 ...; of several bases those of each in a folder of its own.
        """
        left_out = {"jobs", "sweep", "jobs_per_pass", "seeds", "models"}
        shared_values = self.model_dump(mode="json", exclude=left_out)
        if self.data.test_size is not None and self.data.test_seed is None:
            # whatever their seeds, they are compared on the same rows
            shared_values["data"]["test_seed"] = self.train.seed
        jobs = self.tried_jobs() or [JobConfig(name=self.lora.adapter_name if self.lora else "all")]
        groups = [
            jobs[at : at + self.jobs_per_pass] for at in range(0, len(jobs), self.jobs_per_pass)
        ]
        runs = list[RunConfig]()
        for model in self.models or [self.model]:
            folder = self.output_dir / self.model_label(model)
            for number, group in enumerate(groups, 1):
                settings = {
                    **shared_values,
                    "model": model.model_dump(mode="json"),
                    "jobs": group,
                    # one pass is a run like any other, so it lies where the user said
                    "output_dir": folder if len(groups) == 1 else folder / f"pass-{number}",
                }
                runs.append(RunConfig.model_validate(settings))
        return runs

    def model_settings(self, model: ModelConfig) -> dict[str, Any]:
        """{dotted name: value} in which a base is unlike another of ``models``."""
        return {f"model.{name}": value for name, value in _own_values(model, self.models).items()}

    def model_label(self, model: ModelConfig) -> str:
        """``nf4``, ``smollm2-none``: by what is its own, with a number where that says too little; empty
        of an only one."""
        if len(self.models) < 2:
            return ""
        labels = [_label(_own_values(each, self.models)) for each in self.models]
        at = self.models.index(model)
        return labels[at] if labels.count(labels[at]) == 1 else f"{labels[at]}-{at + 1}"


def _own_values(model: ModelConfig, models: Sequence[ModelConfig]) -> dict[str, Any]:
    """What of a model's settings is not the same in all of them."""
    values = model.model_dump(mode="json")
    others = [each.model_dump(mode="json") for each in models]
    return {name: v for name, v in values.items() if any(v != other[name] for other in others)}


def _label(values: Mapping[str, Any]) -> str:
    """The values as a folder's name; of a path its last part."""
    words = (Path("none" if value is None else str(value)).name for value in values.values())
    return "-".join(re.sub(r"[^A-Za-z0-9_.-]+", "-", word)[:40] for word in words)


def take_model_axes(
    names: SchemaNames, given: Sequence[GivenSetting], add_note: NoteCallback
) -> list[dict[str, Any]]:
    """The bases that settings of the model with several values each make: every combination, as the
    settings that are its own. Raises ConfigError."""
    axes = list[list[tuple[str, Any]]]()
    for setting in given:
        values = parse_typed_list(setting.value) if setting.typed else setting.value
        placed = [
            place_setting(names, replace(setting, value=value, typed=False), add_note)
            for value in (values if isinstance(values, list) else [values])
        ]
        axes.append([(each.dotted.partition(".")[2], each.value) for (each,) in placed])
    return [dict(chosen) for chosen in product(*axes)] if axes else []


def split_model_axes(
    names: SchemaNames, expanded: Mapping[str, GivenSetting]
) -> tuple[list[GivenSetting], dict[str, GivenSetting]]:
    """(settings of the model in a `sweep` that is a map of lists, what is left)."""
    left, sweep = dict(expanded), expanded.get("sweep")
    if sweep is None or not isinstance(sweep.value, Mapping):
        return [], left
    inner = {key: value for key, value in sweep.value.items() if _is_of_model(names, str(key))}
    rest = {key: value for key, value in sweep.value.items() if key not in inner}
    left["sweep"] = replace(sweep, value=rest)
    where = {key: sweep.inner.get(str(key), sweep.where) for key in inner}
    return [GivenSetting(str(key), value, where[key]) for key, value in inner.items()], left


def _is_of_model(names: SchemaNames, key: str) -> bool:
    meant = names.candidates(key)
    return bool(meant) and all(dotted.startswith("model.") for dotted in meant)
