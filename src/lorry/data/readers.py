"""Readers: one file in, rows or faults out, each with its ``file:line``. No row is ever lost without a word.

JSON lines are read here line by line, not through a table library, so that one bad line has a place and a reason and
the rest stay readable. Files are only ever parsed: nothing in them is executed or unpickled.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorry.data.badrows import BadRow
from lorry.errors import DataError

UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
UTF8_MARK = b"\xef\xbb\xbf"
JSON_LAYOUTS = "a JSON array of rows, an object with a 'data' array, or JSON lines"
CUT_OFF = "a NUL byte; the file was probably cut off while being written"
LARGEST_FIELD = 1 << 28  # characters of one CSV field; the csv module's own 131072 refuses long documents


@dataclass(frozen=True)
class Row:
    """One row of a source: its columns, and ``where`` it stands (``people.jsonl:17``)."""

    values: dict[str, Any]
    where: str

    @property
    def file(self) -> str:
        """``where`` without the line."""
        return self.where.rpartition(":")[0]


@dataclass(frozen=True)
class Fault:
    """A row that could not be read: where, why, and its raw text."""

    where: str
    bad: BadRow
    raw: str


Rows = Iterator[Row | Fault]


def read_jsonl(path: Path, shown: str) -> Rows:
    """JSON lines: one object a line, blank lines ignored, read lazily."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                raw = _without_mark(raw, shown)
            if raw.strip():
                where = f"{shown}:{number}"
                parsed = _object_of(raw)
                yield Fault(where, parsed, _printable(raw)) if isinstance(parsed, BadRow) else Row(parsed, where)


def read_json(path: Path, shown: str) -> Rows:
    """A JSON array of objects, ``{"data": [...]}``, or JSON lines under the wrong name. The array forms are read whole."""
    with path.open("rb") as file:
        filled = (line for line in file if line.removeprefix(UTF8_MARK).strip())
        first = _without_mark(next(filled, b""), shown)
        second = next(filled, b"")
    opening = first.strip()[:1]
    if opening == b"{":
        whole = _object_of(first)
        goes_on = first.rstrip()[-1:] in (b"{", b"[", b",")  # an object laid out over several lines, not a broken one
        if isinstance(whole, dict) and not isinstance(whole.get("data"), list):
            return read_jsonl(path, shown)
        if isinstance(whole, BadRow) and second.lstrip()[:1] == b"{" and not goes_on:
            return read_jsonl(path, shown)
    elif opening != b"[":
        raise DataError(f"{shown}:1: expected {JSON_LAYOUTS}, found {_printable(first[:40])!r}")
    return _read_array(path, shown)


def read_csv(path: Path, shown: str) -> Rows:
    """CSV with a header line, separated by whichever of ``, ; tab`` the header uses most. A record may span lines."""
    csv.field_size_limit(LARGEST_FIELD)
    with path.open("rb") as probe:
        _without_mark(probe.read(4), shown)
    # surrogateescape keeps a row with broken UTF-8 in its place, so that it alone is bad and not the rest of the file
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        header_line = file.readline()
        delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header_line.count)
        file.seek(0)
        table = csv.reader(file, delimiter=delimiter, strict=True)
        header = _header(next(table, []), shown)
        while True:
            where = f"{shown}:{table.line_num + 1}"
            try:
                cells = next(table, None)
            except csv.Error as error:
                raise DataError(f"{where}: {error} (a quote that is opened must be closed)") from error
            if cells is None:
                return
            if cells:
                bad = _bad_cells(cells, header)
                yield Fault(where, bad, delimiter.join(cells)) if bad else Row(dict(zip(header, cells, strict=True)), where)


def read_parquet(path: Path, shown: str) -> Rows:
    """Parquet, a group of rows at a time; the number after the colon counts rows from 1."""
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as table:
            for group in table.iter_batches(batch_size=1024):
                for values in group.to_pylist():
                    number += 1
                    yield Row(values, f"{shown}:{number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{shown}:{number + 1}: not a readable parquet file: {error}") from error


def read_txt(path: Path, shown: str) -> Rows:
    """Plain text: one document per file (encoding cuts it into max_length pieces; a blank line is no document border)."""
    raw = _without_mark(path.read_bytes(), shown)
    text = _decoded(raw)
    where = f"{shown}:1"
    yield Fault(where, text, _printable(raw[:1000])) if isinstance(text, BadRow) else Row({"text": text}, where)


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_txt,
}


def _without_mark(raw: bytes, shown: str) -> bytes:
    """Drop a UTF-8 byte order mark; refuse UTF-16."""
    if raw.startswith(UTF16_MARKS):
        raise DataError(f"{shown}:1: the file is UTF-16; save it as UTF-8")
    return raw.removeprefix(UTF8_MARK)


def _printable(raw: bytes) -> str:
    return raw.decode("utf-8", errors="backslashreplace").rstrip("\r\n")


