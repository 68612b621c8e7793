"""Readers: one file in, rows or faults out, each with its ``file:line``. No row is ever lost
without a word (`rows.py`).

Files are only ever parsed: nothing in them is executed or unpickled. JSON is read in
`json_rows.py`, tables of columns (parquet, what ``datasets`` saved) in `columnar.py`, the rest
here.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from lorry.data.reading.bad_rows import BadRow
from lorry.data.reading.columnar import read_parquet
from lorry.data.reading.encodings import decode_utf8, printable_bytes, strip_byte_order_mark
from lorry.data.reading.json_rows import read_json_rows, read_jsonl
from lorry.data.reading.rows import (
    CUT_OFF,
    LARGEST_ROW,
    TOO_LARGE,
    ColumnSelector,
    DataRow,
    RowFault,
    RowStream,
    not_utf8,
)
from lorry.errors import DataError, shortlist_names

HEAD_BYTES = 1 << 16  # characters of the header in which separators are counted
# a cell in quotes: what stands in it separates nothing
QUOTED_CELL = re.compile(r'(?<![^,;\t\r\n])"(?:[^"]|"")*(?:"|$)')
# how Excel says the separator, in a line of its own
SEPARATOR_LINE = re.compile(r'"?sep=([^\w\s"]|\t)"?\r?\n', re.IGNORECASE)


def read_csv(path: Path, shown: str) -> RowStream:
    """CSV with a header line, separated by whichever of ``, ; tab`` the header uses most outside
    quotes, or by what a first line ``sep=;`` says. A record may span lines. A header that stands
    there again (joined files) is a bad row.
    """
    # the csv module's own 131072 characters refuse long documents
    csv.field_size_limit(LARGEST_ROW)
    with path.open("rb") as probe:
        strip_byte_order_mark(probe.read(8), shown)
    # surrogateescape keeps a row with broken UTF-8 in its place, so that it alone is bad and not
    # the rest of the file
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        head = file.read(HEAD_BYTES)
        separator = SEPARATOR_LINE.match(head)
        delimiter = (
            "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=_header_text(head).count)
        )
        file.seek(0)
        if separator:
            delimiter = separator[1]
            file.readline()
        before = 1 if separator else 0  # lines that the csv module does not see
        table = csv.reader(_csv_lines(file, shown), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            where = f"{shown}:{before + table.line_num + 1}"
            try:
                cells = next(table, None)
            except csv.Error as error:
                raise DataError(
                    f"{where}: {error} (a quote that is opened must be closed)"
                ) from error
            if header is None and cells == []:  # a blank line before the header
                continue
            if header is None:
                header = _check_header(cells or [], shown)
            elif cells is None:
                return
            elif cells:
                bad = _check_cells(cells, header)
                yield (
                    RowFault(where, bad, delimiter.join(cells))
                    if bad
                    else DataRow(dict(zip(header, cells, strict=True)), where)
                )


def read_txt(path: Path, shown: str) -> RowStream:
    """Plain text: one document per file (encoding cuts it into max_length pieces; a blank line is
    no document border).
    """
    raw = strip_byte_order_mark(path.read_bytes(), shown)
    text = decode_utf8(raw)
    where = f"{shown}:1"
    yield (
        RowFault(where, text, printable_bytes(raw[:1000]))
        if isinstance(text, BadRow)
        else DataRow({"text": text}, where)
    )


def _ignore_selection(
    read: Callable[[Path, str], RowStream],
) -> Callable[[Path, str, ColumnSelector | None], RowStream]:
    """A reader of lines as one that may be told which columns to read: it reads them all."""
    return lambda path, shown, select: read(path, shown)


READERS: dict[str, Callable[[Path, str, ColumnSelector | None], RowStream]] = {
    ".jsonl": _ignore_selection(read_jsonl),
    ".ndjson": _ignore_selection(read_jsonl),
    ".json": _ignore_selection(read_json_rows),
    ".csv": _ignore_selection(read_csv),
    ".tsv": _ignore_selection(read_csv),
    ".parquet": read_parquet,
    ".txt": _ignore_selection(read_txt),
}


def _header_text(head: str) -> str:
    """The first line of a CSV file without its cells in quotes, which may hold separators and line
    breaks.
    """
    return next(iter(QUOTED_CELL.sub("", head).lstrip("\r\n").splitlines()), "")


def _csv_lines(file: TextIO, shown: str) -> Iterator[str]:
    """Lines as the csv module wants them. Raises DataError for one that is larger than a row may
    be.
    """
    number = 0
    while line := file.readline(LARGEST_ROW + 1):
        number += 1
        if len(line) > LARGEST_ROW:
            raise DataError(f"{shown}:{number}: the line is {TOO_LARGE}")
        yield line


def _check_header(names: list[str], shown: str) -> list[str]:
    if not names:
        raise DataError(f"{shown}:1: the file is empty; a header line with column names is needed")
    # pandas writes its index as leading columns without a name
    index = next((at for at, name in enumerate(names) if name), 0)
    names = [*_names_for_unnamed(index, names[index:]), *names[index:]]
    if "" in names or len(set(names)) != len(names):
        raise DataError(
            f"{shown}:1: the header needs a different name for every column, found {shortlist_names(map(repr, names))}"
        )
    if any(not name.isprintable() for name in names):
        raise DataError(
            f"{shown}:1: the header is not valid UTF-8 text: {shortlist_names(map(ascii, names))}"
        )
    return names


def _names_for_unnamed(count: int, used_names: list[str]) -> list[str]:
    """The names that pandas gives to columns without one."""
    names = list[str]()
    for at in range(count):
        name, repeat = f"Unnamed: {at}", 0
        while name in used_names:
            repeat += 1
            name = f"Unnamed: {at}.{repeat}"
        names.append(name)
    return names


def _check_cells(cells: list[str], header: list[str]) -> BadRow | None:
    """Why a CSV record cannot be used, or None."""
    if len(cells) != len(header):
        return BadRow("columns", f"the row has {len(cells)} columns, the header {len(header)}")
    if cells[0][:1] == "\ufeff" or cells == header:
        return BadRow(
            "joined",
            (
                "the header or a byte order mark is repeated: files were joined; keep "
                "the first header only"
            ),
        )
    for name, cell in zip(header, cells, strict=True):
        if "\0" in cell:
            return BadRow("encoding", f"column {name!r}: {CUT_OFF}")
        if not_utf8(cell):
            return BadRow("encoding", f"column {name!r} is not valid UTF-8")
    return None
