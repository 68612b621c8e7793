"""A suite as data, and how its metrics are measured one after the other.

    suite.order(["model_utility"])      # with all it is made of, parts first
    measure_suite(suite, names, model, logs, results)

A metric is a function of what a model was asked and of the records of other metrics (its parents):
so a metric that was measured before and kept needs no model. A record is open-unlearning's:
``agg_value`` and, of rows, ``value_by_index``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lorry.errors import ConfigError, suggest_nearest
from lorry.evaluate.unlearning.retain_logs import RetainLogs
from lorry.evaluate.unlearning.rows import SuiteSet
from lorry.evaluate.unlearning.scores import SuiteModel

MetricRecord = dict[str, Any]


@dataclass(frozen=True)
class SuiteRequest:
    """Which rows of a suite are asked. ``local``: {suite, or suite.SPLIT: folder or file}; TOFU's
    splits and the column that is asked; ``corpus``: of MUSE, News or Books.
    """

    local: Mapping[str, str]
    forget_split: str = "forget10"
    holdout_split: str | None = None
    question_key: str = "question"
    corpus: str = "News"


@dataclass(frozen=True)
class SuiteInputs:
    """All that a metric may look at: the model, the records of its parents, the oracle's logs (None
    where there are none), whether extraction strength has open-unlearning's floor.
    """

    model: SuiteModel
    records: Mapping[str, MetricRecord]
    logs: RetainLogs | None = None
    peer_floor: bool = False


@dataclass(frozen=True)
class SuiteMetric:
    """``measure(inputs)`` gives the record. ``fields``: {role: answer fields} it asks of the model
    itself; ``generates``: it needs answers; ``moments``: and mean and variance of log p;
    ``needs_logs``: it means nothing without the oracle's; ``reads_logs``: it looks at them.
    """

    measure: Callable[[SuiteInputs], MetricRecord]
    parents: tuple[str, ...] = ()
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    generates: bool = False
    moments: bool = False
    needs_logs: bool = False
    reads_logs: bool = False


@dataclass(frozen=True)
class Suite:
    """A benchmark of unlearning. ``metrics``: all there are; ``default``: those measured unless some
    are named; ``title``: what its files are called; ``load(roles, request)``: its rows by role;
    ``main``: the metric, higher is better, that says what a model still knows of the rest.
    """

    name: str
    title: str
    metrics: Mapping[str, SuiteMetric]
    default: tuple[str, ...]
    load: Callable[[Mapping[str, tuple[str, ...]], SuiteRequest], dict[str, SuiteSet]]
    main: str

    def choose(self, names: Sequence[str], *, logs: bool) -> tuple[list[str], list[str]]:
        """(names to measure, parts first; notes). Raises ConfigError for an unknown one, or one
        that was asked for and needs the oracle's logs where there are none.
        """
        for name in names:
            if name not in self.metrics:
                raise ConfigError(
                    f"metrics: suite {self.name} has no {name!r}"
                    f"{suggest_nearest(name, self.metrics)}; there are {', '.join(self.metrics)}"
                )
            if self.metrics[name].needs_logs and not logs:
                raise ConfigError(
                    f"metrics: {name} compares with a model that was never trained "
                    "on the forget set (the oracle); give its EVAL.json as "
                    "retain_logs_path=FILE"
                )
        chosen = list(names) or [
            name for name in self.default if logs or not self.metrics[name].needs_logs
        ]
        # said only of what is left out by us: whoever names metrics knows which
        left = [name for name in self.default if not names and name not in chosen]
        notes = [
            (f"{', '.join(left)} not computed: give retain_logs_path=FILE, the oracle's EVAL.json")
        ]
        return self.order(chosen), notes if left else []

    def order(self, names: Iterable[str]) -> list[str]:
        """The metrics and all that they are made of, each behind its parts."""
        ordered: dict[str, None] = {}
        for name in names:
            # the parents' own parents first; metrics are data of ours, so there is no circle
            for part in self.order(self.metrics[name].parents):
                ordered.setdefault(part)
            ordered.setdefault(name)
        return list(ordered)

    def roles(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """{role: answer fields} that these metrics ask of the model."""
        fields_by_role: dict[str, dict[str, None]] = {}
        for name in names:
            for role, fields in self.metrics[name].fields.items():
                fields_by_role.setdefault(role, {}).update(dict.fromkeys(fields))
        return {role: tuple(fields) for role, fields in fields_by_role.items()}

    def roles_of(self, name: str) -> list[str]:
        """The roles whose rows a metric hangs on, through its parts too."""
        return sorted(self.roles(self.order([name])))

    def flag(self, name: str, which: str) -> bool:
        """Whether a metric, or one of its parts, has a flag."""
        return any(bool(getattr(self.metrics[part], which)) for part in self.order([name]))


class RecordStore(Protocol):
    """Where records are kept from an earlier time, and written as soon as they are there."""

    def saved_record(self, name: str) -> MetricRecord | None: ...
    def add(self, name: str, record: MetricRecord) -> None: ...


def measure_suite(
    suite: Suite,
    names: Sequence[str],
    model: SuiteModel,
    *,
    logs: RetainLogs | None = None,
    store: RecordStore | None = None,
    peer_floor: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, MetricRecord]:
    """{metric: its record} for ``names`` in their order (`Suite.choose`). Raises DataError,
    NonFiniteError, ModelError; what was finished before stays in the store.
    """
    records: dict[str, MetricRecord] = {}
    saved_records = {
        name: store.saved_record(name) if store is not None else None for name in names
    }
    # only of what is still to be measured: a suite that goes on scores nothing for nobody
    due = [name for name in names if saved_records[name] is None]
    scored = (name for name in due if not suite.metrics[name].generates)
    generated = (name for name in due if suite.metrics[name].generates)
    model.expect(suite.roles(scored), list(suite.roles(generated)))
    for name in names:
        record = saved_records[name]
        if record is None:
            tell(name)
            record = suite.metrics[name].measure(SuiteInputs(model, records, logs, peer_floor))
            if logs is not None and suite.metrics[name].reads_logs:
                # a value against an oracle says nothing without saying which: a report marks it
                record["retain_logs"] = logs.summary()
            # at once: a suite that is killed goes on behind its last finished metric
            if store is not None:
                store.add(name, record)
        records[name] = record
    return records
