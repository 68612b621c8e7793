"""Numbers as people can read them: `format_number`, `format_bytes`, `format_duration`,
`format_rough_duration`, `format_count`.
"""

from __future__ import annotations

import math

MISSING_VALUE = "–"
_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_number(value: object) -> str:
    """Four significant digits, thousands apart, no exponent between 1e-3 and 1e6; anything that is
    no number as itself.
    """
    if value is None:
        return MISSING_VALUE
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if isinstance(value, int) and abs(value) < 10**9:
        return f"{value:,}"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return format_scientific(value, 3)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_count(count: int, noun: str) -> str:
    """So many of something: "1 row", "2 rows"; for nouns that take an s."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def format_scientific(value: float, digits: int) -> str:
    """``2.5e-4``: at most that many decimals and no zeros that say nothing."""
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def byte_scale(largest: float) -> tuple[float, str]:
    """(divisor, unit) that brings a number of bytes below 1024."""
    power = (
        min(int(math.log(largest, 1024)), len(_BYTE_UNITS) - 1) if 1 <= largest < math.inf else 0
    )
    return 1024.0**power, _BYTE_UNITS[power]


def format_bytes(count: float | None) -> str:
    """Bytes in the unit that fits: ``2.31 GiB``."""
    if count is None or not math.isfinite(count):
        return MISSING_VALUE
    divisor, unit = byte_scale(count)
    return f"{count / divisor:.{0 if divisor == 1 else 2}f} {unit}"


def format_duration(seconds: float | None) -> str:
    """``8.2 s``, ``4 min 12 s``, ``3 h 05 min``."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING_VALUE
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def format_rough_duration(seconds: float | None) -> str:
    """A time in its largest unit, for ages and forecasts: ``32 s``, ``5 min``, ``3 h``, ``2 d``."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING_VALUE
    scale, unit = next(
        (s, u)
        for s, u in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
        if seconds >= s or s == 1
    )
    return f"{seconds / scale:.0f} {unit}"
