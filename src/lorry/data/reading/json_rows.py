"""Readers of JSON: one object or string a line, or arrays of them. Strict where the json module is not.

JSON lines are read here line by line, not through a table library, so that one bad line has a place
and a reason and the rest stay readable. An array is read element by element in bounded memory,
however long its line is.

What the json module takes in silence and a reader here does not: a key that stands twice in an
object (it keeps the last), and anything behind the end of an array. Several arrays one after the
other, as joined exports have them, are all read.

An array of strings, as MUSE's raw texts are written, is an array of rows ``{"text": string}``, and so
are lines of strings. The first two elements (or lines) that can be read and are not null say whether
a file is one: a single string
before or among objects is a bad row, and so are strings under 'data', which may be a column of a
row, the only line of a file, which may be anything in quotes, and a string that holds a row: the
file was encoded twice, and its braces would be learnt as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from lorry.data.reading.bad_rows import BadRow
from lorry.data.reading.rows import (
    CUT_OFF,
    LARGEST_ROW,
    TOO_LARGE,
    DataRow,
    FileRemark,
    RowFault,
    RowStream,
    not_utf8,
)
from lorry.disk.documents import DEEPEST_NESTING, first_repeated
from lorry.errors import DataError, shortlist_names

UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
UTF8_MARK = b"\xef\xbb\xbf"
JSON_LAYOUTS = "a JSON array of rows or of texts, an object with a 'data' array, or JSON lines"
NOT_AN_OBJECT = "not an object"
TWICE_ENCODED = "a row inside a string: it was encoded as JSON twice; write the object itself"
PIECE_BYTES = 1 << 20  # characters of an array read at a time
NESTED_TOO_DEEP = "nested too deeply"
JSON_SPACE = re.compile(r"[ \t\r\n]*")


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
        scan = _JsonScanner(file, shown)
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
        return RowFault(self.where, _not_an_object(self.text, self.column), self.raw)

    def _holds_a_row(self) -> bool:
        # a look first: parsing every text would take as long as reading the file
        if self.text.lstrip()[:1] != "{" or self.text.rstrip()[-1:] != "}":
            return False
        value = RowDecoder().only(self.text)
        return isinstance(value, dict) and not ROW_COLUMNS.isdisjoint(value)


def _not_an_object(value: object, column: str = "") -> BadRow:
    return BadRow(
        NOT_AN_OBJECT,
        f"{column}expected an object such as {{...}}, found {json_type_name(value)}",
    )


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


def _array_elements(scan: _JsonScanner, shown: str) -> Iterator[ArrayElement]:
    """The elements of one array after the other; the cursor stands behind the first ``[``."""
    number = 0
    while True:
        while scan.peek() != "]":
            yield scan.row(number)
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


def strip_byte_order_mark(raw: bytes, shown: str) -> bytes:
    """Drop a UTF-8 byte order mark; refuse UTF-16, with its mark or without (every second byte of
    plain letters is then 0).
    """
    head = raw[:8]
    # JSON begins with ASCII, of which UTF-16 makes every second byte 0
    zeros = [byte == 0 for byte in head]
    if head.startswith(UTF16_MARKS) or zeros in ([True, False] * 4, [False, True] * 4):
        raise DataError(f"{shown}:1: the file is UTF-16; save it as UTF-8")
    return raw.removeprefix(UTF8_MARK)


def printable_bytes(raw: bytes) -> str:
    """Bytes as text for a person; what is not UTF-8 as \\xff."""
    return raw.decode("utf-8", errors="backslashreplace").rstrip("\r\n")


def decode_utf8(raw: bytes) -> str | BadRow:
    """Bytes as text, or why they are none."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRow(
            "encoding",
            f"column {error.start + 1}: byte 0x{raw[error.start]:02x} is not valid UTF-8",
        )
    if "\0" in text:
        return BadRow("encoding", f"column {text.index(chr(0)) + 1}: {CUT_OFF}")
    return text


def json_type_name(value: object) -> str:
    """What a JSON value is, in words."""
    names = {
        list: "an array",
        str: "a string",
        bool: "a boolean",
        type(None): "null",
        dict: "an object",
    }
    return names.get(type(value), "a number")


