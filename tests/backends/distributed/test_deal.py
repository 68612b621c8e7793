"""How the rows of a step are dealt: all of them, once, groups whole, as many passes on each rank."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.backends.distributed.deal import deal_batches
from lorry.data.batch import Batch, BatchExtra, TokenizedExample, collate


def batch(rows: Sequence[tuple[int, int]], first_key: int) -> Batch:
    """Rows of (length, group), with an extra per token and one per sequence that tell them apart."""
    made = collate(
        [
            TokenizedExample([key] * length, [0.0] + [1.0] * (length - 1), key=key, group=group)
            for key, (length, group) in enumerate(rows, first_key)
        ]
    )
    return made.with_extra(
        token=BatchExtra(made.tokens * 10, "token"), sequence=BatchExtra(made.key * 100, "sequence")
    ).with_terms(nll=made.count("token", 1))


ROW = st.tuples(st.integers(1, 9), st.integers(-1, 2))


@settings(max_examples=30)
@given(
    st.lists(st.lists(ROW, min_size=1, max_size=7), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_every_row_is_dealt_once(
    micro_batches: list[list[tuple[int, int]]], ranks: int, step: int
) -> None:
    batches = [batch(rows, 10 * i) for i, rows in enumerate(micro_batches)]
    dealt = deal_batches(batches, ranks, step)
    assert len({len(passes) for passes in dealt}) == 1
    parts = [(rank, part) for rank, passes in enumerate(dealt) for part in passes if part]
    keys = [int(key) for _, part in parts for key in part.key]
    assert sorted(keys) == sorted(int(key) for b in batches for key in b.key)
    owner = {int(key): rank for rank, part in parts for key in part.key}
    for whole in batches:
        by_group: dict[int, set[int]] = {}
        for key, group in zip(whole.key.tolist(), whole.group.tolist(), strict=True):
            if group >= 0:
                by_group.setdefault(group, set()).add(owner[key])
        assert all(len(ranks_of) == 1 for ranks_of in by_group.values())
    for _, part in parts:
        # tokens, weights and extras went along with their sequences
        assert torch.equal(part.tokens, part.key[part.sequence_of])
        assert torch.equal(part.extra["token"].values, part.tokens * 10)
        assert torch.equal(part.extra["sequence"].values, part.key * 100)
        assert torch.equal(part.weights[part.starts[:-1]], torch.zeros(len(part)))
    again = deal_batches(batches, ranks, step)
    assert [[p and p.key.tolist() for p in passes] for passes in again] == [
        [p and p.key.tolist() for p in passes] for passes in dealt
    ]


def test_ranks_get_as_many_tokens() -> None:
    """The longest first: 9 + 1 beside 5 + 5."""
    dealt = deal_batches([batch([(9, -1), (5, -1), (5, -1), (1, -1)], 0)], 2, 0)
    assert [[int(part.lengths.sum()) for part in passes if part] for passes in dealt] == [
        [10],
        [10],
    ]


@pytest.mark.parametrize("ranks", [2, 3])
def test_micro_batches_of_one_row_share_a_pass(ranks: int) -> None:
    """Six of them are three passes of two ranks, two of three, and nobody is idle."""
    dealt = deal_batches([batch([(4, -1)], 10 * i) for i in range(6)], ranks, 0)
    assert all(len(passes) == 6 // ranks and all(passes) for passes in dealt)
