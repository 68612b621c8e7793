"""The one reader of a run directory, for the report, the card, the hub and every verb: files only,
each of them optional, each checked where it is read.

metrics.jsonl      see runs/metrics.py
run.yaml           the resolved settings, with `resolved:` for what was measured and chosen
receipt.json       digests of data, base, code, environment and adapter
contracts.json     [{"id": 1, "name": ..., "status": "held" | "failed" | "not_checked", "detail": ...}]
samples.json       [{"group": ..., "prompt": ..., "reference", "before", "after": text or null,
                     "tokens": [{"text": ..., "weight": 1.0}] or null}]: tokens show a row exactly as it was trained on
evaluation.json    [{"name": ..., "metrics": {"exact_match": {"before": 0.0, "after": 0.8, "interval": [0.7, 0.9]}}}]
process.json       who is at work there, or how it ended (runs/process.py)
evals/             suites of unlearning and attacks (runs/evals.py), read for a report alone

Run directories come from elsewhere and are damaged by disks: every file goes through the strict
reader (disk/documents.py, runs/metrics.py), and every field is checked here, so that what shows a
run can rely on it. A run that cannot be read is listed as damaged and hides no other: `read_run`
raises DataError for all that is wrong with it, and nothing else. Whoever needs one file of a run
calls its reader here (`read_contracts`, `read_samples`, `read_evaluation`) and opens nothing itself:
two readers of a file come to differ in what they pass over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lorry.disk import documents, receipt
from lorry.disk.integrity import file_digest
from lorry.errors import DataError, LorryError, ModelError, RunFilesError
from lorry.runs import evals, ownership, process, series
from lorry.runs.evals import RunEvals
from lorry.runs.layout import (
    ADAPTER_WEIGHTS,
    CONTRACTS,
    EVALUATION,
    EXPERTS,
    METRICS,
    PROCESS,
    RECEIPT,
    ROUTER,
    ROUTER_FILE,
    RUN_FILE,
    SAMPLES,
    RunDir,
)
from lorry.runs.process import RunProcess
from lorry.runs.series import MetricsLog, is_number

RUN_FILES = (METRICS, RUN_FILE, RECEIPT, CONTRACTS, SAMPLES, EVALUATION, PROCESS)
# Items of a file, far above what a run writes: more would take minutes to show.
MOST_CONTRACTS, MOST_SAMPLES, MOST_EVALUATIONS, MOST_METRICS = 1000, 100_000, 1000, 2000
CONTRACT_STATUSES = ("held", "failed", "not_checked")


@dataclass(frozen=True)
class ContractRecord:
    """One thing the run promised and whether it was so: ``status`` is held, failed or not_checked."""

    id: int
    name: str
    status: str
    detail: str = ""


@dataclass(frozen=True)
class TokenWeight:
    """A token of a training row and the weight of its loss; 0 means context only."""

    text: str
    weight: float


@dataclass(frozen=True)
class SampleRecord:
    """A prompt, what was expected, what the model said before and after; or a training row as
    ``tokens``.
    """

    group: str
    prompt: str
    reference: str | None = None
    before: str | None = None
    after: str | None = None
    tokens: tuple[TokenWeight, ...] | None = None


@dataclass(frozen=True)
class MetricChange:
    """A metric before training (the base) and after it, and the 95% interval (low, high) of the
    latter; each may be missing.
    """

    before: float | None
    after: float | None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class EvaluationRecord:
    """Metrics of one data set by name."""

    name: str
    metrics: dict[str, MetricChange]


@dataclass(frozen=True)
class RunRecord:
    """Everything that the files of a run say. ``config``: run.yaml, empty where there is none;
    ``config_text``: the same as it is written; ``process_alive``: see `is_process_alive`; ``evals``:
    empty but in what `read_readable_runs` gives.
    """

    path: Path
    name: str
    log: MetricsLog
    config: dict[str, Any]
    config_text: str
    receipt: dict[str, Any] | None
    contracts: tuple[ContractRecord, ...]
    samples: tuple[SampleRecord, ...]
    evaluation: tuple[EvaluationRecord, ...]
    process: RunProcess | None = None
    process_alive: bool | None = False
    evals: RunEvals = field(default_factory=RunEvals)

    @cached_property
    def described_jobs(self) -> dict[str, dict[str, Any]]:
        """The jobs of run.yaml by name: a run may have a thousand, each of which is asked for its
        groups many times.
        """
        jobs = self.config.get("jobs") or []
        sound = isinstance(jobs, list) and all(
            isinstance(job, dict) and isinstance(job.get("name"), str) for job in jobs
        )
        if not sound:
            raise RunFilesError(
                f"{self.path / RUN_FILE}: jobs has to be a list of mappings, each with a 'name'"
            )
        return {job["name"]: job for job in jobs}

    @property
    def jobs(self) -> list[dict[str, Any]]:
        """The jobs of a run of several; none of a run of one. Raises DataError."""
        jobs = self.described_jobs
        return list(jobs.values()) if len(jobs) > 1 else []

    @property
    def job_names(self) -> list[str | None]:
        """What is told apart: the jobs, or None for the run itself. Raises DataError."""
        return [job["name"] for job in self.jobs] or [None]

    def settings_group(self, name: str, job: str | None = None) -> dict[str, Any]:
        """A group of settings (lora, data, train ...) as it is for the run, or for one of its jobs,
        whose own settings go before the run's; empty where it is null. Raises DataError where
        run.yaml holds something else there.
        """
        jobs = self.described_jobs
        # a run of one job is that job, and nothing else of it has the job's name
        own = next(iter(jobs.values()), {}) if len(jobs) == 1 else jobs.get(job or "", {})
        return _settings_map(self, name, self.config.get(name)) | _settings_map(
            self, name, own.get(name)
        )


def _settings_map(run: RunRecord, name: str, group: Any) -> dict[str, Any]:
    if not isinstance(group, dict | None):
        raise RunFilesError(
            f"{run.path / RUN_FILE}: {name!r} has to be a mapping of settings, got "
            f"{type(group).__name__}"
        )
    return group or {}


@dataclass(frozen=True)
class DamagedRun:
    """A run directory that is there and cannot be read; ``why`` opens with the file and the place."""

    path: Path
    name: str
    why: str


def read_readable_runs(paths: Sequence[Path]) -> tuple[list[RunRecord], list[DamagedRun]]:
    """The runs that can be read, each with a name of its own (the directory's, with as many parents
    as tell them apart) and with what lies in its evals/, and those that are damaged. Raises DataError where none can be read, or
    where a path is no run directory at all.
    """
    if not paths:
        raise RunFilesError("a report needs at least one run directory")
    for path in paths:
        _require_run(path)
    runs, damaged = list[RunRecord](), list[DamagedRun]()
    for path, name in zip(paths, _distinct_names([p.resolve() for p in paths]), strict=True):
        try:
            run = read_run(path, name)
            runs.append(replace(run, evals=_read_evals(run)))
        except DataError as error:
            damaged.append(DamagedRun(path, name, str(error)))
    if not runs:
        raise RunFilesError("; ".join(damaged_run.why for damaged_run in damaged))
    return runs, damaged


def _distinct_names(paths: list[Path]) -> list[str]:
    # as few parents as tell all of them apart
    for depth in range(1, max(len(p.parts) for p in paths) + 1):
        names = ["/".join(p.parts[-depth:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    raise RunFilesError(f"{paths[0]}: the same run directory is given twice")


def read_run(path: Path, name: str | None = None) -> RunRecord:
    """Read a run directory. Raises DataError if it is none, or naming the file and place that
    cannot be read.
    """
    _require_run(path)
    try:
        return _read_run_files(path, name or path.resolve().name)
    except (
        OSError
    ) as error:  # no right to read it, a disk that fails, or it moved away while we looked
        raise RunFilesError(
            f"{error.filename or path}: cannot be read ({error.strerror})"
        ) from error


def _require_run(path: Path) -> None:
    if not path.is_dir():
        raise RunFilesError(f"{path}: no such run directory")
    if not any((path / file).exists() for file in RUN_FILES):
        if (path / ROUTER / ROUTER_FILE).is_file():
            own = f"; its experts' run is {path / EXPERTS}" if (path / EXPERTS).is_dir() else ""
            raise RunFilesError(
                f"{path}: a mixture without {RUN_FILE}, so that it is no run directory (earlier versions described none that "
                f"no run trains); `lorry doctor`, "
                f"`lorry eval` and `lorry chat` read it{own}"
            )
        raise RunFilesError(f"{path}: not a run directory; it has none of {', '.join(RUN_FILES)}")


def _read_run_files(path: Path, name: str) -> RunRecord:
    # A run that ends while it is read has written its last steps between one file and the next.
    # It writes process.json three times (started, begun, ended), so that the fourth is the last.
    for _ in range(4):
        run = _read_files_once(path, name)
        if run.process == process.read_process(path):
            break
    return run


def _read_files_once(path: Path, name: str) -> RunRecord:
    # before the other files: of a process that has ended they are complete
    running = process.read_process(path)
    alive = running is not None and process.is_process_alive(running, path)
    config_text = _read_text(path / RUN_FILE)
    return RunRecord(
        path=path,
        name=name,
        # in this order: the first file that is damaged is the one that is named
        log=series.read_metrics(path / METRICS),
        config=_parse_config(config_text, path / RUN_FILE),
        config_text=config_text,
        receipt=receipt.read(path / RECEIPT),
        contracts=read_contracts(path),
        samples=read_samples(path),
        evaluation=read_evaluation(path),
        process=running,
        process_alive=alive,
    )


def _read_evals(run: RunRecord) -> RunEvals:
    """Raises DataError for a damaged file of the run; of start and oracle, which lie elsewhere, a
    note says it.
    """
    try:
        run_evals = RunEvals(evals.read_suites(run.path), evals.read_attacks(run.path))
    except OSError as error:
        raise RunFilesError(f"{error.filename}: cannot be read ({error.strerror})") from error
    try:
        start = evals.find_start(run.path, run.receipt)
        if start is not None:
            run_evals = replace(run_evals, start=evals.read_suites(start), origin=start)
    except (LorryError, OSError) as error:
        run.log.notes.append(f"the values of the start are not shown: {error}")
    try:
        run_evals = replace(run_evals, oracles=evals.read_oracles(run_evals.suites))
    except (LorryError, OSError) as error:
        run.log.notes.append(f"the oracle's curves are not shown: {error}")
    return run_evals


def read_contracts(run_dir: Path) -> tuple[ContractRecord, ...]:
    """What the run promised; empty where contracts.json is not there. Raises DataError, OSError."""
    items = _read_list(run_dir / CONTRACTS, MOST_CONTRACTS)
    return tuple(_read_contract(item, where) for where, item in items)


def read_samples(run_dir: Path) -> tuple[SampleRecord, ...]:
    """Answers and training rows; empty where samples.json is not there. Raises DataError, OSError."""
    items = _read_list(run_dir / SAMPLES, MOST_SAMPLES)
    return tuple(_read_sample(item, where) for where, item in items)


def read_evaluation(run_dir: Path) -> tuple[EvaluationRecord, ...]:
    """What was measured after training; empty where evaluation.json is not there. Raises DataError,
    OSError.
    """
    items = _read_list(run_dir / EVALUATION, MOST_EVALUATIONS)
    return tuple(_read_evaluation(item, where) for where, item in items)


def recorded_weights(run_dir: Path, run_receipt: Mapping[str, Any] | None) -> dict[Path, str]:
    """SHA-256 of every file of weights that a run wrote, of adapters or a whole model, by its path; empty
    without a receipt. Raises DataError."""
    adapters = receipt.part(run_receipt, "adapters")
    folders = {name: RunDir(run_dir).adapter(name, len(adapters)) for name in adapters}
    own = {folders[name] / ADAPTER_WEIGHTS: digest for name, digest in adapters.items()}
    weights = receipt.part(run_receipt, "weights")
    return own | {run_dir / file: digest for file, digest in weights.items()}


def verify_weight_file(file: Path, digest: str) -> None:
    """Raises ModelError where a file of weights is missing, or is not the one of this SHA-256 that its run
    wrote: somebody replaced it, or a disk lost a bit."""
    if not file.is_file():
        raise ModelError(f"{file} is missing, and {RECEIPT} lists it")
    # the file whole and not its header: what an editor of weights changes is inside
    if file_digest(file) != digest:
        raise ModelError(
            f"{file} is not the file that this run wrote: its SHA-256 differs from {RECEIPT}'s"
        )


def _read_text(path: Path) -> str:
    """The text of a run description, empty where there is none."""
    try:
        return documents.read_text(path, ownership.MOST_DESCRIPTION)
    except FileNotFoundError:
        return ""


def _parse_config(text: str, path: Path) -> dict[str, Any]:
    content, _ = documents.parse_yaml(text, str(path))
    if content is not None and not isinstance(content, dict):
        raise RunFilesError(
            f"{path}: settings have to be a mapping of names, got {type(content).__name__}"
        )
    return content or {}


def _read_json(path: Path) -> Any:
    try:
        return documents.read_json_document(path)
    except FileNotFoundError:
        return None


def _read_list(path: Path, most: int) -> list[tuple[str, dict[str, Any]]]:
    """(where, item) of a JSON list of at most so many objects."""
    content = _read_json(path)
    if content is not None and not isinstance(content, list):
        raise RunFilesError(f"{path}: expected a list, got {type(content).__name__}")
    listed: list[Any] = content or []
    if len(listed) > most:
        raise RunFilesError(f"{path}: {len(listed)} items; a run writes at most {most} there")
    # counted from 1, as a person counts the items of a list
    items = [(f"{path}: item {index}", item) for index, item in enumerate(listed, 1)]
    for where, item in items:
        if not isinstance(item, dict):
            raise RunFilesError(f"{where} is not an object")
    return items


def _take_field(
    item: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str, default: Any = None
) -> Any:
    """item[key] of a given type, or ``default`` where it is absent or null."""
    value = item.get(key)
    # null counts as absent
    if value is None and default is not None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RunFilesError(
            f"{where}: {key!r} is {str(value)[:40]!r}, which is not valid in this file"
        )
    return value


def _read_contract(item: dict[str, Any], where: str) -> ContractRecord:
    status = _take_field(item, "status", str, where)
    if status not in CONTRACT_STATUSES:
        raise RunFilesError(
            f"{where}: status {status[:40]!r} is none of {', '.join(CONTRACT_STATUSES)}"
        )
    return ContractRecord(
        _take_field(item, "id", int, where),
        _take_field(item, "name", str, where),
        status,
        _take_field(item, "detail", str, where, ""),
    )


def _read_sample(item: dict[str, Any], where: str) -> SampleRecord:
    texts = {
        key: _take_field(item, key, (str, type(None)), where)
        for key in ("reference", "before", "after")
    }
    tokens = None
    if item.get("tokens") is not None:
        tokens = tuple(
            _read_token(token, where) for token in _take_field(item, "tokens", list, where)
        )
    return SampleRecord(
        _take_field(item, "group", str, where, "samples"),
        _take_field(item, "prompt", str, where),
        **texts,
        tokens=tokens,
    )


def _read_token(item: Any, where: str) -> TokenWeight:
    if not isinstance(item, dict):
        raise RunFilesError(f"{where}: a token is an object with 'text' and 'weight'")
    return TokenWeight(
        _take_field(item, "text", str, where),
        float(_take_field(item, "weight", (int, float), where)),
    )


def _read_evaluation(item: dict[str, Any], where: str) -> EvaluationRecord:
    metrics = {}
    if len(item_metrics := _take_field(item, "metrics", dict, where)) > MOST_METRICS:
        raise RunFilesError(
            f"{where} has {len(item_metrics)} metrics; a run writes at most {MOST_METRICS} there"
        )
    for name, pair in item_metrics.items():
        # a plain number is a measurement of the trained model alone
        sides = pair if isinstance(pair, dict) else {"after": pair}
        metrics[name] = MetricChange(
            _optional_number(sides.get("before"), name, where),
            _optional_number(sides.get("after"), name, where),
            _read_interval(sides.get("interval"), name, where),
        )
    return EvaluationRecord(_take_field(item, "name", str, where), metrics)


def _optional_number(value: Any, metric: str, where: str) -> float | None:
    if value is not None and not is_number(value):
        raise RunFilesError(
            f"{where}: metric {metric!r} holds {str(value)[:40]!r}, which is not a number"
        )
    return value


def _read_interval(ends: Any, metric: str, where: str) -> tuple[float, float] | None:
    """An interval's two ends; None where it, or one of its ends, is null: a bootstrap of one row
    has none.
    """
    if ends is None:
        return None
    if not isinstance(ends, list) or len(ends) != 2:
        raise RunFilesError(f"{where}: the interval of {metric!r} is a list of two numbers")
    low, high = (_optional_number(end, metric, where) for end in ends)
    return None if low is None or high is None else (low, high)
