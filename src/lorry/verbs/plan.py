"""`lorry plan [MODEL]`: memory by component and time of a training run, from the config alone; with
a budget, what fits it.

lorry plan model=smollm2-135m r=auto memory_budget=3GiB
lorry plan model=runs/people forget=forget.jsonl retain=retain.jsonl method=NPO
lorry plan llama-3-70b backend=fsdp processes=8 max_length=4096 per_device_train_batch_size=1
lorry plan smollm2-135m device=cpu backend=fsdp processes=2 max_length=1024
"""

from __future__ import annotations

import json
from pathlib import Path

from lorry.config import build_settings
from lorry.config.settings import (
    MoePlanSettings,
    PlanSettings,
    UnlearnPlanSettings,
)
from lorry.console import VisibleConsole
from lorry.errors import ModelError
from lorry.notes import NoteCallback
from lorry.plan.configs import find_config
from lorry.plan.report import RunPlan
from lorry.runs.ownership import run_description_of
from lorry.verbs.open_model import print_note
from lorry.verbs.planning.build import build_plan
from lorry.verbs.planning.description import AnyPlanSettings
from lorry.verbs.planning.mixture import build_mixture_plans
from lorry.verbs.planning.table import print_plan


def main(settings: AnyPlanSettings) -> int:
    """Print the plan. Raises ConfigError where nothing fits the budget, ModelError where there is
    no such config.
    """
    settings = own_unlearning(settings, print_note)
    found_config = find_config(settings.model.name, revision=settings.model.revision)
    if isinstance(settings, MoePlanSettings):
        return _print_mixture(build_mixture_plans(settings, found_config), settings.format)
    plan = build_plan(settings, found_config)
    if settings.format == "json":
        print(json.dumps(plan.as_json(), indent=1))
        return 0
    print_plan(plan, VisibleConsole())
    return 0


def own_unlearning(settings: AnyPlanSettings, add_note: NoteCallback) -> AnyPlanSettings:
    """A run of `lorry unlearn` that is named as the model, without rows, is meant itself: its run.yaml
    under the settings that were given beside it. With rows it is the start of another run, and any
    other settings are as they are. Raises ConfigError."""
    if not isinstance(settings, PlanSettings) or settings.data.path or settings.data.mix:
        return settings
    described = run_description_of(Path(settings.model.name))
    if described.get("task") != "unlearn":
        return settings
    merged = dict(described)
    for group, given in settings.model_dump(exclude_unset=True).items():
        whole = isinstance(given, dict) and isinstance(merged.get(group), dict)
        merged[group] = {**merged[group], **given} if whole else given
    # what it was trained on, which for the plan is the model; a start that has gone is in the run, too
    start = described["model"]["name"]
    try:
        find_config(start, revision=described["model"].get("revision"))
    except ModelError:
        add_note(f"{start} has gone: planned on the copy of it in {settings.model.name}")
    else:
        merged["model"]["name"] = start
    merged.pop("task")
    add_note(f"{settings.model.name}: the plan of the unlearning that its run.yaml describes")
    return build_settings(UnlearnPlanSettings, merged, add_note)


def _print_mixture(plans: dict[str, RunPlan], output_format: str) -> int:
    """Each stage's plan; in JSON by its name."""
    if output_format == "json":
        print(json.dumps({stage: plan.as_json() for stage, plan in plans.items()}, indent=1))
        return 0
    console = VisibleConsole()
    for stage, plan in plans.items():
        console.print(f"{stage}:", markup=False, highlight=False)
        print_plan(plan, console)
    return 0
