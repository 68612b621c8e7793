"""losses.json: a run's losses as plain lists, for plots and notebooks; metrics.jsonl has everything
else about a step.

    {"step": [1, 2, ...], "loss": [3.1, 2.7, ...], "eval_step": [2, ...], "eval_loss": [2.9, ...]}

Losses are in nats per token; null stands for one that is not finite. A run of several adapters has
the same lists for each under ``adapters``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorry.disk import documents
from lorry.errors import RunFilesError
from lorry.runs.layout import LOSSES, METRICS
from lorry.runs.metrics import iter_metrics


def collect_losses(run_dir: Path) -> dict[str, Any]:
    """The lists of one run, empty where nothing was logged. Raises DataError naming the line of
    metrics.jsonl that is damaged.
    """
    path = run_dir / METRICS
    whole, adapters = _empty_lists(), dict[str, dict[str, list[Any]]]()
    for _, record in iter_metrics(path) if path.exists() else ():
        _add_record(whole, record["step"], record)
        for name, own in record.get("adapters", {}).items():
            _add_record(adapters.setdefault(name, _empty_lists()), record["step"], own)
    return {**whole, "adapters": adapters} if adapters else whole


def describe_lost_lines(run_dir: Path) -> str:
    """Which steps of losses.json, which a run writes at its end, metrics.jsonl has no more, in words; empty
    where it has all, or the run did not end. Raises DataError naming what is damaged.
    """
    path = run_dir / LOSSES
    try:
        # a run that diverged has numbers that are none of JSON's
        kept = documents.read_json_document(path, error=RunFilesError, nonfinite=True)
    except FileNotFoundError:
        return ""
    there = collect_losses(run_dir)
    for name, what in (("step", "of training"), ("eval_step", "of an evaluation")):
        steps = kept.get(name, []) if isinstance(kept, dict) else None
        if not isinstance(steps, list):
            raise RunFilesError(f"{path}: expected an object with a list {name!r}")
        known = set(there[name])
        if lost := [step for step in steps if step not in known]:
            return (
                f"{run_dir / METRICS} lacks {len(lost)} of {len(steps)} lines {what} (step {lost[0]} first), "
                f"although the run finished and {LOSSES} has them: another program or a disk took them; "
                "they are lost to reports alone"
            )
    return ""


def _empty_lists() -> dict[str, list[Any]]:
    return {"step": [], "loss": [], "eval_step": [], "eval_loss": []}


def _add_record(lists: dict[str, list[Any]], step: int, values: Mapping[str, Any]) -> None:
    for at, name in (("step", "loss"), ("eval_step", "eval_loss")):
        value = values.get(name)
        # a line holds the one or the other: each name has steps of its own
        if isinstance(value, int | float):
            lists[at].append(step)
            lists[name].append(value if math.isfinite(value) else None)
