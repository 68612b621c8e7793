"""Axes of charts: where they end, where ticks go and how they read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorry.formatting import format_scientific

WIDE_RATIO = 1000.0  # a log axis is worth its strangeness from three decades on
# below this a float has no decade of room left: such values are drawn as zero, ticks stay normal
# numbers
MIN_LOG_VALUE = 1e-290


@dataclass(frozen=True)
class ChartAxis:
    """A scale from ``low`` to ``high`` with ticks inside it."""

    low: float
    high: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]
    log: bool = False


def value_axis(
    values: Sequence[float],
    from_zero: bool = False,
    log_if_wide: bool = False,
    count: int = 5,
    log: bool = False,
) -> ChartAxis:
    """An axis for finite values with about ``count`` ticks; it ends on ticks, so that every curve
    lies inside.

    from_zero: zero is on the axis. log_if_wide: logarithmic where `is_wide` says so; log: wherever
    every value has a place on one.
    """
    low, high = min(values, default=0.0), max(values, default=1.0)
    if (log and low > MIN_LOG_VALUE) or (log_if_wide and is_wide(values)):
        return _log_axis(low, high, count)
    if from_zero or 0 < low < 0.25 * high:
        low, high = min(low, 0.0), max(high, 0.0)
    # a flat curve; steps finer than this would all read the same
    if high - low <= max(MIN_LOG_VALUE, 1e-9 * max(abs(low), abs(high))):
        room = abs(low) * 0.1 if abs(low) > MIN_LOG_VALUE else 1.0
        low, high = low - room, high + room
    step = nice_step((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(i * step for i in range(first, last + 1))
    return ChartAxis(ticks[0], ticks[-1], ticks, tick_labels(ticks, step))


def is_wide(values: Sequence[float]) -> bool:
    """Whether values want a log axis: all above ``MIN_LOG_VALUE``, the highest three decades above
    all but the lowest twentieth.

    The lowest are left aside because a rate that decays to nearly nothing looks right on a plain
    axis.
    """
    ranked = sorted(values)
    return (
        bool(ranked)
        and ranked[0] > MIN_LOG_VALUE
        and ranked[-1] >= WIDE_RATIO * ranked[len(ranked) // 20]
    )


def step_axis(steps: Sequence[float], count: int = 5) -> ChartAxis:
    """The axis of optimizer steps, from the first to the last; ticks are whole numbers."""
    low, high = min(steps, default=0.0), max(steps, default=1.0)
    if low == high:
        return ChartAxis(low - 1, high + 1, (low,), (f"{low:,.0f}",))
    step = max(1.0, nice_step((high - low) / count))
    step = 5.0 if step == 2.5 else step  # the one nice step above 1 that is no whole number
    ticks = tuple(i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1))
    return ChartAxis(low, high, ticks, tuple(f"{t:,.0f}" for t in ticks))


def nice_step(rough: float) -> float:
    """The next of 1, 2, 2.5, 5, 10 times a power of ten that is at least ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(
        (m * power for m in (1.0, 2.0, 2.5, 5.0) if m * power >= rough * (1 - 1e-9)), 10.0 * power
    )


def _log_axis(low: float, high: float, count: int) -> ChartAxis:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)  # a single power of ten has a decade above it
    stride = math.ceil((last - first) / count)
    powers = range(first, first + math.ceil((last - first) / stride) * stride + 1, stride)
    ticks = tuple(10.0**p for p in powers)
    return ChartAxis(ticks[0], ticks[-1], ticks, tuple(_power_label(p) for p in powers), log=True)


def _power_label(power: int) -> str:
    return f"{10.0**power:g}" if -3 <= power <= 4 else f"1e{power}"


def tick_labels(ticks: Sequence[float], step: float) -> tuple[str, ...]:
    """Labels with the same number of decimals; powers of ten only where plain digits would be long."""
    largest = max(abs(t) for t in ticks)
    if largest and not 1e-3 <= largest < 1e6:
        digits = max(0, math.ceil(math.log10(largest / step))) + _is_quarter(step)
        return tuple("0" if t == 0 else format_scientific(t, digits) for t in ticks)
    exponent = math.floor(math.log10(step) + 1e-9)
    decimals = max(0, -exponent) + (_is_quarter(step) if exponent <= 0 else 0)
    return tuple(f"{t:,.{decimals}f}" for t in ticks)


def _is_quarter(step: float) -> bool:
    """Whether a step is 2.5 times a power of ten, whose multiples need one more digit."""
    return f"{step:.2e}".startswith("2.50")
