"""What a run measured, from its files alone: metrics.jsonl and evaluation.json as figures and results of data sets.

Try: ``figures(read(run_dir))``. The hub's card and nothing else reads these; the report has its own, which know no settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorry.config import TrainConfig
from lorry.config.files import read_file
from lorry.disk import documents, receipt
from lorry.disk.metrics import Record, iterate
from lorry.errors import DataError
from lorry.train.jobs import Standing

HELD_OUT = "held-out rows, at the end of training"
# terms of a loss of several are logged with their factors: neither is what it is called elsewhere
NO_METRICS = frozenset(["step", "eval_nll", "eval_distill"])


@dataclass(frozen=True)
class Facts:
    """The files of a run. ``config``: run.yaml; ``records``: the lines of metrics.jsonl; the others as their JSON has them;
    ``datasets``: hub ids among its sources, None where nobody has looked yet."""

    name: str
    config: Mapping[str, Any]
    receipt: Mapping[str, Any]
    contracts: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]
    records: list[Record]
    datasets: list[str] | None = None

    def group(self, name: str, job: str | None = None) -> dict[str, Any]:
        """A group of settings (lora, data, train ...) as it is for the run, or for one of its jobs; empty where it is null."""
        jobs = self.config.get("jobs") or []
        own = next((j.get(name) for j in jobs if len(jobs) == 1 or j["name"] == job), None)
        return {**(self.config.get(name) or {}), **(own or {})}

    @property
    def jobs(self) -> list[dict[str, Any]]:
        """The jobs of a run of several; none of a run of one."""
        jobs = self.config.get("jobs") or []
        return jobs if len(jobs) > 1 else []

    @property
    def names(self) -> list[str | None]:
        """What is told apart: the jobs, or None for the run itself."""
        return [str(job["name"]) for job in self.jobs] or [None]


@dataclass(frozen=True)
class Value:
    """A metric before training (the base) and after it, and the interval of the latter; each may be missing."""

    before: float | None
    after: float | None
    interval: tuple[float, float] | None = None


def read(run_dir: Path) -> Facts:
    """The files of a run, those that are there. Raises ConfigError or DataError naming the one that cannot be read."""
    described, logged = run_dir / "run.yaml", run_dir / "metrics.jsonl"
    return Facts(
        run_dir.resolve().name,
        read_file(described).values if described.is_file() else {},
        receipt.read(run_dir / "receipt.json") or {},
        [c for c in _list(run_dir / "contracts.json") if isinstance(c, dict)],
        [e for e in _list(run_dir / "evaluation.json") if isinstance(e, dict)],
        [record for _, record in iterate(logged)] if logged.is_file() else [],
    )


def _list(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    found = documents.read_json(path)
    if not isinstance(found, list):
        raise DataError(f"{path}: expected a JSON list, got {type(found).__name__}")
    return found


def figures(facts: Facts) -> dict[str, str]:
    """Steps, losses and tokens, by name; of several jobs the losses of each. Neither time nor memory: a run that was killed and
    went on leaves the same card, to the bit, as one that never stopped; the report has both."""
    steps = [r for r in facts.records if "loss" in r]
    found: dict[str, str] = {}
    for name in facts.names:
        own = [(r["step"], r if name is None else one) for r in steps if (one := _of(r, name)) is not None]
        if own:
            lead = "" if name is None else f"{name}: "
            found |= {f"{lead}steps": str(own[-1][0]), f"{lead}last loss": str(own[-1][1]["loss"])}
            if (best := _best(facts, name)) is not None:
                found[f"{lead}adapter of step"] = f"{best} (the best evaluated)"
    sums = {name: sum(r[name] for r in steps if _number(r.get(name))) for name in ("tokens", "supervised_tokens")}
    if steps:
        found |= {"tokens read": f"{sums['tokens']:,}", "of which learnt": f"{sums['supervised_tokens']:,}"}
    known = {name: facts.receipt.get(f"{name}_parameters") for name in ("trainable", "total")}
    return found | {f"{name} parameters": f"{count:,}" for name, count in known.items() if isinstance(count, int)}


def _of(record: Record, name: str | None) -> Mapping[str, Any] | None:
    """A record's values, or those of one adapter in it, if it has any."""
    if name is None:
        return record
    one = record.get("adapters", {}).get(name)
    return one if isinstance(one, dict) else None


def results(facts: Facts) -> dict[str, dict[str, Value]]:
    """{data set: {metric: value}}: the last evaluation in training (that of the step the adapter is of), and evaluation.json."""
    found: dict[str, dict[str, Value]] = {}
    for name in facts.names:
        lines, best = _evaluations(facts, name), _best(facts, name)
        chosen = [values for step, values in lines if best in (None, step)]
        if chosen:
            measured = {k: v for k, v in chosen[-1].items() if _number(v) and k not in NO_METRICS}
            values = {k.removeprefix("eval_"): Value(None, v) for k, v in measured.items()}
            found[HELD_OUT if name is None else f"{name}: {HELD_OUT}"] = values
    for entry in facts.evaluation:
        metrics = entry.get("metrics")
        values = {str(k): _value(v) for k, v in metrics.items()} if isinstance(metrics, dict) else {}
        if kept := {k: v for k, v in values.items() if v.after is not None or v.before is not None}:
            found[str(entry.get("name", "evaluation"))] = kept
    return found


def _evaluations(facts: Facts, name: str | None) -> list[tuple[int, Mapping[str, Any]]]:
    """(step, values) of each evaluation in training."""
    found = [(r["step"], _of(r, name)) for r in facts.records]
    return [(step, values) for step, values in found if values is not None and any(k.startswith("eval_") for k in values)]


def _best(facts: Facts, name: str | None) -> int | None:
    """The step whose adapter the run ended with, if that is not simply the last: judged again as the run judged it."""
    train = facts.group("train", name)
    if not train.get("load_best_model_at_end"):
        return None
    settings, standing = TrainConfig.model_validate(train), Standing()
    for step, values in _evaluations(facts, name):
        standing.steps = step
        standing.judge({k: v for k, v in values.items() if _number(v)}, settings)
    return standing.best_step


def _value(pair: Any) -> Value:
    """One metric of evaluation.json: {before, after, interval}, or the value after training alone."""
    sides = pair if isinstance(pair, dict) else {"after": pair}
    before, after = (sides.get(k) if _number(sides.get(k)) else None for k in ("before", "after"))
    interval = sides.get("interval")
    whole = isinstance(interval, list) and len(interval) == 2 and all(map(_number, interval))
    return Value(before, after, (interval[0], interval[1]) if whole and interval is not None else None)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
