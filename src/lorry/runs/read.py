"""A run directory as the report sees it: files only, every one of them optional, each checked where
it is read.

metrics.jsonl      see log.py
run.yaml           the resolved settings, with `resolved:` for what was measured and chosen
receipt.json       digests of data, base, code, environment and adapter
contracts.json     [{"id": 1, "name": ..., "status": "held" | "failed" | "not_checked", "detail": ...}]
samples.json       [{"group": ..., "prompt": ..., "reference", "before", "after": text or null,
                     "tokens": [{"text": ..., "weight": 1.0}] or null}]: tokens show a row exactly as it was trained on
evaluation.json    [{"name": ..., "metrics": {"exact_match": {"before": 0.0, "after": 0.8}}}]
process.json       who is at work there, or how it ended (runs/process.py)

Run directories come from elsewhere and are damaged by disks: every file goes through the strict
reader (disk/documents.py, runs/metrics.py), and every field is checked here, so that what shows a
run can rely on it. A run that cannot be read is listed as damaged and hides no other: `read_run`
raises DataError for all that is wrong with it, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorry.disk import documents, receipt
from lorry.errors import DataError
from lorry.runs import ownership, process, series
from lorry.runs.layout import CONTRACTS, EVALUATION, METRICS, PROCESS, RECEIPT, RUN_FILE, SAMPLES
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
class EvaluationRecord:
    """Metrics of one data set: name -> (before, after), either of which may be missing."""

    name: str
    metrics: dict[str, tuple[float | None, float | None]]


@dataclass(frozen=True)
class RunRecord:
    """Everything the report knows about a run."""

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


@dataclass(frozen=True)
class DamagedRun:
    """A run directory that is there and cannot be read; ``why`` opens with the file and the place."""

    path: Path
    name: str
    why: str


def read_readable_runs(paths: Sequence[Path]) -> tuple[list[RunRecord], list[DamagedRun]]:
    """The runs that can be read, each with a name of its own (the directory's, with as many parents
    as tell them apart), and those that are damaged. Raises DataError where none can be read, or
    where a path is no run directory at all.
    """
    if not paths:
        raise DataError("a report needs at least one run directory")
    for path in paths:
        _require_run(path)
    runs, damaged = list[RunRecord](), list[DamagedRun]()
    for path, name in zip(paths, _distinct_names([p.resolve() for p in paths]), strict=True):
        try:
            runs.append(read_run(path, name))
        except DataError as error:
            damaged.append(DamagedRun(path, name, str(error)))
    if not runs:
        raise DataError("; ".join(one.why for one in damaged))
    return runs, damaged


def _distinct_names(paths: list[Path]) -> list[str]:
    for depth in range(1, max(len(p.parts) for p in paths) + 1):
        names = ["/".join(p.parts[-depth:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    raise DataError(f"{paths[0]}: the same run directory is given twice")


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
        raise DataError(f"{error.filename or path}: cannot be read ({error.strerror})") from error


def _require_run(path: Path) -> None:
    if not path.is_dir():
        raise DataError(f"{path}: no such run directory")
    if not any((path / file).exists() for file in RUN_FILES):
        raise DataError(f"{path}: not a run directory; it has none of {', '.join(RUN_FILES)}")


def _read_run_files(path: Path, name: str) -> RunRecord:
    config_text = _read_text(path / RUN_FILE)
    return RunRecord(
        path=path,
        name=name,
        log=series.read_metrics(path / METRICS),
        config=_parse_config(config_text, path / RUN_FILE),
        config_text=config_text,
        receipt=receipt.read(path / RECEIPT),
        contracts=tuple(
            _read_contract(item, where)
            for where, item in _read_list(path / CONTRACTS, MOST_CONTRACTS)
        ),
        samples=tuple(
            _read_sample(item, where) for where, item in _read_list(path / SAMPLES, MOST_SAMPLES)
        ),
        evaluation=tuple(
            _read_evaluation(item, where)
            for where, item in _read_list(path / EVALUATION, MOST_EVALUATIONS)
        ),
        process=process.read_process(path),
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
        raise DataError(f"{path}: settings are a mapping of names, got {type(content).__name__}")
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
        raise DataError(f"{path}: expected a list, got {type(content).__name__}")
    listed: list[Any] = content or []
    if len(listed) > most:
        raise DataError(f"{path}: {len(listed)} items; a run writes at most {most} there")
    items = [(f"{path}: item {index}", item) for index, item in enumerate(listed, 1)]
    for where, item in items:
        if not isinstance(item, dict):
            raise DataError(f"{where} is not an object")
    return items


def _take_field(
    item: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str, default: Any = None
) -> Any:
    """item[key] of a given type, or ``default`` where it is absent or null."""
    value = item.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(
            f"{where}: {key!r} is {str(value)[:40]!r}, which is not what this file holds there"
        )
    return value


def _read_contract(item: dict[str, Any], where: str) -> ContractRecord:
    status = _take_field(item, "status", str, where)
    if status not in CONTRACT_STATUSES:
        raise DataError(
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
        raise DataError(f"{where}: a token is an object with 'text' and 'weight'")
    return TokenWeight(
        _take_field(item, "text", str, where),
        float(_take_field(item, "weight", (int, float), where)),
    )


def _read_evaluation(item: dict[str, Any], where: str) -> EvaluationRecord:
    metrics = {}
    if len(given := _take_field(item, "metrics", dict, where)) > MOST_METRICS:
        raise DataError(
            f"{where} has {len(given)} metrics; a run writes at most {MOST_METRICS} there"
        )
    for name, pair in given.items():
        sides = pair if isinstance(pair, dict) else {"after": pair}
        before, after = (sides.get(side) for side in ("before", "after"))
        for value in (before, after):
            if value is not None and not is_number(value):
                raise DataError(
                    f"{where}: metric {name!r} holds {str(value)[:40]!r}, which is not a number"
                )
        metrics[name] = (before, after)
    return EvaluationRecord(_take_field(item, "name", str, where), metrics)
