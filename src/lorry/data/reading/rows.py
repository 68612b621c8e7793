"""What every reader gives: rows and faults, each with the place it stands at, and what a reader may
be told to leave unread.

The rule of every reader: **what a file holds is a row, a fault or an error with its place; nothing
is lost without a word.** A key or a column that stands twice, text behind the end of an array and
half a row are never resolved by taking the first or the last.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lorry.data.reading.bad_rows import BadRow

# bytes of one row; what is longer is no row, and reading on would only fill the memory
LARGEST_ROW = 1 << 28
TOO_LARGE = f"larger than {LARGEST_ROW >> 20} MiB, the most that is read as one row"
# how ``errors="surrogateescape"`` keeps a byte that is not UTF-8
UNDECODED_BYTES = re.compile("[\udc80-\udcff]")
ROW_PLACE = re.compile(r":[0-9]+(: element [0-9]+)?$")  # behind the name of a file
CUT_OFF = "a NUL byte; the file was probably cut off while being written"


@dataclass(frozen=True)
class DataRow:
    """One row of a source: its columns, and ``where`` it stands (``people.jsonl:17``,
    ``people.json:1: element 16``).
    """

    values: dict[str, Any]
    where: str

    @property
    def file(self) -> str:
        """``where`` without the line."""
        return file_of(self.where)


@dataclass(frozen=True)
class RowFault:
    """A row that could not be read: where, why, and its raw text."""

    where: str
    bad: BadRow
    raw: str


@dataclass(frozen=True)
class FileRemark:
    """Something about a whole file that a person should know: a line of the report."""

    text: str


RowStream = Iterator[DataRow | RowFault | FileRemark]
# (all columns, where the first row stands) -> the columns to read. Only tables of columns ask; a
# line is read whole anyway
ColumnSelector = Callable[[Sequence[str], str], Sequence[str]]
SourcePart = Callable[[ColumnSelector | None], RowStream]


def file_of(where: str) -> str:
    """The file of a place: the place without its line and element."""
    return ROW_PLACE.sub("", where)


def not_utf8(text: str) -> str:
    """Why text read with ``surrogateescape`` is none, or an empty string."""
    match = None if text.isascii() else UNDECODED_BYTES.search(text)
    return f"byte 0x{ord(match[0]) - 0xDC00:02x} is not valid UTF-8" if match else ""
