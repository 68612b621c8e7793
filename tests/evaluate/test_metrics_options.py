"""Multiple choice: probabilities, accuracy, Brier score and calibration error by hand and by loops
of another shape.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.errors import DataError, NonFiniteError
from lorry.evaluate.metrics.registry import OPTION_METRICS, measure_options

pytestmark = pytest.mark.usefixtures("intervals_of_any_rows")

options = st.lists(st.floats(-60, 0), min_size=2, max_size=5)
tables = st.lists(
    options.flatmap(
        lambda o: st.tuples(st.just(o), st.sets(st.integers(0, len(o) - 1), min_size=1))
    ),
    min_size=1,
)


def plain_ece(confidence: list[float], accuracy: list[float]) -> float:
    """Guo et al. 2017, equation 3, bin by bin: sum over bins of |B| / n * |accuracy(B) -
    confidence(B)|.
    """
    edges = numpy.linspace(0.0, 1.0, 11)
    total = 0.0
    for low, high in pairwise(edges):
        members = [i for i, c in enumerate(confidence) if low < c <= high]
        if members:
            hits = sum(accuracy[i] for i in members) / len(members)
            sure = sum(confidence[i] for i in members) / len(members)
            total += len(members) / len(confidence) * abs(hits - sure)
    return total


def rows_of(*probabilities: tuple[float, ...]) -> list[list[float]]:
    """Log-likelihoods with these probabilities, each row shifted by another constant, which a
    softmax does not see.
    """
    return [[math.log(p) - 3.7 * row for p in ps] for row, ps in enumerate(probabilities)]


def test_four_rows_by_hand() -> None:
    found = measure_options(
        rows_of((0.9, 0.1), (0.25, 0.75), (0.72, 0.2, 0.08), (0.4, 0.35, 0.25)),
        [{0}, [0], (0,), {1}],
    )
    assert list(found) == list(OPTION_METRICS)
    assert found["accuracy"].rows == [1, 0, 1, 0]
    assert found["accuracy"].value == 0.5
    assert found["confidence"].rows == pytest.approx([0.9, 0.75, 0.72, 0.4])
    assert found["brier"].rows == pytest.approx(
        [2 * 0.1**2, 2 * 0.75**2, 0.28**2 + 0.2**2 + 0.08**2, 0.4**2 + 0.65**2 + 0.25**2]
    )  # fmt: skip
    # Bins: 0.9 alone (right), 0.75 and 0.72 together (one right), 0.4 alone (wrong).
    assert found["ece"].value == pytest.approx(
        (abs(1 - 0.9) + abs(1 - 0.75 - 0.72) + abs(0 - 0.4)) / 4
    )
    assert found["ece"].rows is None


def test_bins_are_closed_above() -> None:
    # Two equal options: confidence 0.5 lies in (0.4, 0.5], apart from 0.55 in (0.5, 0.6]; together
    # the gaps would cancel to 0.05.
    found = measure_options([[0.0, 0.0], *rows_of((0.55, 0.45))], [{1}, {0}])
    assert found["ece"].value == pytest.approx((0.5 + 0.45) / 2)


def test_several_right_options_share_the_one() -> None:
    found = measure_options(rows_of((0.5, 0.3, 0.2)), [{0, 1}])
    assert found["accuracy"].value == 1.0
    assert found["brier"].value == pytest.approx(0.0**2 + 0.2**2 + 0.2**2)


def test_impossible_options_have_probability_zero() -> None:
    found = measure_options([[-math.inf, -2000.0, -2000.0]], [{1}])
    assert found["confidence"].value == 0.5
    assert found["brier"].value == pytest.approx(0.5)
    assert measure_options([[-5000.0, -1.0]], [{1}])["brier"].value == 0.0


@settings(max_examples=60)
@given(tables, st.integers(0, 1000))
def test_every_number_equals_a_loops(table: list[tuple[list[float], set[int]]], seed: int) -> None:
    loglikelihoods, right = [o for o, _ in table], [r for _, r in table]
    found = measure_options(loglikelihoods, right, seed)
    probabilities = [scipy.special.softmax(numpy.array(o)) for o in loglikelihoods]
    sure = [float(p.max()) for p in probabilities]
    hits = [float(int(p.argmax()) in r) for p, r in zip(probabilities, right, strict=True)]
    assert found["confidence"].rows == pytest.approx(sure)
    # no tie that rounding could decide
    if all((numpy.sort(p)[-1] - numpy.sort(p)[-2]) > 1e-9 for p in probabilities):
        assert found["accuracy"].rows == hits
        if all(abs(10 * c - round(10 * c)) > 1e-9 for c in sure if c < 1):
            assert found["ece"].value == pytest.approx(plain_ece(sure, hits), abs=1e-9)
    turned = measure_options(loglikelihoods[::-1], right[::-1], seed)
    for name, one in found.items():
        assert turned[name].value == pytest.approx(one.value)
        assert all(
            0 <= value <= (2 if name == "brier" else 1) + 1e-12
            for value in (one.value, *one.interval)
        )


def test_the_interval_of_ece_is_that_of_a_plain_loop() -> None:
    random = numpy.random.default_rng(1)
    loglikelihoods = random.normal(0, 1.5, size=(40, 4))
    right = random.integers(4, size=40)
    found = measure_options(loglikelihoods.tolist(), [{int(r)} for r in right], seed=9)
    sure = scipy.special.softmax(loglikelihoods, axis=1).max(axis=1)
    hits = (loglikelihoods.argmax(axis=1) == right).astype(float)
    draw = numpy.random.default_rng(9)
    scores = [
        plain_ece(list(sure[i]), list(hits[i]))
        for i in (draw.integers(40, size=40) for _ in range(1000))
    ]
    assert found["ece"].value == pytest.approx(plain_ece(list(sure), list(hits)))
    assert found["ece"].interval == pytest.approx(
        tuple(numpy.percentile(scores, [2.5, 97.5])), abs=1e-9
    )


def test_a_calibrated_model_has_little_error_and_an_overconfident_one_much() -> None:
    random = numpy.random.default_rng(2)
    logits = random.normal(0, 1, size=(4000, 4))
    # truth drawn from the model's own belief
    right = [{int(random.choice(4, p=scipy.special.softmax(row)))} for row in logits]
    assert measure_options(logits.tolist(), right)["ece"].value < 0.03
    assert measure_options((4 * logits).tolist(), right)["ece"].value > 0.2


@pytest.mark.parametrize(
    ("loglikelihoods", "right", "error", "message"),
    [
        ([], [], DataError, "above 0"),
        ([[0.0, 1.0]], [], DataError, "1 rows of options and 0"),
        ([[0.0, 1.0], [0.0]], [{0}, {0}], DataError, "row 1 has 1 options"),
        ([[0.0, 1.0]], [{2}], DataError, r"row 0: right options \[2\]; give one or more of 0 to 1"),
        ([[0.0, 1.0]], [{-1}], DataError, "row 0"),
        ([[0.0, 1.0]], [set()], DataError, "row 0"),
        ([[0.0, 1.0], [0.0, math.nan]], [{0}, {0}], NonFiniteError, "row 1"),
        ([[-math.inf, -math.inf]], [{0}], NonFiniteError, "row 0"),
        ([[0.0, math.inf]], [{0}], NonFiniteError, "row 0"),
    ],
)
def test_what_cannot_be_scored_names_the_row(loglikelihoods, right, error, message) -> None:
    with pytest.raises(error, match=message):
        measure_options(loglikelihoods, right)
