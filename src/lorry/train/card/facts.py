"""What a run measured, as its card says it: figures of the training and results of data sets, from
what `runs.read.read_run` found in the directory.

    training_figures(run), metric_changes(run)

Neither the time of day nor the speed of a machine is among them: see `training_figures`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lorry.config import TrainConfig
from lorry.disk.documents import is_finite_number
from lorry.errors import DataError
from lorry.runs.layout import RUN_FILE
from lorry.runs.metrics import MetricsRecord
from lorry.runs.read import MetricChange, RunRecord
from lorry.runs.series import EVALUATION_PREFIX, adapter_values
from lorry.train.jobs import JobProgress

HELD_OUT_SET = "held-out rows, at the end of training"
# terms of a loss of several are logged with their factors: neither is what it is called elsewhere
NON_METRIC_KEYS = frozenset(["step", "eval_nll", "eval_distill"])


def training_figures(run: RunRecord) -> dict[str, str]:
    """Steps, losses and tokens, by name; of several jobs the losses of each. Neither time nor
    memory: a run that was killed and went on leaves the same card, to the bit, as one that never
    stopped; the report has both.
    """
    steps = [r for r in run.log.records if "loss" in r]
    figures: dict[str, str] = {}
    for name in run.job_names:
        own = [(r["step"], values) for r in steps if "loss" in (values := _record_values(r, name))]
        if own:
            lead = "" if name is None else f"{name}: "
            figures |= {
                f"{lead}steps": str(own[-1][0]),
                f"{lead}last loss": str(own[-1][1]["loss"]),
            }
            if (best := _best_step(run, name)) is not None:
                figures[f"{lead}adapter of step"] = f"{best} (the best evaluated)"
    sums = {
        name: sum(r[name] for r in steps if is_finite_number(r.get(name)))
        for name in ("tokens", "supervised_tokens")
    }
    if steps:
        figures |= {
            "tokens read": f"{sums['tokens']:,}",
            "of which supervised": f"{sums['supervised_tokens']:,}",
        }
    backend = run.settings_group("backend")
    if isinstance(count := backend.get("processes"), int) and count > 1:
        figures["processes"] = f"{count} (backend={backend.get('name')})"
    known = {name: (run.receipt or {}).get(f"{name}_parameters") for name in ("trainable", "total")}
    return figures | {
        f"{name} parameters": f"{count:,}"
        for name, count in known.items()
        if isinstance(count, int)
    }


def _record_values(record: MetricsRecord, name: str | None) -> Mapping[str, Any]:
    """A record's values, or those of one adapter in it, empty where it has none."""
    return record if name is None else adapter_values(record, name)


def metric_changes(run: RunRecord) -> dict[str, dict[str, MetricChange]]:
    """{data set: {metric: value}}: the last evaluation in training (that of the step the adapter is
    of), and evaluation.json.
    """
    changes: dict[str, dict[str, MetricChange]] = {}
    for name in run.job_names:
        lines, best = _evaluation_steps(run, name), _best_step(run, name)
        chosen = [values for step, values in lines if best in (None, step)]
        if chosen:
            measured = {
                k: v
                for k, v in chosen[-1].items()
                if is_finite_number(v) and k not in NON_METRIC_KEYS
            }
            values = {
                k.removeprefix(EVALUATION_PREFIX): MetricChange(None, v)
                for k, v in measured.items()
            }
            changes[HELD_OUT_SET if name is None else f"{name}: {HELD_OUT_SET}"] = values
    for entry in run.evaluation:
        values = {name: _finite_change(change) for name, change in entry.metrics.items()}
        if known := {
            k: v for k, v in values.items() if v.after is not None or v.before is not None
        }:
            changes[entry.name] = known
    return changes


def _evaluation_steps(run: RunRecord, name: str | None) -> list[tuple[int, Mapping[str, Any]]]:
    """(step, values) of each evaluation in training."""
    by_step = [(r["step"], _record_values(r, name)) for r in run.log.records]
    return [
        (step, values)
        for step, values in by_step
        if any(key.startswith(EVALUATION_PREFIX) for key in values)
    ]


def _best_step(run: RunRecord, name: str | None) -> int | None:
    """The step whose adapter the run ended with, if that is not simply the last: judged again as
    the run judged it.
    """
    train = run.settings_group("train", name)
    if not train.get("load_best_model_at_end"):
        return None
    try:
        settings = TrainConfig.model_validate(train)
    except ValueError as error:  # pydantic's, of a run.yaml that no run wrote
        raise DataError(f"{run.path / RUN_FILE}: its train settings are invalid: {error}") from None
    standing = JobProgress()
    for step, values in _evaluation_steps(run, name):
        standing.steps = step
        standing.judge({k: v for k, v in values.items() if is_finite_number(v)}, settings)
    return standing.best_step


def _finite_change(change: MetricChange) -> MetricChange:
    """The same without what is not finite: JSON of the hub has no NaN."""
    before, after = (
        value if is_finite_number(value) else None for value in (change.before, change.after)
    )
    whole = change.interval is not None and all(map(math.isfinite, change.interval))
    return MetricChange(before, after, change.interval if whole else None)
