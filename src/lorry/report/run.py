"""A run directory as the report sees it: files only, every one of them optional, each checked where it is read.

metrics.jsonl      see log.py
run.yaml           the resolved settings, with `resolved:` for what was measured and chosen
receipt.json       digests of data, base, code, environment and adapter
contracts.json     [{"id": 1, "name": ..., "status": "held" | "failed" | "not_checked", "detail": ...}]
samples.json       [{"group": ..., "prompt": ..., "reference", "before", "after": text or null,
                     "tokens": [{"text": ..., "weight": 1.0}] or null}]: tokens show a row exactly as it was trained on
evaluation.json    [{"name": ..., "metrics": {"exact_match": {"before": 0.0, "after": 0.8}}}]
process.json       who is at work there, or how it ended (disk/process.py)

Run directories come from elsewhere and are damaged by disks: every file goes through the strict reader (disk/documents.py,
disk/metrics.py), and every field is checked here, so that what shows a run can rely on it. A run that cannot be read is listed
as damaged and hides no other: `load` raises DataError for all that is wrong with it, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorry.disk import documents, ownership, process, receipt
from lorry.disk.process import Process
from lorry.errors import DataError
from lorry.report import log
from lorry.report.log import Log, is_number

FILES = ("metrics.jsonl", "run.yaml", "receipt.json", "contracts.json", "samples.json", "evaluation.json", "process.json")
# Items of a file, far above what a run writes: more would take minutes to show.
MOST_CONTRACTS, MOST_SAMPLES, MOST_EVALUATIONS, MOST_METRICS = 1000, 100_000, 1000, 2000
STATUSES = ("held", "failed", "not_checked")


@dataclass(frozen=True)
class Contract:
    """One thing the run promised and whether it was so: ``status`` is held, failed or not_checked."""

    id: int
    name: str
    status: str
    detail: str = ""


@dataclass(frozen=True)
class Token:
    """A token of a training row and the weight of its loss; 0 means context only."""

    text: str
    weight: float


@dataclass(frozen=True)
class Sample:
    """A prompt, what was expected, what the model said before and after; or a training row as ``tokens``."""

    group: str
    prompt: str
    reference: str | None = None
    before: str | None = None
    after: str | None = None
    tokens: tuple[Token, ...] | None = None


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one data set: name -> (before, after), either of which may be missing."""

    name: str
    metrics: dict[str, tuple[float | None, float | None]]


@dataclass(frozen=True)
class Run:
    """Everything the report knows about a run."""

    path: Path
    name: str
    log: Log
    config: dict[str, Any]
    config_text: str
    receipt: dict[str, Any] | None
    contracts: tuple[Contract, ...]
    samples: tuple[Sample, ...]
    evaluation: tuple[Evaluation, ...]
    process: Process | None = None


@dataclass(frozen=True)
class Damaged:
    """A run directory that is there and cannot be read; ``why`` opens with the file and the place."""

    path: Path
    name: str
    why: str


def load_readable(paths: Sequence[Path]) -> tuple[list[Run], list[Damaged]]:
    """The runs that can be read, each with a name of its own (the directory's, with as many parents as tell them apart), and
    those that are damaged. Raises DataError where none can be read, or where a path is no run directory at all."""
    if not paths:
        raise DataError("a report needs at least one run directory")
    for path in paths:
        _refuse_other(path)
    runs, damaged = list[Run](), list[Damaged]()
    for path, name in zip(paths, _names([p.resolve() for p in paths]), strict=True):
        try:
            runs.append(load(path, name))
        except DataError as error:
            damaged.append(Damaged(path, name, str(error)))
    if not runs:
        raise DataError("; ".join(one.why for one in damaged))
    return runs, damaged


