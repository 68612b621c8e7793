"""Bytes of a file as text: byte order marks, and what is not UTF-8."""

from __future__ import annotations

from lorry.data.reading.bad_rows import BadRow
from lorry.data.reading.rows import CUT_OFF
from lorry.errors import DataError

UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
UTF8_MARK = b"\xef\xbb\xbf"


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
