"""Of a handful of rows no interval is told, by any metric: it would have no width where they agree,
and read as certainty.
"""

from __future__ import annotations

import math

import pytest

from lorry.evaluate.metrics.bootstrap import (
    MIN_INTERVAL_ROWS,
    bootstrap_interval,
    corpus_interval,
    estimate_mean,
)
from lorry.evaluate.metrics.registry import measure_metrics


@pytest.mark.parametrize("rows", [1, 2, MIN_INTERVAL_ROWS - 1])
def test_too_few_rows_have_no_interval(rows: int) -> None:
    found = [bootstrap_interval([0.0] * rows), estimate_mean([1.0] * rows).interval]
    found.append(corpus_interval([[1.0, 2.0]] * rows, lambda sums: sums[:, 0] / sums[:, 1]))
    found += [
        one.interval
        for one in measure_metrics(
            ["rouge_l", "bleu"], ["a b c d"] * rows, [["a b c d"]] * rows
        ).values()
    ]
    assert all(math.isnan(end) for ends in found for end in ends)


def test_ten_rows_have_one() -> None:
    low, high = bootstrap_interval([0.0, 1.0] * (MIN_INTERVAL_ROWS // 2))
    assert 0 <= low < 0.5 < high <= 1
    ends = corpus_interval([[1.0, 2.0]] * MIN_INTERVAL_ROWS, lambda sums: sums[:, 0] / sums[:, 1])
    assert ends == (0.5, 0.5)