def _decoded(raw: bytes) -> str | BadRow:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRow("encoding", f"column {error.start + 1}: byte 0x{raw[error.start]:02x} is not valid UTF-8")
    if "\0" in text:
        return BadRow("encoding", f"column {text.index(chr(0)) + 1}: {CUT_OFF}")
    return text


def _object_of(raw: bytes) -> dict[str, Any] | BadRow:
    """One line as a JSON object, or why it is none."""
    text = _decoded(raw)
    if isinstance(text, BadRow):
        return text
    text = text.rstrip()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        cut = "; the line is cut off" if error.pos >= len(text) or error.msg.startswith("Unterminated") else ""
        return BadRow("json", f"column {error.colno}: not valid JSON: {error.msg}{cut}")
    except (RecursionError, ValueError) as error:
        return BadRow("json", f"column 1: not usable JSON: {_why(error)}")
    if not isinstance(value, dict):
        return BadRow("not an object", f"column 1: expected an object such as {{...}}, found {_kind(value)}")
    return value


def _why(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null", dict: "an object"}
    return names.get(type(value), "a number")


def _read_array(path: Path, shown: str) -> Rows:
    """The elements of a JSON array one after the other, each with the line it starts on and its index."""
    text = _decoded(path.read_bytes().removeprefix(UTF8_MARK))
    if isinstance(text, BadRow):
        raise DataError(f"{shown}:1: {text.reason}")
    scan = _Scanner(text, shown)
    scan.enter_array()
    index = 0
    while scan.peek() != "]":
        line, start = scan.line(), scan.at
        value = scan.value(f"element {index}")
        where = f"{shown}:{line}"
        if isinstance(value, dict):
            yield Row(value, where)
        else:
            bad = BadRow("not an object", f"element {index} is {_kind(value)}, expected an object")
            yield Fault(where, bad, text[start : scan.at])
        index += 1
        if scan.peek() == ",":
            scan.at += 1
        elif scan.peek() != "]":
            raise scan.wrong(f"expected ',' or ']' after element {index - 1}")


class _Scanner:
    """A cursor over JSON text that knows its line."""

    def __init__(self, text: str, shown: str) -> None:
        self.text, self.shown, self.at = text, shown, 0
        self._decode = json.JSONDecoder().raw_decode
        self._line, self._counted = 1, 0

    def line(self) -> int:
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def peek(self) -> str:
        """Skip white space; the next character, or an error at the end of the file."""
        while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
            self.at += 1
        if self.at == len(self.text):
            raise self.wrong("the file ends in the middle of the array")
        return self.text[self.at]

    def value(self, what: str) -> Any:
        try:
            value, self.at = self._decode(self.text, self.at)
        except json.JSONDecodeError as error:
            place = f"{self.shown}:{error.lineno}: column {error.colno}"
            raise DataError(f"{place}: {what} is not valid JSON: {error.msg}") from error
        except (RecursionError, ValueError) as error:
            raise self.wrong(f"{what} is not usable JSON: {_why(error)}") from error
        return value

    def enter_array(self) -> None:
        """Move behind the ``[`` of the array of rows, which may stand under the key 'data' of an object."""
        if self.peek() == "{":
            self.at += 1
            while self.peek() != "}":
                key = self.value("a key")
                if self.peek() != ":":
                    raise self.wrong("expected ':' after a key")
                self.at += 1
                if self.peek() == "[" and key == "data":
                    break
                self.value(f"the value of {key!r}")
                if self.peek() == ",":
                    self.at += 1
            else:
                raise self.wrong(f"expected {JSON_LAYOUTS}")
        self.at += 1

    def wrong(self, reason: str) -> DataError:
        column = self.at - (self.text.rfind("\n", 0, self.at) + 1) + 1
        return DataError(f"{self.shown}:{self.line()}: column {column}: {reason}")


def _header(names: list[str], shown: str) -> list[str]:
    if not names:
        raise DataError(f"{shown}:1: the file is empty; a header line with column names is needed")
    if "" in names or len(set(names)) != len(names):
        raise DataError(f"{shown}:1: the header needs a different name for every column, found {', '.join(map(repr, names))}")
    if any(not name.isprintable() for name in names):
        raise DataError(f"{shown}:1: the header is not valid UTF-8 text: {', '.join(map(ascii, names))}")
    return names


def _bad_cells(cells: list[str], header: list[str]) -> BadRow | None:
    """Why a CSV record cannot be used, or None."""
    if len(cells) != len(header):
        return BadRow("columns", f"the row has {len(cells)} columns, the header {len(header)}")
    for name, cell in zip(header, cells, strict=True):
        if "\0" in cell:
            return BadRow("encoding", f"column {name!r}: {CUT_OFF}")
        if not cell.isascii() and any("\udc80" <= letter <= "\udcff" for letter in cell):
            return BadRow("encoding", f"column {name!r} is not valid UTF-8")
    return None