class RowDecoder:
    """A JSON decoder that notices what Python's own passes over, and goes on behind it: a bad row,
    not a bad file.
    """

    def __init__(self) -> None:
        self._bad: BadRow | None = None
        # without a hook for integers, which would be a call of Python for each of them
        self._fast = json.JSONDecoder(object_pairs_hook=self._object).raw_decode
        self._careful = json.JSONDecoder(
            object_pairs_hook=self._object, parse_int=self._whole
        ).raw_decode

    def decode(self, text: str, at: int) -> tuple[Any, int, BadRow | None]:
        """(value, where it ends, why it is a bad row). Raises JSONDecodeError, and RecursionError
        for hundreds of levels.
        """
        self._bad = None
        try:
            value, end = self._fast(text, at)
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer of more digits than Python converts
            self._bad = None
            value, end = self._careful(text, at)
        if (
            self._bad is None
            and text.count("[", at, end) + text.count("{", at, end) > DEEPEST_NESTING
            and _nesting_depth(value) > DEEPEST_NESTING
        ):
            self._bad = BadRow("json", NESTED_TOO_DEEP)
        return value, end, self._bad

    def value_of(self, raw: bytes) -> dict[str, Any] | str | BadRow:
        """One line as a JSON object or a string, or why it is neither."""
        if len(raw) > LARGEST_ROW:
            return BadRow("too large", f"the line is {TOO_LARGE}")
        text = decode_utf8(raw)
        if isinstance(text, BadRow):
            return text
        value = self.only(text.rstrip())
        if isinstance(value, BadRow | dict | str):
            return value
        return _not_an_object(value, "column 1: ")

    def only(self, text: str) -> Any:
        """The only JSON value of a text, or why it is none."""
        try:
            value, end, bad = self.decode(text, _skip_space(text, 0))
            if _skip_space(text, end) < len(text):
                raise json.JSONDecodeError("Extra data", text, _skip_space(text, end))
        except json.JSONDecodeError as error:
            cut = (
                "; the line is cut off"
                if error.pos >= len(text) or error.msg.startswith("Unterminated")
                else ""
            )
            return BadRow("json", f"column {error.colno}: not valid JSON: {error.msg}{cut}")
        except RecursionError:
            return BadRow("json", f"column 1: not usable JSON: {NESTED_TOO_DEEP}")
        return bad or value

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        # the first one found is told; the search is paid only where a key was lost
        if len(mapping) < len(pairs) and self._bad is None:
            twice = first_repeated(key for key, _ in pairs)
            self._bad = BadRow(
                "key twice", f"the key {twice!r} is given twice in one object; keep one"
            )
        return mapping

    def _whole(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:
            count = len(digits.lstrip("-"))
            self._bad = self._bad or BadRow(
                "json", f"not usable JSON: a number of {count} digits; write it as text, in quotes"
            )
            return 0


def _skip_space(text: str, at: int) -> int:
    match = JSON_SPACE.match(text, at)
    return match.end() if match else at


def _nesting_depth(value: Any) -> int:
    """How many objects and arrays stand inside each other; counted without recursion."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [
            inner for item in level for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


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


class _JsonScanner:
    """A cursor over JSON text that is read a piece at a time; it knows its line and column."""

    def __init__(self, file: TextIO, shown: str) -> None:
        self.text, self.at = "", 0
        self._file, self._shown, self._decoder = file, shown, RowDecoder()
        self._line, self._column, self._counted = 1, 0, 0  # of text[_counted]
        self._keys: set[str] | None = None  # of the object around the array of rows
        self._lists: list[str] = []  # those of them that hold other lists of objects

    @property
    def line(self) -> int:
        """The line the cursor is in, from 1."""
        breaks = self.text.count("\n", self._counted, self.at)
        if breaks:
            self._line += breaks
            self._column = self.at - self.text.rfind("\n", self._counted, self.at) - 1
        else:
            self._column += self.at - self._counted
        self._counted = self.at
        return self._line

    def _more(self) -> bool:
        """Read on and forget what lies before the cursor. Twice as much each time: a large value is
        not parsed over and over.
        """
        _ = self.line
        # in characters
        piece = self._file.read(max(PIECE_BYTES, len(self.text) - self.at))
        self.text = self.text[self.at :] + piece
        self.at = self._counted = 0
        return bool(piece)

    def peek(self, end: bool = False) -> str:
        """Skip white space; the next character, or, at the end of the file, nothing (``end``) or an
        error.

        Where the file may end another may have been joined to it, so a byte order mark is skipped
        there, too.
        """
        letter = self.text[self.at : self.at + 1]
        # nearly always: the pattern costs three times as much
        if letter and letter not in " \t\r\n\ufeff":
            return letter
        while True:
            self.at = _skip_space(self.text, self.at)
            if self.at < len(self.text):
                if end and self.text[self.at] == "\ufeff":
                    self.at += 1
                    continue
                return self.text[self.at]
            if not self._more():
                if end:
                    return ""
                raise self.wrong("the file ends in the middle of the array")

    def ahead(self, most: int) -> str:
        """The next characters, for a message."""
        return (
            self.text[self.at : self.at + most]
            .encode("utf-8", "surrogateescape")
            .decode("utf-8", "backslashreplace")
        )

    def value(self, what: str) -> tuple[Any, str, BadRow | None]:
        """The value at the cursor, its text, and why it is a bad row; the cursor then stands behind
        it.
        """
        while True:
            try:
                value, end, bad = self._decoder.decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > LARGEST_ROW:
                    raise self.wrong(
                        f"{what} is {TOO_LARGE}, or not valid JSON: {error.msg}"
                    ) from error
                behind = error.pos - self.at
                if self._more():
                    continue
                self.at += behind
                reason = (
                    CUT_OFF
                    if self.text[self.at : self.at + 1] == "\0"
                    else f"{what} is not valid JSON: {error.msg}"
                )
                raise self.wrong(reason) from error
            except RecursionError as error:
                raise self.wrong(f"{what} is not usable JSON: {NESTED_TOO_DEEP}") from error
            # a number may go on in the next piece, what ends in a bracket or a quote cannot
            length = end - self.at
            if end < len(self.text) or isinstance(value, dict | list | str) or not self._more():
                break
        raw = self.text[self.at : self.at + length]
        self.at += length
        broken = not_utf8(raw)
        return value, raw, BadRow("encoding", broken) if broken else bad

    def row(self, number: int) -> DataRow | RowFault | _StringElement:
        """The next element of the array as a row. ``number`` counts the elements of the file from
        0.
        """
        self.peek()
        where = f"{self._shown}:{self.line}: element {number}"
        value, raw, bad = self.value(f"element {number}")
        if bad is None and isinstance(value, dict):
            return DataRow(value, where)
        shown = raw.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        if bad is None and isinstance(value, str):
            return _StringElement(where, value, shown)
        return RowFault(where, bad or _not_an_object(value), shown)

    def enter_data(self) -> bool:
        """Move into an object and behind the ``[`` under its key 'data'; False, at its ``}``, where
        there is none.
        """
        self.at += 1
        self._keys, self._lists, trouble = set(), [], ""
        while self.peek() != "}":
            key = self._key()
            trouble = trouble or (
                f"the key {key!r} is given twice in one object; keep one"
                if key in self._keys
                else ""
            )
            self._keys.add(key)
            if self.peek() == "[" and key == "data":
                if trouble:
                    raise self.wrong(trouble)
                self.at += 1
                return True
            bad = self._beside(key)
            trouble = trouble or (f"the value of {key!r}: {bad.reason}" if bad else "")
            if self.peek() == ",":
                self.at += 1
            elif self.peek() != "}":
                raise self.wrong("expected ',' or '}' after a value")
        self._keys = None
        return False

    def leave_data(self) -> tuple[list[str], list[str]]:
        """Move behind the ``}`` of the object around the array, if there is one; its keys that hold
        other lists of objects, and those that hold anything else."""
        if self._keys is None:
            return [], []
        while self.peek() != "}":
            if self.peek() != ",":
                raise self.wrong("expected ',' or '}' after the array under 'data'")
            self.at += 1
            key = self._key()
            if key in self._keys:
                raise self.wrong(f"the key {key!r} is given twice in one object; keep one")
            self._keys.add(key)
            if bad := self._beside(key):
                raise self.wrong(f"the value of {key!r}: {bad.reason}")
        self.at += 1
        others = sorted(self._keys - {"data", *self._lists})
        self._keys = None
        return self._lists, others

    def _beside(self, key: str) -> BadRow | None:
        """Move behind a value that is not the array of rows; why it is a bad one."""
        self.peek()
        value, _, bad = self.value(f"the value of {key!r}")
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            self._lists.append(key)
        return bad

    def _key(self) -> str:
        self.peek()
        key, _, _ = self.value("a key")
        if not isinstance(key, str):
            raise self.wrong(f"a key is {json_type_name(key)}, expected a string")
        if self.peek() != ":":
            raise self.wrong("expected ':' after a key")
        self.at += 1
        return key

    def wrong(self, reason: str) -> DataError:
        """An error at the cursor."""
        if self.text[self.at : self.at + 1] == "\0":
            reason = CUT_OFF
        line = self.line
        return DataError(f"{self._shown}:{line}: column {self._column + 1}: {reason}")
