"""A cursor over JSON text that is read a piece at a time: an array element by element in bounded memory,
however long its line is.
"""

from __future__ import annotations

import json
from typing import Any, TextIO

from lorry.data.reading.bad_rows import BadRow
from lorry.data.reading.json_decoder import (
    NESTED_TOO_DEEP,
    RowDecoder,
    json_type_name,
    skip_space,
)
from lorry.data.reading.rows import CUT_OFF, LARGEST_ROW, TOO_LARGE, not_utf8
from lorry.errors import DataError

PIECE_BYTES = 1 << 20  # characters of an array read at a time


class JsonScanner:
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
            self.at = skip_space(self.text, self.at)
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
