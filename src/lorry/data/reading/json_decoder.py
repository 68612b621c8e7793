"""A JSON decoder that is strict where the json module is not.

What the json module takes in silence is a bad row here: a key that stands twice in an object (it
keeps the last), a number of more digits than Python converts, nesting beyond all use.
"""

from __future__ import annotations

import json
import re
from typing import Any

from lorry.data.reading.bad_rows import BadRow
from lorry.data.reading.encodings import decode_utf8
from lorry.data.reading.rows import LARGEST_ROW, TOO_LARGE
from lorry.disk.documents import DEEPEST_NESTING, first_repeated

NOT_AN_OBJECT = "not an object"
NESTED_TOO_DEEP = "nested too deeply"
JSON_SPACE = re.compile(r"[ \t\r\n]*")


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
        return not_an_object(value, "column 1: ")

    def only(self, text: str) -> Any:
        """The only JSON value of a text, or why it is none."""
        try:
            value, end, bad = self.decode(text, skip_space(text, 0))
            if skip_space(text, end) < len(text):
                raise json.JSONDecodeError("Extra data", text, skip_space(text, end))
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


def skip_space(text: str, at: int) -> int:
    """Where white space from ``at`` on ends."""
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


def not_an_object(value: object, column: str = "") -> BadRow:
    """Why a value that is no object is no row; ``column``: where in the line it stands, in words."""
    return BadRow(
        NOT_AN_OBJECT,
        f"{column}expected an object such as {{...}}, found {json_type_name(value)}",
    )


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
