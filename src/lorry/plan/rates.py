"""How fast this machine is, as measured here, for `lorry plan`: `LORRY_HOME/rates.json`.

The rule: **a rate holds for the machine and the way of computing it was measured on, says when and
how, and is never kept against better knowledge.**

- Two machines are one only if host, processor (model, stepping, feature flags, cores this process
  may use), GPUs, format, threads, torch and kernels agree (`machine.identity`): every cloud Xeon
  has one name.
- A matrix rate is the best of several short products (train/resources/rate.py). One that was taken while
  others had the cores is shown, marked as such, and measured again by the next plan.
- A run's own steps are the better measurement (train/resources/rate.py writes them when a run ends). Of a
  quiet machine they are what the plan says for models of like size; of a busy one they prove only
  that the machine is no slower.
- A matrix rate that a later run contradicts is measured anew.

The file is a cache: damaged, or of an earlier format, it counts as empty.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from lorry.disk import documents, durable
from lorry.disk.documents import is_finite_number
from lorry.disk.home import lorry_home
from lorry.errors import DataError

RATES_FORMAT = 2  # 1: {name of the processor: FLOP/s}, without when or how
RATES_FILE = "rates.json"
BUSY_LOAD = 0.1  # share of its time that a thread waited for a core; more: the machine was busy
# models and micro-batches whose steps reach like rates differ by at most this factor
LIKE_FACTOR = 3.0
SATURATED_TOKENS = 1024  # tokens of a micro-batch beyond which more of them bring no better rate
# a run this many times off the rate that the usual share of it says contradicts the matrix rate
FAR_FACTOR = 2.5
MOST_RUNS, MOST_MACHINES = 16, 64  # kept in the file, the newest
FASTEST_RATE = 1e18  # FLOP/s that no single machine reaches

LayerPath = Literal["fused", "plain"]
MachineIdentity = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RateMeasurement:
    """``rate``: FLOP/s; ``at``: UTC, ISO 8601; ``repeats``: products or steps it was taken from;
    ``load``: the system's load average over a minute; ``waited``: share of the time that the
    measuring thread waited for a core. None: the system does not say."""

    rate: float
    at: str
    repeats: int
    load: float | None = None
    waited: float | None = None

    @property
    def busy(self) -> bool:
        """Whether others had the cores meanwhile."""
        return self.waited is not None and self.waited > BUSY_LOAD

    def words(self, things: str) -> str:
        """When and how."""
        when = datetime.fromisoformat(self.at).strftime("%Y-%m-%d %H:%M UTC")
        load = "" if self.load is None else f", load {self.load:.1f}"
        busy = (
            ""
            if not self.busy
            else f", the machine was busy: {self.waited:.0%} of the time went to other programs"
        )
        return f"{self.repeats} {things} on {when}{load}{busy}"


@dataclass(frozen=True, kw_only=True)
class RunRate(RateMeasurement):
    """What a run's training steps reached: FLOPs of the plan over seconds. ``parameters``: of the
    model; ``tokens``: of a micro-batch; ``path``: see `memory.layer_path`."""

    model: str
    parameters: int
    tokens: int
    path: LayerPath

    def like(self, parameters: int, tokens: int, path: LayerPath) -> bool:
        """Whether steps of such a model and micro-batch reach about the same rate."""
        sizes = (
            self.parameters / max(parameters, 1),
            min(self.tokens, SATURATED_TOKENS) / max(min(tokens, SATURATED_TOKENS), 1),
        )
        return self.path == path and all(1 / LIKE_FACTOR <= size <= LIKE_FACTOR for size in sizes)


@dataclass(frozen=True)
class KnownRates:
    """Everything measured on one machine in one way of computing."""

    matrix: RateMeasurement | None = None
    runs: Sequence[RunRate] = field(default_factory=tuple)

    def of_runs(
        self, parameters: int, tokens: int, path: LayerPath, *, quiet: bool
    ) -> RunRate | None:
        """The best that runs of like size reached, all of them or the ``quiet`` ones."""
        like = [
            run
            for run in self.runs
            if run.like(parameters, tokens, path) and not (quiet and run.busy)
        ]
        return max(like, key=lambda run: run.rate, default=None)

    def trusted(self, efficiencies: Mapping[str, float]) -> bool:
        """Whether the matrix rate needs no new measurement: quiet, and contradicted by no run."""
        matrix = self.matrix
        return (
            matrix is not None
            and not matrix.busy
            and not any(contradicts_measurement(run, matrix, efficiencies) for run in self.runs)
        )


def contradicts_measurement(
    run: RunRate, matrix: RateMeasurement, efficiencies: Mapping[str, float]
) -> bool:
    """Whether a run that ended after ``matrix`` was measured shows it to be wrong: faster than a
    step can be, or far from the usual share, which is ``efficiencies`` by the path of its layers. A busy
    run can only show it to be too low."""
    # both are UTC in one format, so text compares as time does
    if run.at <= matrix.at:
        return False
    usual = efficiencies[run.path] * matrix.rate
    return run.rate > min(matrix.rate, FAR_FACTOR * usual) or (
        not run.busy and run.rate * FAR_FACTOR < usual
    )


def utc_timestamp() -> str:
    """The time as a measurement states it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- the file


