"""Micro-batches of several row sets: every row to forget once an epoch, a retained row beside each
and none twice before all were there, alternates in the group of their row; all of it a function of
the step.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.data.encoding.token_set import TokenSet
from lorry.data.stream.dataset import TrainStream
from lorry.data.stream.report import DataReport
from lorry.data.stream.roles import Alternates, RoleStream
from lorry.errors import DataError


def token_set(rows: int, first: int, lengths: int = 3) -> TokenSet:
    """Rows of a few tokens; the second token tells which row it is."""
    tokens = np.array([[0, first + row] + [9] * lengths for row in range(rows)], dtype=np.int32)
    weights = np.array([[0, 0] + [1] * lengths] * rows, dtype=np.float32)
    edges = np.arange(rows + 1, dtype=np.int64) * (lengths + 2)
    where = tuple(f"set:{row + 1}" for row in range(rows))
    return TokenSet(
        tokens.ravel(), weights.ravel(), edges, np.full(rows, -1), where, DataReport("set")
    )


def stream(
    forget: int, retain: int, *, batch: int, accumulation: int, seed: int, packing: bool = False,
    variants: int = 0, anchor: str = "forget",
) -> RoleStream:  # fmt: skip
    beside = {"forget": token_set(forget, 1000), "retain": token_set(retain, 2000)}
    first = TrainStream(
        beside.pop(anchor), seed=seed, rows_per_batch=batch, packing=packing,
        gradient_accumulation_steps=accumulation, max_tokens=12,
    )  # fmt: skip
    others = [[row * variants + v for v in range(variants)] for row in range(forget)]
    alternates = {"forget": Alternates(token_set(forget * variants, 5000), others)}
    return RoleStream(
        first, anchor, beside=beside,
        alternates=alternates if variants else {}, seed=seed,
    )  # fmt: skip


def named(made: RoleStream, step: int) -> list[list[tuple[str, int, int, int]]]:
    """(role, which row, group, key) of each sequence of each micro-batch."""
    return [
        [
            (role, int(batch.tokens[start + 1]), int(group), int(key))
            for role, (start, _), group, key in zip(
                batch.role, batch.segments, batch.group, batch.key, strict=True
            )
        ]
        for batch in made.batches(step)
    ]


@settings(max_examples=60, deadline=None)
@given(
    forget=st.integers(1, 9),
    retain=st.integers(1, 9),
    batch=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 5),
    packing=st.booleans(),
    anchor=st.sampled_from(["forget", "retain"]),
)
def test_rows_are_drawn_in_turn(
    forget: int, retain: int, batch: int, accumulation: int, seed: int, packing: bool, anchor: str
) -> None:
    """An epoch is a pass over the anchor's rows; of the others none comes again before all did."""
    made = stream(
        forget, retain, batch=batch, accumulation=accumulation, seed=seed, packing=packing,
        anchor=anchor,
    )  # fmt: skip
    firsts = {"forget": (1000, forget), "retain": (2000, retain)}
    other = next(role for role in firsts if role != anchor)
    steps = made.total_steps(3)
    if not packing:
        micro_batches = -(-firsts[anchor][1] // batch)
        assert made.steps_per_epoch == -(-micro_batches // accumulation) == steps / 3
        assert [made.epoch_of(s) for s in range(steps)] == [s * 3 // steps for s in range(steps)]
    seen = [named(made, step) for step in range(steps)]
    for micro_batches in seen:
        for rows in micro_batches:
            roles = Counter(role for role, *_ in rows)
            assert roles["forget"] == roles["retain"]
    flat = [row for micro_batches in seen for rows in micro_batches for row in rows]
    first, rows_of_anchor = firsts[anchor]
    in_order = [row for role, row, *_ in flat if role == anchor]
    assert Counter(in_order) == dict.fromkeys(range(first, first + rows_of_anchor), 3)
    drawn, lap_rows = [row for role, row, *_ in flat if role == other], firsts[other][1]
    for lap in range(0, len(drawn), lap_rows):  # no row again before all were there
        assert len(set(drawn[lap : lap + lap_rows])) == len(drawn[lap : lap + lap_rows])
    again = stream(
        forget, retain, batch=batch, accumulation=accumulation, seed=seed, packing=packing,
        anchor=anchor,
    )  # fmt: skip
    for step in reversed(range(steps)):  # whatever was asked before
        assert named(again, step) == seen[step]


@settings(max_examples=30, deadline=None)
@given(
    forget=st.integers(1, 6),
    variants=st.integers(1, 4),
    seed=st.integers(0, 5),
    anchor=st.sampled_from(["forget", "retain"]),
)
def test_alternates_stand_in_the_group_of_their_row(
    forget: int, variants: int, seed: int, anchor: str
) -> None:
    made = stream(forget, 4, batch=3, accumulation=1, seed=seed, variants=variants, anchor=anchor)
    for step in range(made.total_steps(2)):
        for rows in named(made, step):
            asked = {group: row - 1000 for role, row, group, _ in rows if role == "forget"}
            others = {group: row - 5000 for role, row, group, _ in rows if role == "alternate"}
            assert asked.keys() == others.keys()
            assert {g: other // variants for g, other in others.items()} == asked
            assert {group for role, _, group, _ in rows if role == "retain"} == {-1}
            keys = [key for *_, key in rows]
            assert len(set(keys)) == len(keys)  # each has dropout of its own


def test_a_row_meets_others_in_every_epoch() -> None:
    made = stream(16, 16, batch=4, accumulation=1, seed=0)
    partners = dict[int, set[int]]()
    for step in range(3 * made.steps_per_epoch):
        for batch in named(made, step):
            forget = [row for role, row, *_ in batch if role == "forget"]
            retain = [row for role, row, *_ in batch if role == "retain"]
            for one, other in zip(forget, retain, strict=True):
                partners.setdefault(one, set()).add(other)
    # 16 rows of three draws each: by chance alone at most one pair in 16 comes back
    assert sum(map(len, partners.values())) > 36
    assert any(one - 1000 != other - 2000 for one, others in partners.items() for other in others)


def test_another_set_is_refused_on_resume() -> None:
    made = stream(4, 5, batch=2, accumulation=1, seed=0)
    made.load_state(made.state())
    with pytest.raises(DataError, match="not the retain set"):
        stream(4, 6, batch=2, accumulation=1, seed=0).load_state(made.state())
