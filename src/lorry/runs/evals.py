"""What `lorry eval RUN suite=...` and `lorry attack RUN` left in a run's folder evals/, for whoever
shows runs: values, ROC curves, relearning curves, without the rows.

    suites = read_suites(Path("runs/npo"))
    suites[0].values["forget_quality"], suites[0].oracle

A suite's file (TOFU_EVAL.json) holds records by metric: ``agg_value``; of an attack on membership
``roc`` as well; of what was compared with an oracle ``retain_logs``, which oracle that was
(evaluate/unlearning/results.py). The start of a run is another run's directory: its values are
taken only where that directory still holds the very adapter that the run was trained over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorry.disk import documents, receipt
from lorry.disk.integrity import file_digest
from lorry.errors import RunFilesError
from lorry.runs.layout import (
    ADAPTER_WEIGHTS,
    ATTACKS,
    RECEIPT,
    START,
    STEP,
    SUITE_ROWS,
    SUITES,
)
from lorry.runs.series import is_number

# of a file, far above what a suite or an attack writes
MOST_FILES, MOST_RECORDS, MOST_ROC_POINTS, MOST_CURVE_POINTS = 100, 2000, 100_000, 10_000
Values = dict[str, float]


@dataclass(frozen=True)
class OracleValues:
    """The oracle that a suite was compared with: its EVAL.json, the digest of what that says, and
    its value of each metric.
    """

    path: str
    sha256: str
    values: Values


@dataclass(frozen=True)
class SuiteRecord:
    """A suite's file. ``part``: the adapter (of a run of several), the weight or WEIGHT/ADAPTER it
    is of, empty for the run as it is; ``rocs``: {attack: [(share of forget rows, share of rows never seen)]};
    ``rows``: {metric: {role: digest of its rows}}.
    """

    title: str
    part: str
    values: Values
    rocs: dict[str, list[tuple[float, float]]]
    rows: dict[str, dict[str, str]]
    oracle: OracleValues | None = None


@dataclass(frozen=True)
class AttacksRecord:
    """attacks.json. ``relearn``: {side: [{step, metric: value}]}; ``quantize``, ``rephrase``:
    {side: {rounding or wording: {metric: value}}}; ``robustness``: {metric: {R, Q, mean}}, or
    {metric: {attack: value}} where one of the two was made; ``rows``: {attack: digest of its rows}.
    """

    relearn: dict[str, list[Values]] = field(default_factory=dict)
    quantize: dict[str, dict[str, Values]] = field(default_factory=dict)
    rephrase: dict[str, dict[str, Values]] = field(default_factory=dict)
    robustness: dict[str, Values] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunEvals:
    """All of a run's evals/; ``start``: the suites of the run that its frozen adapter came from,
    ``origin``: that run's directory, None where it does not hold that adapter any more;
    ``oracles``: by the digest of what they say, those of the oracles' files that are still there.
    """

    suites: tuple[SuiteRecord, ...] = ()
    attacks: AttacksRecord | None = None
    start: tuple[SuiteRecord, ...] = ()
    origin: Path | None = None
    oracles: Mapping[str, SuiteRecord] = field(default_factory=dict)

    def start_suite(self, title: str) -> SuiteRecord | None:
        """A suite of the start as it is: at another weight it is another model, and no start."""
        return next((s for s in self.start if (s.title, s.part) == (title, "")), None)

    def start_values(self, own: SuiteRecord) -> Values:
        """The start's value of each metric that this suite was asked the same rows for: of another
        split it would be no start to compare with.
        """
        start = self.start_suite(own.title)
        if start is None:
            return {}
        return {n: v for n, v in start.values.items() if start.rows[n] == own.rows.get(n)}


def read_suites(run_dir: Path) -> tuple[SuiteRecord, ...]:
    """The suites of a run and of its parts, evaluations during training aside (metrics.jsonl has
    their values). Raises DataError for a damaged file, OSError.
    """
    folder = run_dir / SUITES
    # of a run of several adapters at another weight: evals/WEIGHT/ADAPTER/
    files = [
        path
        for depth in ("", "*/", "*/*/")
        for path in folder.glob(f"{depth}*{SUITE_ROWS}")
        if not STEP.fullmatch(path.relative_to(folder).parts[0])
    ]
    if len(files) > MOST_FILES:
        raise RunFilesError(f"{folder}: {len(files)} suites; a report shows at most {MOST_FILES}")
    return tuple(_read_suite(path, folder) for path in sorted(files))


def _read_suite(path: Path, folder: Path) -> SuiteRecord:
    part = "/".join(path.parent.relative_to(folder).parts)
    return _suite_of(_object(documents.read_json_document(path), path), path, part)


def _suite_of(records: Mapping[str, Any], path: Path, part: str) -> SuiteRecord:
    if len(records) > MOST_RECORDS:
        raise RunFilesError(f"{path}: {len(records)} metrics; a suite has at most {MOST_RECORDS}")
    values, rocs, rows, oracle = Values(), {}, {}, None
    for name, content in records.items():
        record, where = _object(content, f"{path}: {name}"), f"{path}: {name}"
        values[name] = _number(record.get("agg_value"), f"{where}.agg_value")
        if "roc" in record:
            rocs[name] = _read_roc(record["roc"], f"{where}.roc")
        rows[name] = _texts(record.get("rows") or {}, f"{where}.rows")
        if record.get("retain_logs") is not None:
            oracle = _read_oracle(record["retain_logs"], f"{where}.retain_logs")
    return SuiteRecord(path.name.removesuffix(SUITE_ROWS), part, values, rocs, rows, oracle)


def _read_oracle(content: Any, where: str) -> OracleValues:
    fields = _object(content, where)
    texts = _texts({name: fields.get(name) for name in ("path", "sha256")}, where)
    if "\0" in texts["path"]:  # every call of the system refuses it, each in its own way
        raise RunFilesError(f"{where}.path is not a path")
    return OracleValues(texts["path"], texts["sha256"], _values(fields.get("values"), where))


def _read_roc(content: Any, where: str) -> list[tuple[float, float]]:
    if not isinstance(content, list) or len(content) > MOST_ROC_POINTS:
        raise RunFilesError(f"{where} is not a list of at most {MOST_ROC_POINTS} points")
    points = []
    for point in content:
        if not isinstance(point, list) or len(point) != 2:
            raise RunFilesError(f"{where}: a point has to be a list of two shares")
        points.append((_number(point[0], where), _number(point[1], where)))
    return points


def read_oracles(suites: Sequence[SuiteRecord]) -> dict[str, SuiteRecord]:
    """{digest: the oracle's own record} of the oracles whose file still says what it said. Raises
    DataError for a damaged one, OSError.
    """
    oracles = {}
    for oracle in {s.oracle.sha256: s.oracle for s in suites if s.oracle is not None}.values():
        path = Path(oracle.path)
        if not path.is_file():
            continue
        # published logs have numbers that are none
        records = _object(documents.read_json_document(path, nonfinite=True), path)
        # as RetainLogs has it: of what the file says, not of its bytes
        digest = hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()
        if digest == oracle.sha256:
            oracles[digest] = _suite_of(records, path, "")
    return oracles


def read_attacks(run_dir: Path) -> AttacksRecord | None:
    """What attacks found, None where none was made. Raises DataError for a damaged file, OSError."""
    path = run_dir / SUITES / ATTACKS
    try:
        content = _object(documents.read_json_document(path), path)
    except FileNotFoundError:
        return None
    parts: dict[str, dict[str, Any]] = {
        name: _object(content[name], f"{path}: {name}")
        for name in ("relearn", "quantize", "rephrase")
        if name in content
    }
    relearn = {
        side: _read_curve(curve, f"{path}: relearn.{side}")
        for side, curve in _object(
            parts.get("relearn", {}).get("curves") or {}, f"{path}: relearn.curves"
        ).items()
    }
    tables = {
        attack: {
            side: {
                kind: _values(values, f"{path}: {attack}.{side}.{kind}")
                for kind, values in _object(numbers, f"{path}: {attack}.{side}").items()
            }
            for side, numbers in _object(
                parts.get(attack, {}).get("values") or {}, f"{path}: {attack}.values"
            ).items()
        }
        for attack in ("quantize", "rephrase")
    }
    robust = {
        metric: _values(values, f"{path}: robustness.{metric}")
        for metric, values in _object(
            content.get("robustness") or {}, f"{path}: robustness"
        ).items()
    }
    # of one attack alone the file has its part of the three
    for attack, letter in (("relearn", "R"), ("quantize", "Q")) if not robust else ():
        part = parts.get(attack, {}).get("robustness") or {}
        for metric, value in _values(part, f"{path}: {attack}.robustness").items():
            robust.setdefault(metric, {})[letter] = value
    rows = _texts(
        {name: part["rows"] for name, part in parts.items() if "rows" in part}, f"{path}: rows"
    )
    return AttacksRecord(relearn, tables["quantize"], tables["rephrase"], robust, rows)


def _read_curve(content: Any, where: str) -> list[Values]:
    if not isinstance(content, list) or len(content) > MOST_CURVE_POINTS:
        raise RunFilesError(f"{where} is not a list of at most {MOST_CURVE_POINTS} points")
    points = [_values(point, where) for point in content]
    if any("step" not in point for point in points):
        raise RunFilesError(f"{where}: a point has no step")
    return points


def find_start(run_dir: Path, run_receipt: Mapping[str, Any] | None) -> Path | None:
    """The directory of the run that this one's frozen adapter came from, where it still holds that
    adapter; else None. Raises DataError, OSError.
    """
    base = receipt.part(run_receipt, "base")
    origin = base.get("start")
    if not isinstance(origin, dict) or not isinstance(origin.get("path"), str):
        return None
    start = Path(origin["path"])
    # each adapter has a copy of what it was trained over
    names = list(receipt.part(run_receipt, "adapters"))
    folders = [run_dir] if len(names) < 2 else [run_dir / name for name in names]
    copies = [folder / START / ADAPTER_WEIGHTS for folder in folders]
    if not (start / RECEIPT).is_file() or not all(copy.is_file() for copy in copies):
        return None
    # a receipt's digests are those of files
    copied = {file_digest(copy) for copy in copies}
    digests = receipt.part(receipt.read(start / RECEIPT), "adapters")
    return start if copied <= set(digests.values()) else None


def _object(content: Any, where: object) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise RunFilesError(f"{where}: expected a JSON object, got {type(content).__name__}")
    return content


def _values(content: Any, where: str) -> Values:
    """{name: number} of an object."""
    numbers = _object(content, where)
    if len(numbers) > MOST_RECORDS:
        raise RunFilesError(f"{where}: {len(numbers)} values; there are at most {MOST_RECORDS}")
    return {name: _number(value, f"{where}.{name}") for name, value in numbers.items()}


def _texts(content: Any, where: str) -> dict[str, str]:
    texts = _object(content, where)
    for name, value in texts.items():
        if not isinstance(value, str):
            raise RunFilesError(f"{where}.{name} is {str(value)[:40]!r} instead of a text")
    return texts


def _number(value: Any, where: str) -> float:
    if not is_number(value):
        raise RunFilesError(f"{where} is {str(value)[:40]!r} instead of a number")
    return float(value)
