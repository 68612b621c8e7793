"""The order of a mixture: shares by count, no row twice before all once, evenly among each other,
the same everywhere.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lorry.data.stream.mixing import MixtureOrder


def mixing(counts: list[int], shares: tuple[float, ...] | None) -> MixtureOrder:
    names = tuple(f"set{n}" for n in range(len(counts)))
    return MixtureOrder(names, np.repeat(np.arange(len(counts)), counts), shares)


COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=4)


@given(COUNTS, st.integers(0, 3), st.integers(0, 5), st.booleans())
def test_without_shares_every_row_stands_once_in_every_epoch(
    counts: list[int], seed: int, epoch: int, shuffle: bool
) -> None:
    order = mixing(counts, None).order(seed, epoch, shuffle)
    assert sorted(order.tolist()) == list(range(sum(counts)))


@given(COUNTS, st.data(), st.integers(0, 3))
def test_shares_are_kept_to_a_row(counts: list[int], data: st.DataObject, seed: int) -> None:
    shares = tuple(data.draw(st.integers(1, 9)) for _ in counts)
    made = mixing(counts, tuple(map(float, shares)))
    drawn = Counter(made.of[made.order(seed, 0, True)].tolist())
    assert sum(drawn.values()) == sum(counts)
    for number, share in enumerate(shares):
        exact = Fraction(share, sum(shares)) * sum(counts)
        assert abs(drawn[number] - exact) < 1


@given(COUNTS, st.data(), st.integers(0, 3), st.integers(1, 6))
def test_no_row_is_seen_again_before_all_of_its_set_were(
    counts: list[int], data: st.DataObject, seed: int, epochs: int
) -> None:
    made = mixing(counts, tuple(float(data.draw(st.integers(1, 9))) for _ in counts))
    read = np.concatenate([made.order(seed, epoch, True) for epoch in range(epochs)])
    for number, count in enumerate(counts):
        own = [int(row) for row in read if made.of[row] == number]
        for start in range(0, len(own), count):
            passed = own[start : start + count]
            assert len(set(passed)) == len(passed)


def test_sets_lie_evenly_among_each_other() -> None:
    made = mixing([30, 10], None)
    sets = made.of[made.order(0, 0, True)]
    assert all(
        int((sets[at : at + 4] == 0).sum()) + 1 >= 3 and int((sets[at : at + 4] == 1).sum()) <= 2
        for at in range(0, 40, 4)
    )
    assert max(np.diff(np.flatnonzero(sets == 1))) <= 5


def test_the_order_is_another_with_seed_and_epoch_and_the_same_again() -> None:
    made = mixing([40, 40], None)
    assert (made.order(1, 2, True) == made.order(1, 2, True)).all()
    assert (made.order(1, 2, True) != made.order(2, 2, True)).any()
    assert (made.order(1, 2, True) != made.order(1, 3, True)).any()
    assert made.order(0, 0, False).tolist()[:4] == [0, 40, 1, 41]


def test_a_known_order_does_not_move() -> None:
    """Another order would silently change what a resumed run reads."""
    assert mixing([5, 3], (1.0, 1.0)).order(7, 1, True).tolist() == [2, 5, 3, 7, 2, 6, 4, 5]
