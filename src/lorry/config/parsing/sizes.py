"""Amounts of memory as people write them: ``3GiB``, ``800 MB``, ``2.5gb``."""

from __future__ import annotations

import re

SIZE_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    # a bare letter is binary, as in Docker and the JVM; KB is decimal, as SI has it
    "K": 2**10,
    "M": 2**20,
    "G": 2**30,
    "T": 2**40,
}
LARGEST_SIZE = 2**60  # bytes; beyond it float arithmetic loses bytes, and nobody has so much
SIZE_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes. Raises ValueError for anything that is not a positive number with a unit."""
    match = SIZE_PATTERN.fullmatch(text.strip())
    if match is None or (unit := match[2].upper()) not in SIZE_UNITS:
        raise ValueError(
            f"{text[:40]!r} is not an amount of memory; write a number with its "
            "unit, such as 3GiB or 800MB"
        )
    amount = float(match[1]) * SIZE_UNITS[unit]
    if not 1 <= amount < LARGEST_SIZE:
        raise ValueError(
            f"{text[:40]!r} is not an amount of memory; it must be above 0 and "
            f"below {LARGEST_SIZE >> 40:,} TiB"
        )
    return int(amount)


def size_in_words(size: float) -> str:
    """``3221225472 -> 3.00 GiB``; MiB below one GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
