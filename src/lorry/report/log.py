"""metrics.jsonl in and out: one JSON object a line, a training line per optimizer step and a line per evaluation.

    {"step": 10, "epoch": 0.2, "loss": 2.1, "learning_rate": 1e-4, "grad_norm": 0.9, "tokens": 812, "seconds": 1.2, ...}
    {"step": 10, "eval_loss": 1.9, "eval_perplexity": 6.7, ...}

``tokens`` and ``seconds`` are of this step alone. The file is strict JSON: numbers that JSON cannot hold are written as the
strings "NaN", "Infinity" and "-Infinity" and read back as numbers. A last line without its line end is being written at
this moment, or was when its writer was killed; it is left out unless it is whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from lorry.errors import DataError
from lorry.report.files import replace_file

Record = dict[str, Any]

EVALUATION = "eval_"  # names of an evaluation line's values begin with this
_BEYOND_JSON = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass
class Log:
    """The lines of one metrics file in the order of their steps; ``notes`` say what was left out and why."""

    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def training(self) -> list[Record]:
        """The lines of optimizer steps."""
        return [r for r in self.records if not is_evaluation(r)]

    def names(self) -> list[str]:
        """Names that hold a number in at least one line, in the order of their first appearance, without ``step``."""
        seen = {name: None for record in self.records for name, value in record.items() if is_number(value)}
        return [name for name in seen if name != "step"]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one name, from the lines that hold it as a number; NaN and infinities included."""
        pairs = [(r["step"], float(r[name])) for r in self.records if is_number(r.get(name))]
        return [step for step, _ in pairs], [value for _, value in pairs]


def is_number(value: object) -> bool:
    """Whether a value of a line counts as a number (true and false do not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_evaluation(record: Record) -> bool:
    """Whether a line reports an evaluation and not an optimizer step."""
    return any(name.startswith(EVALUATION) for name in record) and "loss" not in record


def iterate(path: Path) -> Iterator[tuple[int, Record]]:
    """(line number, record) of each line; a half-written last line is left out.

    Raises DataError with ``file:line`` at a line that is not a JSON object or has no whole ``step`` of 0 or more.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        unfinished = number == len(lines)
        if not line.strip() or (unfinished and not _is_whole(line)):
            continue
        yield number, _parse(line, f"{path}:{number}")


def _is_whole(line: bytes) -> bool:
    """Whether an unfinished last line lacks nothing but its line end: no part of an object is itself one."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parse(line: bytes, where: str) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); delete this line, or start the run afresh") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a metrics line is a JSON object, got {type(record).__name__}")
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**53:
        raise DataError(f"{where}: 'step' must be a whole number of 0 or more, got {str(step)[:40]!r}")
    return {name: _from_json(value) for name, value in record.items()}


def _from_json(value: Any) -> Any:
    if isinstance(value, str):
        return _BEYOND_JSON.get(value, value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**1023:
        return math.inf if value > 0 else -math.inf  # an integer that no float can hold would break every calculation later
    return value


def read(path: Path) -> Log:
    """The whole file; an absent file is an empty log.

    Where a training step repeats or goes back, the run was started again: lines from that step on are superseded, and a
    note says so. Raises DataError as `iterate` does.
    """
    log = Log()
    if not path.exists():
        return log
    last = -1
    for number, record in iterate(path):
        if not is_evaluation(record):
            step = record["step"]
            if step <= last:
                log.records = [r for r in log.records if r["step"] < step]
                log.notes.append(
                    f"{path.name}:{number}: the run starts again at step {step}; earlier lines from there are not shown"
                )
            last = step
        log.records.append(record)
    return log


def cut_after(path: Path, step: int) -> int:
    """Drop the lines of steps after ``step``, and a half-written last one, in one atomic replacement; how many went.

    For resuming from a checkpoint of ``step``; open the `MetricsWriter` afterwards. Lines that stay keep their bytes. An
    absent file is left absent. Raises DataError as `iterate` does.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().split(b"\n")
    kept = [lines[number - 1] for number, record in iterate(path) if record["step"] <= step]
    dropped = sum(bool(line.strip()) for line in lines) - len(kept)
    if dropped or lines[-1]:
        replace_file(path, b"".join(line + b"\n" for line in kept))
    return dropped


class MetricsWriter:
    """Appends one line per `write`, in a single system call: a killed run loses at most the line it was writing.

    Opening the file removes what an earlier kill left of a last line, or ends that line if it is whole.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        _mend(path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record; it must hold a whole ``step`` of 0 or more. The line is with the system when this returns."""
        line = json.dumps({name: _to_json(value) for name, value in record.items()}, ensure_ascii=False, allow_nan=False)
        _parse(line.encode(), "a metrics record")
        self._file.write(line.encode() + b"\n")

    def close(self) -> None:
        """Close the file; writing afterwards raises ValueError."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _mend(path: Path) -> None:
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end == len(content):
        return
    if _is_whole(content[end:]):
        with path.open("ab") as file:
            file.write(b"\n")
    else:
        os.truncate(path, end)
