"""A run's metrics as series of numbers, in the order of their steps (the file's format:
runs/metrics.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from lorry.runs.metrics import MetricsRecord, iter_metrics

EVALUATION_PREFIX = "eval_"  # names of an evaluation line's values begin with this
# a run of several adapters has a mapping of each one's values under this name
ADAPTERS_KEY = "adapters"


# What a file may hold that a report can show; the rest is left out, and a note says how much. Far
# above real runs.
MOST_NAMES = 1000
MOST_ADAPTERS = 1024  # above config.jobs.MOST_JOBS: the card takes each job's figures from here
LONGEST_NAME = 200  # characters


@dataclass
class MetricsLog:
    """The lines of one metrics file; ``notes`` say what was left out and why."""

    records: list[MetricsRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def training(self) -> list[MetricsRecord]:
        """The lines of optimizer steps."""
        return [r for r in self.records if not is_evaluation_record(r)]

    def names(self) -> list[str]:
        """Names that hold a number in at least one line, in the order of their first appearance,
        without ``step``.
        """
        seen = {
            name: None
            for record in self.records
            for name, value in record.items()
            if is_number(value)
        }
        return [name for name in seen if name != "step"]

    def adapters(self) -> list[str]:
        """Names of the adapters that have values of their own; none in a run of one adapter."""
        return list({name: None for record in self.records for name in _adapter_records(record)})

    def series(self, name: str, adapter: str | None = None) -> tuple[list[int], list[float]]:
        """(steps, values) of one name, of the run or of one adapter, from the lines that hold it as
        a number.

        NaN and infinities are included.
        """
        values = [
            (r["step"], (r if adapter is None else adapter_values(r, adapter)).get(name))
            for r in self.records
        ]
        pairs = [(step, value) for step, value in values if is_number(value)]
        return [step for step, _ in pairs], [float(value) for _, value in pairs]


def _adapter_records(record: MetricsRecord) -> dict[str, dict[str, Any]]:
    value = record.get(ADAPTERS_KEY)
    return (
        {name: values for name, values in value.items() if isinstance(values, dict)}
        if isinstance(value, dict)
        else {}
    )


def adapter_values(record: MetricsRecord, adapter: str) -> dict[str, Any]:
    """What a line says of one adapter of a run of several; empty where it says nothing."""
    several = record.get(ADAPTERS_KEY)
    values = several.get(adapter) if isinstance(several, dict) else None
    return values if isinstance(values, dict) else {}


class _NameLimit:
    """The first ``most`` names of a kind, and how many different ones came beside them."""

    def __init__(self, most: int, *always: str) -> None:
        self.most, self.names, self.left_out = most, set(always), set[int]()

    def keep(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values of the names that are shown."""
        # nothing new in nearly every line: it is passed on without a copy
        new = values.keys() - self.names
        if not new:
            return values
        for name in (name for name in values if name in new):
            if len(name) <= LONGEST_NAME and len(self.names) < self.most:
                self.names.add(name)
            else:
                # hashes: millions of long names are possible, and only their number is told
                self.left_out.add(hash(name))
        return {name: value for name, value in values.items() if name in self.names}


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of a line counts as a number (true and false do not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_evaluation_record(record: MetricsRecord) -> bool:
    """Whether a line reports an evaluation and not an optimizer step."""
    return any(name.startswith(EVALUATION_PREFIX) for name in record) and "loss" not in record


def read_metrics(path: Path) -> MetricsLog:
    """The whole file; an absent file is an empty log.

    Where a training step repeats or goes back, the run was started again: lines from that step on
    are superseded, and a note says so. Raises DataError as `iter_metrics` does.
    """
    log = MetricsLog()
    if not path.exists():
        return log
    last = -1
    names, adapters = _NameLimit(MOST_NAMES, "step", ADAPTERS_KEY), _NameLimit(MOST_ADAPTERS)
    for number, line in iter_metrics(path):
        record = names.keep(line)
        if isinstance(several := record.get(ADAPTERS_KEY), dict):
            of_adapters = {
                name: names.keep(values)
                for name, values in adapters.keep(several).items()
                if isinstance(values, dict)
            }
            record = {**record, ADAPTERS_KEY: of_adapters}
        if not is_evaluation_record(record):
            step = record["step"]
            # an evaluation before the first step is of step 0, and no training step
            if step <= last:
                log.records = [r for r in log.records if r["step"] < step]
                log.notes.append(
                    f"{path.name}:{number}: the run starts again at step {step}; earlier lines from there are not shown"
                )
            last = step
        log.records.append(record)
    for what, limit in (("values", names), ("adapters", adapters)):
        if limit.left_out:
            log.notes.append(
                f"{path.name}: {len(limit.left_out)} {what} are not shown (a report shows "
                f"{limit.most}, with names of at most {LONGEST_NAME} characters)"
            )
    return log