def _names(paths: list[Path]) -> list[str]:
    for depth in range(1, max(len(p.parts) for p in paths) + 1):
        names = ["/".join(p.parts[-depth:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    raise DataError(f"{paths[0]}: the same run directory is given twice")


def load(path: Path, name: str | None = None) -> Run:
    """Read a run directory. Raises DataError if it is none, or naming the file and place that cannot be read."""
    _refuse_other(path)
    try:
        return _load(path, name or path.resolve().name)
    except OSError as error:  # no right to read it, a disk that fails, or it moved away while we looked
        raise DataError(f"{error.filename or path}: cannot be read ({error.strerror})") from error


def _refuse_other(path: Path) -> None:
    if not path.is_dir():
        raise DataError(f"{path}: no such run directory")
    if not any((path / file).exists() for file in FILES):
        raise DataError(f"{path}: not a run directory; it has none of {', '.join(FILES)}")


def _load(path: Path, name: str) -> Run:
    config_text = _read_text(path / "run.yaml")
    return Run(
        path=path,
        name=name,
        log=log.read(path / "metrics.jsonl"),
        config=_settings(config_text, path / "run.yaml"),
        config_text=config_text,
        receipt=receipt.read(path / "receipt.json"),
        contracts=tuple(_contract(item, where) for where, item in _items(path / "contracts.json", MOST_CONTRACTS)),
        samples=tuple(_sample(item, where) for where, item in _items(path / "samples.json", MOST_SAMPLES)),
        evaluation=tuple(_evaluation(item, where) for where, item in _items(path / "evaluation.json", MOST_EVALUATIONS)),
        process=process.read(path),
    )


def _read_text(path: Path) -> str:
    """The text of a run description, empty where there is none."""
    try:
        return documents.read_text(path, ownership.MOST_DESCRIPTION)
    except FileNotFoundError:
        return ""


def _settings(text: str, path: Path) -> dict[str, Any]:
    content, _ = documents.parse_yaml(text, str(path))
    if content is not None and not isinstance(content, dict):
        raise DataError(f"{path}: settings are a mapping of names, got {type(content).__name__}")
    return content or {}


def _read_json(path: Path) -> Any:
    try:
        return documents.read_json(path)
    except FileNotFoundError:
        return None


def _items(path: Path, most: int) -> list[tuple[str, dict[str, Any]]]:
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


def _take(item: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str, default: Any = None) -> Any:
    """item[key] of a given type, or ``default`` where it is absent or null."""
    value = item.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where}: {key!r} is {str(value)[:40]!r}, which is not what this file holds there")
    return value


def _contract(item: dict[str, Any], where: str) -> Contract:
    status = _take(item, "status", str, where)
    if status not in STATUSES:
        raise DataError(f"{where}: status {status[:40]!r} is none of {', '.join(STATUSES)}")
    return Contract(_take(item, "id", int, where), _take(item, "name", str, where), status, _take(item, "detail", str, where, ""))


def _sample(item: dict[str, Any], where: str) -> Sample:
    texts = {key: _take(item, key, (str, type(None)), where) for key in ("reference", "before", "after")}
    tokens = None
    if item.get("tokens") is not None:
        tokens = tuple(_token(token, where) for token in _take(item, "tokens", list, where))
    return Sample(_take(item, "group", str, where, "samples"), _take(item, "prompt", str, where), **texts, tokens=tokens)


def _token(item: Any, where: str) -> Token:
    if not isinstance(item, dict):
        raise DataError(f"{where}: a token is an object with 'text' and 'weight'")
    return Token(_take(item, "text", str, where), float(_take(item, "weight", (int, float), where)))


def _evaluation(item: dict[str, Any], where: str) -> Evaluation:
    metrics = {}
    if len(given := _take(item, "metrics", dict, where)) > MOST_METRICS:
        raise DataError(f"{where} has {len(given)} metrics; a run writes at most {MOST_METRICS} there")
    for name, pair in given.items():
        sides = pair if isinstance(pair, dict) else {"after": pair}
        before, after = (sides.get(side) for side in ("before", "after"))
        for value in (before, after):
            if value is not None and not is_number(value):
                raise DataError(f"{where}: metric {name!r} holds {str(value)[:40]!r}, which is not a number")
        metrics[name] = (before, after)
    return Evaluation(_take(item, "name", str, where), metrics)
