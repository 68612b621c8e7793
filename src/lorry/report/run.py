"""A run directory as the report sees it: files only, every one of them optional, each checked where it is read.

metrics.jsonl      see log.py
run.yaml           the resolved settings, with `resolved:` for what was measured and chosen
receipt.json       digests of data, base, code, environment and adapter
contracts.json     [{"id": 1, "name": ..., "status": "held" | "failed" | "not_checked", "detail": ...}]
samples.json       [{"group": ..., "prompt": ..., "reference", "before", "after": text or null,
                     "tokens": [{"text": ..., "weight": 1.0}] or null}]: tokens show a row exactly as it was trained on
evaluation.json    [{"name": ..., "metrics": {"exact_match": {"before": 0.0, "after": 0.8}}}]
process.json       who is at work there, or how it ended (disk/process.py); read by states.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorry.errors import DataError
from lorry.report import log
from lorry.report.log import Log, is_number

FILES = ("metrics.jsonl", "run.yaml", "receipt.json", "contracts.json", "samples.json", "evaluation.json", "process.json")
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
    receipt: Any
    contracts: tuple[Contract, ...]
    samples: tuple[Sample, ...]
    evaluation: tuple[Evaluation, ...]


def load_all(paths: Sequence[Path]) -> list[Run]:
    """Several runs, each with a name of its own: the directory's, with as many parents as tell them apart."""
    if not paths:
        raise DataError("a report needs at least one run directory")
    return [load(path, name) for path, name in zip(paths, _names([p.resolve() for p in paths]), strict=True)]


def _names(paths: list[Path]) -> list[str]:
    for depth in range(1, max(len(p.parts) for p in paths) + 1):
        names = ["/".join(p.parts[-depth:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    raise DataError(f"{paths[0]}: the same run directory is given twice")


def load(path: Path, name: str | None = None) -> Run:
    """Read a run directory. Raises DataError if it is none, or naming the file and place that cannot be read."""
    if not path.is_dir():
        raise DataError(f"{path}: no such run directory")
    if not any((path / file).exists() for file in FILES):
        raise DataError(f"{path}: not a run directory; it has none of {', '.join(FILES)}")
    config_file = path / "run.yaml"
    return Run(
        path=path,
        name=name or path.resolve().name,
        log=log.read(path / "metrics.jsonl"),
        config=_read_yaml(config_file),
        config_text=_read_text(config_file) if config_file.exists() else "",
        receipt=_read_json(path / "receipt.json"),
        contracts=tuple(_contract(item, where) for where, item in _items(path / "contracts.json")),
        samples=tuple(_sample(item, where) for where, item in _items(path / "samples.json")),
        evaluation=tuple(_evaluation(item, where) for where, item in _items(path / "evaluation.json")),
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error})") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = yaml.safe_load(_read_text(path))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        raise DataError(f"{path}:{mark.line + 1 if mark else 1}: not YAML ({getattr(error, 'problem', error)})") from None
    if content is not None and not isinstance(content, dict):
        raise DataError(f"{path}: settings are a mapping of names, got {type(content).__name__}")
    return content or {}


def _read_json(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON ({error})") from None


def _items(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where, item) of a JSON list of objects."""
    content = _read_json(path)
    if content is not None and not isinstance(content, list):
        raise DataError(f"{path}: expected a list, got {type(content).__name__}")
    items = [(f"{path}: item {index}", item) for index, item in enumerate(content or [], 1)]
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
    for name, pair in _take(item, "metrics", dict, where).items():
        sides = pair if isinstance(pair, dict) else {"after": pair}
        before, after = (sides.get(side) for side in ("before", "after"))
        for value in (before, after):
            if value is not None and not is_number(value):
                raise DataError(f"{where}: metric {name!r} holds {str(value)[:40]!r}, which is not a number")
        metrics[name] = (before, after)
    return Evaluation(_take(item, "name", str, where), metrics)
