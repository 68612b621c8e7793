"""Batches of several jobs: joined, taken apart, thinned out; against the examples they were made
of, and against plain sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorry.data.batch import Batch, BatchExtra, TokenizedExample, collate
from lorry.data.stream.joint import (
    JointStream,
    assign_adapter,
    count_adapter_tokens,
    interleave_adapters,
    join_batches,
    join_within,
    keep_adapters,
    select_sequences,
)
from lorry.data.stream.pack import sequence_key
from tests.support.seam import examples


def same(a: Batch, b: Batch) -> None:
    for name in ("tokens", "weights", "starts", "adapter", "key", "group"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.role == b.role
    assert a.extra.keys() == b.extra.keys()
    assert all(torch.equal(a.extra[n].values, b.extra[n].values) for n in a.extra)


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def made(n: int, seed: int, extra: bool = False) -> list[TokenizedExample]:
    rows = [replace(e, role=str(seed), adapter=seed) for e in examples(n, seed)]
    if not extra:
        return rows
    return [
        replace(
            e,
            extra={
                "t": BatchExtra(torch.rand(len(e.tokens)), "token"),
                "s": BatchExtra(torch.rand(1, 2), "sequence"),
            },
        )
        for e in rows
    ]


@given(sizes, st.booleans())
def test_joined_batches_are_the_batch_of_all_their_examples(sizes: list[int], extra: bool) -> None:
    rows = [made(n, seed, extra) for seed, n in enumerate(sizes)]
    whole = collate([e for part in rows for e in part])
    joined = join_batches([collate(part) for part in rows])
    same(joined, whole)
    assert count_adapter_tokens([joined], len(sizes)) == [
        sum(len(e.tokens) for e in part) for part in rows
    ]


@given(sizes, st.data(), st.booleans())
def test_some_sequences_are_the_batch_of_their_examples(
    sizes: list[int], data: st.DataObject, extra: bool
) -> None:
    rows = [e for seed, n in enumerate(sizes) for e in made(n, seed, extra)]
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, unique=True))
    same(select_sequences(collate(rows), chosen), collate([rows[s] for s in chosen]))


@given(sizes, st.data())
def test_only_some_adapters_and_their_terms(sizes: list[int], data: st.DataObject) -> None:
    parts = [collate(made(n, seed)) for seed, n in enumerate(sizes)]
    batches = [join_batches(parts), parts[-1]]
    batches = [b.with_terms(nll=b.count("token", len(sizes))) for b in batches]
    wanted = data.draw(st.sets(st.integers(0, len(sizes) - 1)))
    kept = keep_adapters(batches, wanted)
    assert {int(k) for b in kept for k in b.adapter} == wanted
    assert all(len(b) for b in kept)
    for batch in kept:
        assert torch.equal(batch.terms["nll"], batch.count("token", len(sizes)))
        assert batch.terms["nll"].dtype == torch.float64


def test_groups_of_different_batches_stay_apart() -> None:
    parts = [
        collate([replace(e, group=g) for e, g in zip(made(3, s), groups, strict=True)])
        for s, groups in enumerate([(0, 1, -1), (-1, -1, -1), (0, 0, 2)])
    ]
    assert join_batches(parts).group.tolist() == [0, 1, -1, -1, -1, -1, 2, 2, 4]


def test_neighbours_of_other_jobs() -> None:
    whole = join_batches([collate(made(n, k)) for k, n in enumerate((3, 1, 2))])
    assert interleave_adapters(whole, 3).adapter.tolist() == [0, 1, 2, 0, 2, 0]


def test_unlike_batches_are_not_joined() -> None:
    with pytest.raises(ValueError, match="same extra tensors"):
        join_batches([collate(made(2, 0)), collate(made(2, 1, extra=True))])


# --- the stream


class Listed:
    """Batches as written; counts what it was asked for."""

    def __init__(self, steps: Sequence[Sequence[Sequence[TokenizedExample]]]) -> None:
        self.steps, self.at = steps, 0

    def batches(self, step: int) -> list[Batch]:
        self.at = step + 1
        return [collate(rows) for rows in self.steps[step]]

    def state(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def test_micro_batches_side_by_side() -> None:
    """Accumulation of two beside one: the first micro-batch has both jobs, the second the first job
    alone.
    """
    a, b = Listed([[made(2, 0), made(1, 0)]]), Listed([[made(3, 0)]])
    stream = JointStream({"a": a, "b": b}, {"a": 0, "b": 0}, room=10**6)  # type: ignore[dict-item]
    one, two = stream.batches(0)
    assert one.adapter.tolist() == [0, 0, 1, 1, 1]
    assert two.adapter.tolist() == [0]
    assert stream.state() == {"a": {"at": 1}, "b": {"at": 1}}
    stream.load_state({"a": {"at": 4}, "b": {"at": 2}})
    assert (a.at, b.at) == (4, 2)


def test_a_jobs_seed_is_part_of_its_keys() -> None:
    batch = collate(made(3, 1))
    assert torch.equal(assign_adapter(batch, 2, 0).key, batch.key)
    assert assign_adapter(batch, 2, 0).adapter.tolist() == [2, 2, 2]
    seeds = [tuple(assign_adapter(batch, 0, seed).key.tolist()) for seed in range(50)]
    assert len({key for keys in seeds for key in keys}) == 150
    assert min(min(keys) for keys in seeds) >= 0
    assert sequence_key(0, -1) == 0


@given(sizes, st.integers(1, 120))
def test_jobs_share_a_pass_while_they_fit(sizes: list[int], room: int) -> None:
    """Nothing is lost or reordered, no batch that could be smaller is too large, and none could
    have taken its neighbour.
    """
    parts = [collate(made(n, seed)) for seed, n in enumerate(sizes)]
    groups = join_within(parts, room)
    same(join_batches(groups), join_batches(parts))
    lengths = [int(batch.tokens.numel()) for batch in groups]
    assert all(
        n <= room or len(batch.adapter.unique()) == 1
        for n, batch in zip(lengths, groups, strict=True)
    )
    firsts = [parts[int(batch.adapter[0])].tokens.numel() for batch in groups]
    assert all(n + following > room for n, following in zip(lengths, firsts[1:], strict=False))
