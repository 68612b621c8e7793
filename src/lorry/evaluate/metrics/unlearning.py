"""What was forgotten and what was kept: truth ratio, forget quality, model utility, relative
difference.

Try: ``forget_quality([0.1, 0.2, 0.3], [0.7, 0.8, 0.9])`` is 0.1, the least that three rows can say.

**The truth ratio** of a row is t = exp(loss of the good answer - mean loss of the wrong ones): the
*geometric* mean of the wrong answers' probabilities over the good one's, as in the authors' own
logs and in open-unlearning; the TOFU paper's text says arithmetic. open-unlearning adds 1e-10 to the
denominator, which bends t of a collapsed model (good answer below 1e-8); nothing is added here.

**Forget quality** compares t of a model with t of one that never saw the rows. Its power is in the
number of rows (at p = .05 D is .136 with 200 rows, .19 with 100): never ask it of a part of them.
Collapse gives tiny values, too: t leaves the oracle's range on the other side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from lorry.errors import DataError, NonFiniteError
from lorry.evaluate.metrics.memorization import bounded_exp


def truth_ratio(good: float, wrong: Sequence[float]) -> float:
    """t of a row from mean losses in nats, at most the largest double. Raises DataError
    without a wrong answer.
    """
    if not wrong:
        raise DataError("a truth ratio needs at least one wrong answer")
    return bounded_exp(good - math.fsum(wrong) / len(wrong))


def truth_ratio_closer_to_one(ratio: float) -> float:
    """min(t, 1/t), for rows to forget: 1 where right and wrong answers are equally likely."""
    return min(ratio, 1 / ratio) if ratio > 0 else 0.0


def truth_ratio_true_better(ratio: float) -> float:
    """max(0, 1 - t), for rows to keep: 1 where wrong answers are impossible."""
    return max(0.0, 1 - ratio)


def truth_ratio_probability(ratio: float) -> float:
    """p_good / (p_good + p_wrong): OpenUnlearning's form (arXiv 2506.12618)."""
    return 1 / (1 + ratio)


TRUTH_RATIO_FORMS: Mapping[str, Callable[[float], float]] = {
    "closer_to_1_better": truth_ratio_closer_to_one,
    "true_better": truth_ratio_true_better,
    "prob_mean": truth_ratio_probability,
}
"""What is averaged over rows, under open-unlearning's names of its aggregators."""


def forget_quality(ratios: Sequence[float], oracle: Sequence[float]) -> float:
    """p of the two-sided two-sample Kolmogorov-Smirnov test, exact, between the truth ratios of a
    model and of one that never saw the rows, both of the same rows.

    With n values each there are binomial(2n, n) equally likely orders; by reflection (Gnedenko and
    Korolyuk 1951) 2 sum over k >= 1 of (-1)^(k-1) binomial(2n, n - k h) of them part the two by
    h or more. Whole numbers of any size: right down to 1e-239, where 1 minus a distribution
    function would be 0. Raises DataError for lists of different length or empty ones,
    NonFiniteError for a NaN.
    """
    if len(ratios) != len(oracle) or not ratios:
        raise DataError(
            f"forget quality compares the same rows of two models; got {len(ratios)} and "
            f"{len(oracle)} truth ratios"
        )
    if any(math.isnan(value) for value in (*ratios, *oracle)):
        raise NonFiniteError("a truth ratio is not a number; forget quality needs all rows")
    rows, gap = len(ratios), largest_gap(ratios, oracle)
    if gap == 0:
        return 1.0
    orders = 0
    # reflections: paths that cross one border, less those that cross both, and so on
    for k in range(1, rows // gap + 1):
        term = math.comb(2 * rows, rows - k * gap)
        orders += term if k % 2 else -term
    return min(2 * orders / math.comb(2 * rows, rows), 1.0)


def largest_gap(a: Sequence[float], b: Sequence[float]) -> int:
    """The largest difference, over all thresholds, in how many values of either list are at or
    below it: D of Kolmogorov-Smirnov times the length of the lists.
    """
    steps = sorted([(value, 1) for value in a] + [(value, -1) for value in b])
    height = most = 0
    for at, (value, step) in enumerate(steps):
        height += step
        # equal values are one threshold: only behind the last of them is there a difference
        if at + 1 == len(steps) or steps[at + 1][0] != value:
            most = max(most, abs(height))
    return most


def model_utility(parts: Sequence[float]) -> float:
    """The harmonic mean; 0 if one part is 0. It is ruled by its weakest part and can rise while
    another falls: show the parts. Raises DataError for none or one below 0, NonFiniteError.
    """
    if not parts or any(value < 0 for value in parts):
        raise DataError(f"model utility needs values of at least 0, got {list(parts)}")
    if not all(map(math.isfinite, parts)):
        raise NonFiniteError(f"model utility needs numbers, got {list(parts)}")
    return len(parts) / math.fsum(1 / value for value in parts) if min(parts) > 0 else 0.0


def relative_difference(value: float, reference: float) -> float:
    """100 (value - reference) / reference, percent. Raises DataError for a reference of 0."""
    if reference == 0:
        raise DataError("a relative difference needs a reference other than 0")
    return 100 * (value - reference) / reference
