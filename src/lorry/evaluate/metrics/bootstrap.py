"""Intervals for numbers of an evaluation: what they would have been on another sample of rows
(Efron 1979).

Try: ``bootstrap_interval([0.0, 1.0] * 200)`` is about (0.45, 0.55). A mean of rows resamples the
rows; a corpus metric (BLEU, calibration error) resamples its rows' sufficient statistics and is
computed once for all resamples. The rows drawn are a function of (seed, number of rows), so that
two metrics or two models on the same rows see the same resamples.

**Of fewer than `MIN_INTERVAL_ROWS` rows there is no interval**: resamples of a handful hold the same few values again and again, and of
rows that agree the interval has no width, which reads as certainty. It is (NaN, NaN) there, and whoever prints it says `TOO_FEW_ROWS_MESSAGE`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

# numpy is for those who measure: the report reads this room without it
if TYPE_CHECKING:
    import numpy

# each end of the interval, 2.5%, rests on 25 of them
BOOTSTRAP_RESAMPLES = 1000
CONFIDENCE_LEVEL = 0.95
# ten that agree leave a 30% share of others possible (95%, the rule of three)
MIN_INTERVAL_ROWS = 10
TOO_FEW_ROWS_MESSAGE = f"too few rows for an interval (fewer than {MIN_INTERVAL_ROWS})"
NO_INTERVAL = (math.nan, math.nan)


@dataclass(frozen=True)
class MetricEstimate:
    """A metric over all rows. ``interval``: its 95% percentile bootstrap interval, NaN where there
    is none; ``rows``: one value a row for a mean of rows, None for a corpus metric; ``signature``:
    sacreBLEU's, which makes a published number reproducible, or an empty string."""

    value: float
    interval: tuple[float, float]
    rows: list[float] | None = None
    signature: str = ""


def bootstrap_interval(
    values: Sequence[float],
    seed: int = 0,
    confidence: float = CONFIDENCE_LEVEL,
    resamples: int = BOOTSTRAP_RESAMPLES,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of per-example values: (low, high), a function of
    the seed; of too few rows NaN.

    Raises ValueError for no values, a value that is not finite, or a confidence outside (0, 1).
    """
    import numpy  # the report matches strings with this room and draws no interval

    data = numpy.asarray(values, dtype=numpy.float64)
    if data.size == 0 or not numpy.isfinite(data).all():
        raise ValueError(
            f"a bootstrap needs at least one value, all of them finite; got {data.size} values"
        )
    if data.size < MIN_INTERVAL_ROWS:
        return NO_INTERVAL
    means = [data[drawn].mean(axis=1) for drawn in bootstrap_draws(data.size, seed, resamples)]
    return _percentile_interval(numpy.concatenate(means), confidence)


def corpus_interval(
    statistics: Any,
    score: Callable[[numpy.ndarray], numpy.ndarray],
    seed: int = 0,
    confidence: float = CONFIDENCE_LEVEL,
    resamples: int = BOOTSTRAP_RESAMPLES,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a metric that is a function of its rows' summed statistics:
    (low, high).

    ``statistics``: [rows, k]; ``score``: sums [resamples, k] to values [resamples]. Raises
    ValueError as `bootstrap_interval`.
    """
    sums = resampled_sums(statistics, seed, resamples)
    return (
        _percentile_interval(score(sums), confidence)
        if len(statistics) >= MIN_INTERVAL_ROWS
        else NO_INTERVAL
    )


def resampled_sums(
    statistics: Any, seed: int = 0, resamples: int = BOOTSTRAP_RESAMPLES
) -> numpy.ndarray:
    """[resamples, k]: the sums of each resample's rows of ``statistics`` [rows, k], in float64
    (exact for counts below 2^53).

    Raises ValueError for no rows or a value that is not finite.
    """
    import numpy

    table = numpy.asarray(statistics, dtype=numpy.float64)
    if table.ndim != 2 or not len(table) or not numpy.isfinite(table).all():
        raise ValueError(f"a bootstrap needs rows of finite statistics; got shape {table.shape}")
    rows, sums = len(table), []
    for drawn in bootstrap_draws(rows, seed, resamples):
        # How often a resample drew each row, times the rows: one product, where gathering the rows
        # would copy them all.
        apart = drawn + rows * numpy.arange(len(drawn))[:, None]
        sums.append(
            numpy.bincount(apart.ravel(), minlength=apart.size).reshape(drawn.shape) @ table
        )
    return numpy.concatenate(sums)


def estimate_mean(values: Sequence[float], seed: int = 0) -> MetricEstimate:
    """The mean of a value per row, with its interval. Raises ValueError as `bootstrap_interval`."""
    rows = [float(v) for v in values]
    return MetricEstimate(math.fsum(rows) / max(len(rows), 1), bootstrap_interval(rows, seed), rows)


def bootstrap_draws(rows: int, seed: int, resamples: int) -> Iterator[numpy.ndarray]:
    """Row numbers drawn with replacement, a resample a line: blocks [n, rows], about a million
    numbers each, of ``resamples`` lines in all. The blocks' size changes nothing that is drawn."""
    import numpy

    # 8 MiB of numbers at a time, however many rows there are
    random, most = numpy.random.default_rng(seed), max((1 << 20) // rows, 1)
    return (
        random.integers(rows, size=(min(most, resamples - at), rows))
        for at in range(0, resamples, most)
    )


def _percentile_interval(values: Any, confidence: float) -> tuple[float, float]:
    import numpy

    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    low, high = numpy.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
