"""metrics.jsonl line by line, in and out: one JSON object a line, one per optimizer step and one
per evaluation.

    {"step": 10, "epoch": 0.2, "loss": 2.1, "learning_rate": 1e-4, "grad_norm": 0.9, "tokens": 812, "seconds": 1.2, ...}
    {"step": 10, "eval_loss": 1.9, "eval_perplexity": 6.7, ...}

``tokens`` and ``seconds`` are of this step alone. The file is strict JSON: numbers that JSON cannot
hold are written as the strings "NaN", "Infinity" and "-Infinity" and read back as numbers. A last
line without its line end is being written at this moment, or was when its writer was killed; it is
left out unless it is whole.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorry.disk import documents, durable
from lorry.errors import DataError, RunFilesError
from lorry.runs.closeable import CloseableResource

MetricsRecord = dict[str, Any]
MOST_BYTES = 1 << 30  # of the file: some three million steps

log = logging.getLogger(__name__)

_BEYOND_JSON = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def iter_metrics(path: Path) -> Iterator[tuple[int, MetricsRecord]]:
    """(line number, record) of each line; a half-written last line is left out.

    Raises DataError with ``file:line`` at a line that is not a JSON object or has no whole ``step``
    of 0 or more, and where there is no such file.
    """
    try:
        lines = documents.read_bytes(path, MOST_BYTES).split(b"\n")
    except FileNotFoundError:
        raise RunFilesError(
            f"{path} is missing, although a run writes it from its first step on"
        ) from None
    for number, line in enumerate(lines, 1):
        # split: behind the last line end there is one more piece, empty where the file is whole
        unfinished = number == len(lines)
        if not line.strip() or (unfinished and not _is_whole_line(line)):
            continue
        yield number, _parse_record(line, str(path), number)


def find_cut_line(path: Path) -> int | None:
    """The number of a last line that lacks its end, which `iter_metrics` leaves out; None where the file is
    whole, or not there. Raises DataError where it is too large, and OSError."""
    try:
        lines = documents.read_bytes(path, MOST_BYTES).split(b"\n")
    except FileNotFoundError:
        return None
    return len(lines) if lines[-1].strip() and not _is_whole_line(lines[-1]) else None


def _is_whole_line(line: bytes) -> bool:
    """Whether an unfinished last line lacks nothing but its line end: no part of an object is
    itself one.
    """
    try:
        return isinstance(_read_line(line, "", 1), dict)
    except DataError:
        return False


def _read_line(line: bytes, path: str, number: int) -> Any:
    """The value of a line; an integer of any size, since one that no float can hold becomes an
    infinity here.
    """
    return documents.parse_json(
        line, path, line=number, nonfinite=True, largest=10**documents.MOST_DIGITS
    )


def _parse_record(line: bytes, path: str, number: int = 1) -> MetricsRecord:
    where = f"{path}:{number}"
    try:
        record = _read_line(line, path, number)
    except DataError as error:
        raise RunFilesError(f"{error}; delete this line, or start the run afresh") from None
    if not isinstance(record, dict):
        raise RunFilesError(
            f"{where}: a metrics line is a JSON object, got {type(record).__name__}"
        )
    _refuse_step(record.get("step"), where)
    return {name: _decode_value(value) for name, value in record.items()}


def _refuse_step(step: Any, where: str) -> None:
    # 2^53: beyond it a JSON number is not exact for every reader
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**53:
        raise RunFilesError(
            f"{where}: 'step' must be a whole number of 0 or more, got {str(step)[:40]!r}"
        )


def _decode_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _decode_value(inner) for name, inner in value.items()}
    if isinstance(value, str):
        return _BEYOND_JSON.get(value, value)
    # 2^1023 and more need not fit a double, whose largest is just below 2^1024
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**1023:
        # an integer that no float can hold would break every calculation later
        return math.inf if value > 0 else -math.inf
    return value


def drop_metrics_after(path: Path, step: int) -> int:
    """Drop the lines of steps after ``step``, and a half-written last one, in one atomic
    replacement; how many went.

    For resuming from a checkpoint of ``step``; open the `MetricsWriter` afterwards. Lines that stay
    keep their bytes. An absent file is left absent. Raises DataError as `iter_metrics` does, and
    DiskError.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().split(b"\n")
    # the lines' own bytes: written anew their numbers might be spelt otherwise
    lines_before = [
        lines[number - 1] for number, record in iter_metrics(path) if record["step"] <= step
    ]
    dropped = sum(bool(line.strip()) for line in lines) - len(lines_before)
    # a whole last line without its end is kept, and gets its end
    if dropped or lines[-1]:
        durable.write_files(
            path.parent, {path.name: b"".join(line + b"\n" for line in lines_before)}
        )
    return dropped


class MetricsWriter(CloseableResource):
    """Appends one line per `write`, in a single system call: a killed run loses at most the line it
    was writing.

    Opening the file removes what an earlier kill left of a last line, or ends that line if it is
    whole. The directory must exist. A file that somebody removes meanwhile comes back whole with
    the next line: its content is still held open. One that somebody cut, wrote to or put another in
    place of is not a log of this run any more. Raises DiskError.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._size = path, 0
        self._open()
        self._mend()
        self._size = os.fstat(self._file).st_size

    def _open(self) -> None:
        try:
            # O_RDWR, to put a removed file back; O_APPEND: a line always lands at the end
            self._file = os.open(
                self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666
            )
        except OSError as error:
            raise durable.DiskError(error.errno, error.strerror, str(self._path)) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record; the line is with the system when this returns. Raises DataError without
        a whole ``step``.
        """
        _refuse_step(record.get("step"), "metrics record")
        line = json.dumps(_encode_value(dict(record)), ensure_ascii=False, allow_nan=False)
        if self._file >= 0:
            self._check()
        self._append(line.encode() + b"\n")

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        if self._file >= 0:
            durable.disk.close(self._file)
        self._file = -1

    def _check(self) -> None:
        """Whether the file is still what was written to it, under its name. Raises DiskError where
        it is not.
        """
        # the file held open and the one that bears the name now
        held = os.fstat(self._file)
        try:
            named = os.stat(self._path, follow_symlinks=True)
        except FileNotFoundError:
            self._put_back(held.st_size)
            return
        if (held.st_dev, held.st_ino) != (named.st_dev, named.st_ino) or held.st_size != self._size:
            what = (
                f"another program wrote to it or replaced it ({named.st_size} bytes, "
                f"{self._size} were written)"
            )
            raise durable.DiskError(errno.EEXIST, what, str(self._path))

    def _put_back(self, size: int) -> None:
        """Write a removed file again from the descriptor that still holds it."""
        durable.write_files(self._path.parent, {self._path.name: os.pread(self._file, size, 0)})
        log.warning(
            "%s was removed while the run was going on; it was written again and is complete",
            self._path,
        )
        durable.disk.close(self._file)
        self._open()

    def _append(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            # a write may take a part only, on a full disk or after a signal
            while rest:
                done = durable.disk.write(self._file, rest)
                self._size += done
                rest = rest[done:]
        except OSError as error:
            raise durable.DiskError(error.errno, error.strerror, str(self._path)) from error

    def _mend(self) -> None:
        content = self._path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content) and _is_whole_line(content[end:]):
            self._append(b"\n")
        elif end < len(content):
            durable.disk.truncate(self._file, end)


def _encode_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _encode_value(inner) for name, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
