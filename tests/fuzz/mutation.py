"""Damaged copies of sound inputs: flipped bits, cuts, repeats, splices of two, and words that
readers stumble over.

A mutation is a function of its random generator alone, so that a finding can be made again from its
number.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

# What hand-made attacks found to matter: numbers beyond every bound, endings, nesting, control
# characters, YAML, jinja
WORDS = tuple(
    word.encode("utf-8", "surrogatepass")
    for word in (
        *(
            "9" * 25,
            "9" * 5000,
            "-1",
            "0",
            "1e999",
            "-1e400",
            "NaN",
            "Infinity",
            "null",
            "true",
            "[]",
            "{}",
            '""',
        ),
        *(
            "]",
            "}",
            "[[[[[[[[",
            '{"a":' * 80,
            '"',
            "'",
            "\\",
            "\\u0000",
            "\\ud800",
            ",",
            ":",
            "\n",
            "\r\n",
            "\t",
            "\x00",
        ),
        *(
            "\x1b]0;t\x07",
            "\u202e",
            "\ufeff",
            "\ud800",
            "\uffff",
            "&a [*a]",
            "<<: *a",
            "!!python/object:os.system ",
            "---\n",
        ),
        *(
            "{% for i in range(99999) %}",
            "{% endfor %}",
            "{{ x * 10 ** 9 }}",
            "{{ 1e999 }}",
            "{% set x = x + x %}",
            "__class__",
        ),
        *(
            "2147483648",
            "9223372036854775808",
            "18446744073709551616",
            "../../etc/passwd",
            "/dev/zero",
            "a" * 3000,
        ),
    )
)
LONGEST = 1 << 20


def mutate(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    """``data`` after one to six random changes; ``others``: inputs of the same kind to splice with."""
    for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
        data = draw.choice(CHANGES)(data, others, draw)[:LONGEST]
    return data


def _place(data: bytes, draw: random.Random) -> int:
    return draw.randint(0, len(data))


def _span(data: bytes, draw: random.Random) -> tuple[int, int]:
    start = _place(data, draw)
    return start, min(len(data), start + draw.choice((1, 2, 4, 8, 30, 200)))


def flip_bit(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    if not data:
        return data
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]


def set_bytes(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    start, stop = _span(data, draw)
    return data[:start] + draw.randbytes(stop - start) + data[stop:]


def extreme_bytes(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    """A length or a count that is all ones, all zeros or the sign bit alone."""
    start, width = _place(data, draw), draw.choice((1, 2, 4, 8))
    value = draw.choice((b"\xff" * width, b"\x00" * width, b"\x00" * (width - 1) + b"\x80"))
    return data[:start] + value + data[start + width :]


def cut_end(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    return data[: _place(data, draw)]


def remove(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    start, stop = _span(data, draw)
    return data[:start] + data[stop:]


def repeat(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    start, stop = _span(data, draw)
    return data[:stop] + data[start:stop] * draw.choice((1, 2, 50)) + data[stop:]


def insert_word(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    at = _place(data, draw)
    return data[:at] + draw.choice(WORDS) + data[at:]


def replace_word(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    """A word of the text (letters and digits) gives way to another one."""
    start = stop = _place(data, draw)
    while start and data[start - 1 : start].isalnum():
        start -= 1
    while stop < len(data) and data[stop : stop + 1].isalnum():
        stop += 1
    return data[:start] + draw.choice(WORDS) + data[stop:]


def splice(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    other = draw.choice(others)
    return data[: _place(data, draw)] + other[_place(other, draw) :]


def append(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    return data + draw.choice((*others, *WORDS))


CHANGES: tuple[Callable[[bytes, Sequence[bytes], random.Random], bytes], ...] = (
    flip_bit,
    set_bytes,
    extreme_bytes,
    cut_end,
    remove,
    repeat,
    insert_word,
    replace_word,
    splice,
    append,
)
