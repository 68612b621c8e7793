"""Readers of JSON: one object or string a line, or arrays of them, whatever their layout.

JSON lines are read here line by line, not through a table library, so that one bad line has a place
and a reason and the rest stay readable. Several arrays one after the other, as joined exports have
them, are all read; anything else behind the end of an array is refused.

An array of strings, as MUSE's raw texts are written, is an array of rows ``{"text": string}``, and so
are lines of strings. The first two elements (or lines) that can be read and are not null say whether
a file is one: a single string
before or among objects is a bad row, and so are strings under 'data', which may be a column of a
row, the only line of a file, which may be anything in quotes, and a string that holds a row: the
file was encoded twice, and its braces would be learnt as text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lorry.data.reading.bad_rows import BadRow
from lorry.data.reading.encodings import UTF8_MARK, printable_bytes, strip_byte_order_mark
from lorry.data.reading.json_decoder import NOT_AN_OBJECT, RowDecoder, not_an_object
from lorry.data.reading.json_scanner import JsonScanner
from lorry.data.reading.rows import LARGEST_ROW, DataRow, FileRemark, RowFault, RowStream
from lorry.errors import DataError, shortlist_names

JSON_LAYOUTS = "a JSON array of rows or of texts, an object with a 'data' array, or JSON lines"
TWICE_ENCODED = "a row inside a string: it was encoded as JSON twice; write the object itself"


# Columns that make a row of training data (data/reading/formats.py): what has them beside a list
# called data is a row, no export of rows
ROW_COLUMNS = frozenset(
    [
        "prompt",
        "completion",
        "messages",
        "conversations",
        "conversation",
        "instruction",
        "output",
        "question",
        "query",
        "answer",
        "answers",
        "response",
        "text",
    ]
)


def read_jsonl(path: Path, shown: str) -> RowStream:
    """JSON lines: one object a line, or one string a line (a text), blank lines and byte order marks before one (joined files)
    ignored, read lazily.

    Raises DataError where the first two lines that are not blank show that the file has another
    layout: each of its lines would be a bad row, and could be skipped. One damaged line before a
    sound one is a bad row like any other.
    """
    yield from _settle_strings(_line_elements(path, shown), bare=True, alone=False)


def _line_elements(path: Path, shown: str) -> Iterator[ArrayElement]:
    decoder, first = RowDecoder(), True
    with path.open("rb") as file:
        for number, raw in enumerate(_bounded_lines(file), 1):
            if number == 1:
                raw = strip_byte_order_mark(raw, shown)
            elif raw[:1] == b"\xef":
                raw = raw.removeprefix(UTF8_MARK)
            if raw.strip():
                where = f"{shown}:{number}"
                parsed = decoder.value_of(raw)
                if (
                    first
                    and isinstance(parsed, BadRow)
                    and (layout := _describe_other_layout(raw.strip(), parsed))
                    and not _is_one_damaged_line(path, decoder)
                ):
                    raise DataError(f"{where}: {layout}")
                first = False
                if isinstance(parsed, dict):
                    yield DataRow(parsed, where)
                elif isinstance(parsed, str):
                    yield _StringElement(where, parsed, printable_bytes(raw), "column 1: ")
                else:
                    yield RowFault(where, parsed, printable_bytes(raw[:LARGEST_ROW]))


def read_json_rows(path: Path, shown: str) -> RowStream:
    """A JSON array of objects or of strings, ``{"data": [...]}``, several of these one after the
    other, or JSON lines under the wrong name.
    """
    with path.open("rb") as probe:
        strip_byte_order_mark(probe.read(8), shown)
    # surrogateescape keeps an element with broken UTF-8 in its place, so that it alone is bad and
    # not the rest of the file
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        scan = JsonScanner(file, shown)
        # a file of nothing has no opening, and is an error below
        opening, line = scan.peek(end=True), scan.line
        if opening == "{":
            try:
                is_list = scan.enter_data()
            except DataError:
                if not _looks_like_lines(path):
                    raise
                is_list = False
            if not is_list:
                if scan.line > line and not _looks_like_lines(path):
                    raise scan.wrong(
                        f"expected {JSON_LAYOUTS}; an object that is itself a row, over several lines, needs [ ] around it"
                    )
                yield from read_jsonl(path, shown)
                return
        elif opening == "[":
            scan.at += 1
        elif opening == '"' and _first_lines(path)[1].lstrip()[:1] == b'"':
            yield from read_jsonl(path, shown)
            return
        else:
            raise DataError(f"{shown}:{line}: expected {JSON_LAYOUTS}, found {scan.ahead(40)!r}")
        yield from _settle_strings(_array_elements(scan, shown), bare=opening == "[")


@dataclass(frozen=True)
class _StringElement:
    """An element that is a string: a row among texts, a fault among objects. ``column``: where in
    the line it stands, in words, if that is to be said."""

    where: str
    text: str
    raw: str
    column: str = ""

    def row(self) -> DataRow | RowFault:
        if self._holds_a_row():
            return RowFault(
                self.where, BadRow("encoded twice", self.column + TWICE_ENCODED), self.raw
            )
        return DataRow({"text": self.text}, self.where)

    def fault(self) -> RowFault:
        return RowFault(self.where, not_an_object(self.text, self.column), self.raw)

    def _holds_a_row(self) -> bool:
        # a look first: parsing every text would take as long as reading the file
        if self.text.lstrip()[:1] != "{" or self.text.rstrip()[-1:] != "}":
            return False
        value = RowDecoder().only(self.text)
        return isinstance(value, dict) and not ROW_COLUMNS.isdisjoint(value)


ArrayElement = DataRow | RowFault | FileRemark | _StringElement


def _settle_strings(elements: Iterator[ArrayElement], bare: bool, alone: bool = True) -> RowStream:
    """Strings as rows where the first two elements are strings, or (``alone``) the only one is.
    ``bare``: whether the array stands by itself, not under 'data'.
    """
    first: _StringElement | None = None
    # whether the file is an array of texts; None until it is known
    texts: bool | None = None if bare else False
    for element in elements:
        if texts is None and isinstance(element, _StringElement) and first is None:
            first = element
            continue
        # what cannot be read could have been either, and so could null: they settle nothing
        damaged = isinstance(element, RowFault) and (
            element.bad.kind != NOT_AN_OBJECT or element.raw.strip() == "null"
        )
        if texts is None and not damaged and not isinstance(element, FileRemark):
            texts = first is not None and isinstance(element, _StringElement)
            if first is not None:
                yield first.row() if texts else first.fault()
        if isinstance(element, _StringElement):
            yield element.row() if texts else element.fault()
        else:
            yield element
    if texts is None and first is not None:
        yield first.row() if alone else first.fault()


def _array_elements(scan: JsonScanner, shown: str) -> Iterator[ArrayElement]:
    """The elements of one array after the other; the cursor stands behind the first ``[``."""
    number = 0
    while True:
        while scan.peek() != "]":
            yield _next_element(scan, shown, number)
            number += 1
            if scan.peek() == ",":
                scan.at += 1
                if scan.peek() == "]":
                    raise scan.wrong(f"a comma behind the last element {number - 1}; leave it out")
            elif scan.peek() != "]":
                raise scan.wrong(f"expected ',' or ']' after element {number - 1}")
        scan.at += 1
        lists, others = scan.leave_data()
        for key in lists:
            yield FileRemark(
                f"{shown}: the rows are those under 'data'; the list of objects under {key!r} is not read"
            )
        if not ROW_COLUMNS.isdisjoint(others):
            yield FileRemark(
                f"{shown}: the rows are those under 'data'; not read: {shortlist_names(others)}"
            )
        if not scan.peek(end=True):
            return
        # no exports: rows that have a list called data
        if scan.peek() == "{" and not ROW_COLUMNS.isdisjoint(others):
            raise scan.wrong(
                f"another object with {shortlist_names(others)} beside 'data': if "
                "every line is a row, name the file .jsonl; if each is an export, "
                "join their rows in one array"
            )
        if scan.peek() == "[":
            scan.at += 1
        elif scan.peek() != "{":
            raise scan.wrong(f"text behind the end of the array: {scan.ahead(40)!r}")
        elif not scan.enter_data():
            raise scan.wrong(f"behind the end of the array: expected {JSON_LAYOUTS}")


def _next_element(scan: JsonScanner, shown: str, number: int) -> ArrayElement:
    """The next element of the array. ``number`` counts the elements of the file from 0."""
    scan.peek()
    where = f"{shown}:{scan.line}: element {number}"
    value, raw, bad = scan.value(f"element {number}")
    if bad is None and isinstance(value, dict):
        return DataRow(value, where)
    text = raw.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if bad is None and isinstance(value, str):
        return _StringElement(where, value, text)
    return RowFault(where, bad or not_an_object(value), text)


def _bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends; of a line longer than a row may be, the first ``LARGEST_ROW`` + 1
    bytes.
    """
    while raw := file.readline(LARGEST_ROW + 1):
        yield raw
        while len(raw) > LARGEST_ROW and not raw.endswith(b"\n"):
            raw = file.readline(LARGEST_ROW + 1)


def _describe_other_layout(line: bytes, bad: BadRow) -> str:
    """What a file is, judged by a first line that is no object and why, where it cannot be JSON
    lines; else "".
    """
    # one whole value, and something behind it: this line's own fault
    if bad.kind != "json" or "Extra data" in bad.reason:
        return ""
    if line[:1] == b"[":
        return "not JSON lines but a JSON array; name the file .json"
    if line[:1] == b"{" and line[-1:] in (b"{", b"[", b","):
        return "not JSON lines: an object over several lines; write each row in one line, or as an array [ ] in a file named .json"
    return ""


def _is_one_damaged_line(path: Path, decoder: RowDecoder) -> bool:
    """Whether JSON lines go on behind a first line that cannot be read: the second one is an
    object, and no bracket closes at the end of the file what the first line opened.
    """
    first, second = _first_lines(path)
    if not isinstance(decoder.value_of(second), dict):
        return False
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 4096, 0))
        end = file.read().rstrip()
    return not (first.lstrip()[:1] == b"[" and end.endswith(b"]"))


def _first_lines(path: Path) -> tuple[bytes, bytes]:
    """The first two lines that are not blank; empty where there are none."""
    with path.open("rb") as file:
        filled = (line for line in _bounded_lines(file) if line.removeprefix(UTF8_MARK).strip())
        return next(filled, b""), next(filled, b"")


def _looks_like_lines(path: Path) -> bool:
    """Whether the first two lines open an object each, and the first is not one laid out over
    several lines.
    """
    first, second = _first_lines(path)
    return second.lstrip()[:1] == b"{" and first.rstrip()[-1:] not in (b"{", b"[", b",")