def read_known_rates(identity: MachineIdentity) -> KnownRates:
    """What was measured on this machine; a damaged file knows nothing. Raises DiskError where it
    cannot be read.
    """
    return next(
        (_known_from_entry(entry) for entry in _read_entries() if entry.get("machine") == identity),
        KnownRates(),
    )


def keep_matrix_rate(
    identity: MachineIdentity, measured: RateMeasurement, *, instead: bool = False
) -> RateMeasurement:
    """Keep a matrix rate; one of a busy machine only if no better one is known, unless that one is
    wrong (``instead``). Returns the one that is kept. Raises DiskError."""
    before = read_known_rates(identity)
    if (
        not instead
        and before.matrix is not None
        and measured.busy
        and before.matrix.rate >= measured.rate
    ):
        return before.matrix  # others on the cores only make it look slower: the faster is nearer
    _write_rates(identity, KnownRates(measured, before.runs))
    return measured


def keep_run_rate(identity: MachineIdentity, run: RunRate) -> None:
    """Add what a run reached. Raises DiskError."""
    before = read_known_rates(identity)
    _write_rates(identity, KnownRates(before.matrix, [*before.runs, run][-MOST_RUNS:]))


def _write_rates(identity: MachineIdentity, what: KnownRates) -> None:
    # behind all others: the list is cut from its front, so the machine used last stays longest
    others = [entry for entry in _read_entries() if entry.get("machine") != identity]
    matrix = None if what.matrix is None else asdict(what.matrix)
    mine = {"machine": dict(identity), "matrix": matrix, "runs": [asdict(run) for run in what.runs]}
    text = (
        json.dumps({"format": RATES_FORMAT, "machines": [*others, mine][-MOST_MACHINES:]}, indent=1)
        + "\n"
    )
    durable.make_directory(lorry_home())
    durable.write_files(lorry_home(), {RATES_FILE: text.encode()})


def _read_entries() -> list[dict[str, Any]]:
    """The entries of the file, one per machine, as they stand there. Raises DiskError where they
    cannot be read: whoever took that for an empty file would write it without what it holds."""
    try:
        document = documents.read_object(lorry_home() / RATES_FILE)
    except DataError:
        return []
    entries = document.get("machines") if document.get("format") == RATES_FORMAT else None
    return (
        [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    )


def _known_from_entry(entry: Mapping[str, Any]) -> KnownRates:
    """An entry without what is no measurement."""
    runs = entry.get("runs")
    return KnownRates(
        _read_measurement(entry.get("matrix")),
        [
            run
            for value in (runs if isinstance(runs, list) else [])
            if (run := _read_run_rate(value)) is not None
        ],
    )


def _read_measurement(value: Any) -> RateMeasurement | None:
    if (
        not isinstance(value, dict)
        or not _is_positive(value.get("rate"))
        or not _is_count(value.get("repeats"))
    ):
        return None
    at: Any = value.get("at")
    load, waited = value.get("load"), value.get("waited")
    if not _is_time(at) or not all(
        x is None or (is_finite_number(x) and x >= 0) for x in (load, waited)
    ):
        return None
    return RateMeasurement(
        rate=float(value["rate"]), at=at, repeats=value["repeats"], load=load, waited=waited
    )


def _read_run_rate(value: Any) -> RunRate | None:
    measured = _read_measurement(value)
    if measured is None or value.get("path") not in ("fused", "plain"):
        return None
    if not isinstance(value.get("model"), str) or not (
        _is_count(value.get("parameters")) and _is_count(value.get("tokens"))
    ):
        return None
    return RunRate(
        **asdict(measured),
        **{name: value[name] for name in ("model", "parameters", "tokens", "path")},
    )


def _is_positive(value: Any) -> bool:
    return is_finite_number(value) and 0 < value < FASTEST_RATE


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_time(value: Any) -> bool:
    try:
        # without a time zone it could not be compared with one that has it
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False
