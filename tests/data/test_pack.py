"""Order and packing: pure, complete, never over the limit, and keys that depend on nothing but row
and epoch.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.data.stream.pack import epoch_order, packing_efficiency, plan_epoch, sequence_key
from lorry.errors import DataError

LENGTHS = st.lists(st.integers(1, 40), min_size=0, max_size=120).map(
    lambda values: np.array(values, dtype=np.int64)
)


@given(n=st.integers(0, 300), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_order_is_a_permutation_and_a_pure_function(n: int, seed: int, epoch: int) -> None:
    order = epoch_order(n, seed, epoch)
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == epoch_order(n, seed, epoch).tolist()
    assert epoch_order(n, seed, epoch, shuffle=False).tolist() == list(range(n))


def philox(key: tuple[int, int], n: int) -> list[int]:
    """Philox4x64-10 in plain Python (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
    2011), from counter 1.
    """
    mask, made = (1 << 64) - 1, []
    for counter in range(1, n // 4 + 2):
        c, k = [counter, 0, 0, 0], list(key)
        for _ in range(10):
            one, two = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [(two >> 64) ^ c[1] ^ k[0], two & mask, (one >> 64) ^ c[3] ^ k[1], one & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        made += c
    return made[:n]


@pytest.mark.parametrize(("n", "seed", "epoch"), [(10, 0, 0), (1, 5, 5), (257, 42, 3)])
def test_order_is_the_one_described(n: int, seed: int, epoch: int) -> None:
    """Another order would silently change every run that is resumed with a newer version."""
    digest = hashlib.sha256(f"order/{seed}/{epoch}".encode()).digest()
    draws = philox(
        (int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")), n
    )
    assert epoch_order(n, seed, epoch).tolist() == sorted(range(n), key=lambda row: draws[row])
    assert epoch_order(10, 0, 0).tolist() == [1, 0, 5, 3, 6, 8, 9, 2, 4, 7]


def test_every_place_is_equally_likely() -> None:
    """Mean position of each row over many epochs, against the normal approximation (4 sigma)."""
    positions = np.array([np.argsort(epoch_order(20, 3, epoch)) for epoch in range(2000)])
    sigma = np.sqrt((20**2 - 1) / 12 / 2000)
    assert np.abs(positions.mean(axis=0) - 9.5).max() < 4 * sigma


@settings(max_examples=200, deadline=None)
@given(
    lengths=LENGTHS,
    seed=st.integers(0, 99),
    rows=st.integers(1, 6),
    packing=st.booleans(),
    data=st.data(),
)
def test_plans_hold_every_row_once(
    lengths: np.ndarray, seed: int, rows: int, packing: bool, data: st.DataObject
) -> None:
    n = len(lengths)
    groups = np.array(
        data.draw(st.lists(st.integers(-1, 8), min_size=n, max_size=n)), dtype=np.int64
    )
    biggest = max([int(lengths[groups == g].sum()) for g in set(groups.tolist()) - {-1}] + [40])
    limit = data.draw(st.integers(biggest, biggest + 200))
    order = epoch_order(n, seed, 0)
    plan = plan_epoch(
        lengths, order, rows_per_batch=rows, max_tokens=limit, packing=packing, groups=groups
    )
    assert sorted(row for batch in plan for row in batch) == list(range(n))
    assert plan == plan_epoch(
        lengths, order, rows_per_batch=rows, max_tokens=limit, packing=packing, groups=groups
    )
    for group in set(groups.tolist()) - {-1}:
        assert sum(any(groups[row] == group for row in batch) for batch in plan) == 1, (
            "a group was split"
        )
    if packing:
        assert all(lengths[batch].sum() <= limit for batch in plan)
        assert 0 <= packing_efficiency(lengths, plan, limit) <= 1
    else:
        units = [
            len([row for row in batch if groups[row] < 0])
            + len({groups[row] for row in batch} - {-1})
            for batch in plan
        ]
        assert all(count == rows for count in units[:-1])
        assert all(0 < count <= rows for count in units[-1:])


def test_without_packing_the_order_is_kept() -> None:
    plan = plan_epoch(
        np.ones(7, int),
        np.array([3, 1, 4, 0, 5, 2, 6]),
        rows_per_batch=3,
        max_tokens=0,
        packing=False,
    )
    assert plan == [[3, 1, 4], [0, 5, 2], [6]]


def test_packing_is_full_and_shuffled() -> None:
    """Lengths as in real chats: the fill is high, and long rows are not read first."""
    draw = np.random.default_rng(0)
    lengths = np.minimum(draw.lognormal(4.5, 0.8, 5000).astype(int) + 5, 1024)
    plan = plan_epoch(
        lengths, epoch_order(5000, 0, 0), rows_per_batch=2, max_tokens=2048, packing=True
    )
    assert packing_efficiency(lengths, plan, 2048) > 0.97
    assert len(plan) <= np.ceil(lengths.sum() / 2048) * 11 / 9
    means = [lengths[batch].mean() for batch in plan]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.25


def test_long_rows_are_packed_well_too() -> None:
    """Rows of a sixth to a half of a micro-batch, where the order in which they are placed matters."""
    lengths = np.random.default_rng(0).integers(350, 1025, 3000)
    plan = plan_epoch(
        lengths, epoch_order(3000, 0, 0), rows_per_batch=2, max_tokens=2048, packing=True
    )
    assert packing_efficiency(lengths, plan, 2048) > 0.935


def test_a_row_that_no_batch_holds_is_an_error() -> None:
    with pytest.raises(DataError, match="41 tokens does not fit into a micro-batch of 40"):
        plan_epoch(np.array([3, 41]), np.arange(2), rows_per_batch=1, max_tokens=40, packing=True)


def test_keys_name_row_and_epoch() -> None:
    keys = {sequence_key(row, epoch) for row in range(2000) for epoch in range(20)}
    assert len(keys) == 40_000
    assert all(0 <= key < 1 << 63 for key in keys)
    # SplitMix64's published first output for seed 0
    assert sequence_key(1, -1) == 0xE220A8397B1DCDAF >> 1
