"""Multiple choice scored from log-likelihoods: accuracy, and whether the model's confidence means
anything.

Try: ``measure_options([[-1.0, -3.0], [-2.0, -2.5]], [{0}, {1}])["accuracy"].value`` is 0.5.

The probabilities are the softmax of a row's log-likelihoods over its options. Summed and
length-normalised log-likelihoods give other probabilities, and other calibration: say which were
used.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from lorry.errors import DataError, NonFiniteError
from lorry.evaluate.metrics.bootstrap import MetricEstimate, corpus_interval, estimate_mean

if TYPE_CHECKING:
    import numpy

OPTION_METRICS = ("accuracy", "ece", "brier", "confidence")
# the value hangs on it, so it is no setting (Guo et al. report 15)
CALIBRATION_BINS = 10


def measure_options(
    loglikelihoods: Sequence[Sequence[float]], right: Sequence[Collection[int]], seed: int = 0
) -> dict[str, MetricEstimate]:
    """`OPTION_METRICS` of rows of options, each with its 95% bootstrap interval.

    ``loglikelihoods``: by row, one per option in nats (rows may differ in their number); ``right``:
    the numbers of the options that are right, at least one a row. accuracy: the likeliest option is
    a right one (of equals, the first). confidence: its probability. brier: sum over options of
    (probability - 1 or 0)^2 (Brier 1950), 0 to 2; several right options share the 1 equally. ece:
    expected calibration error (Guo et al. 2017): mean over rows of |accuracy - confidence| of their
    bin, 10 bins of equal width. Few rows overestimate it, and resampling them does so once more:
    its interval may lie above its value. Raises DataError for no rows, unequal lists, fewer than
    two options, or a right option that is not there, with the row; NonFiniteError for a NaN, +inf,
    or a row without a possible option.
    """
    if len(loglikelihoods) != len(right) or not right:
        raise DataError(
            f"{len(loglikelihoods)} rows of options and {len(right)} of right ones; both must be equal and above 0"
        )
    accuracy, confidence, brier = [], [], []
    for number, (values, correct) in enumerate(zip(loglikelihoods, right, strict=True)):
        _check_options(number, values, correct)
        probabilities = softmax_probabilities(values)
        # max takes the first of equals
        chosen = max(range(len(values)), key=probabilities.__getitem__)
        share = 1 / len(set(correct))
        accuracy.append(float(chosen in correct))
        confidence.append(probabilities[chosen])
        brier.append(
            math.fsum(
                (p - share * (option in correct)) ** 2 for option, p in enumerate(probabilities)
            )
        )
    gaps = _calibration_gaps(confidence, accuracy)
    return {
        "accuracy": estimate_mean(accuracy, seed),
        "ece": MetricEstimate(
            float(_total_gap(gaps.sum(axis=0))), corpus_interval(gaps, _total_gap, seed)
        ),
        "brier": estimate_mean(brier, seed),
        "confidence": estimate_mean(confidence, seed),
    }


def softmax_probabilities(loglikelihoods: Sequence[float]) -> list[float]:
    """Probabilities in proportion to exp of finite values or -inf, one of them finite; they sum to
    1.
    """
    # less the greatest, or sums of long options would all be exp(-hundreds) = 0
    top = max(loglikelihoods)
    weights = [math.exp(value - top) for value in loglikelihoods]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _calibration_gaps(confidence: Sequence[float], accuracy: Sequence[float]) -> numpy.ndarray:
    """[rows, BINS]: a row's (accuracy - confidence) / rows in its bin's column; the m-th bin is ((m
    - 1) / BINS, m / BINS].
    """
    import numpy

    gaps = numpy.zeros((len(confidence), CALIBRATION_BINS))
    for row, (sure, hit) in enumerate(zip(confidence, accuracy, strict=True)):
        # signed, divided by all rows: summed by bin, the absolute value is that bin's weighted gap
        gaps[row, max(math.ceil(sure * CALIBRATION_BINS) - 1, 0)] = (hit - sure) / len(confidence)
    return gaps


def _total_gap(sums: numpy.ndarray) -> numpy.ndarray:
    """The calibration error of summed gaps, [..., BINS] to [...]."""
    return abs(sums).sum(axis=-1)


def _check_options(number: int, values: Sequence[float], correct: Collection[int]) -> None:
    if len(values) < 2:
        raise DataError(f"row {number} has {len(values)} options; a choice needs at least two")
    if not correct or not set(correct) <= set(range(len(values))):
        raise DataError(
            f"row {number}: right options {sorted(correct)}; give one or more of 0 "
            f"to {len(values) - 1}"
        )
    if any(value != value or value == math.inf for value in values) or max(values) == -math.inf:
        raise NonFiniteError(
            f"row {number}: log-likelihoods {list(values)}; all have to be numbers, "
            "at least one above -inf"
        )
