"""Parts of a dimension against lists written by hand."""

from __future__ import annotations

import pytest
import torch

from lorry.adapters.tensor_parallel.slices import DimensionSlice, LayerSlices
from tests.support.threads import Meeting, ThreadRanks


@pytest.mark.parametrize(
    ("ranks", "blocks", "parts"),
    [
        (2, 1, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]),
        # q q q q k k k k v v v v: a rank has its heads of each
        (2, 3, [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]),
        (4, 3, [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]),
    ],
)
def test_parts_of_a_dimension(ranks: int, blocks: int, parts: list[list[int]]) -> None:
    whole = torch.arange(12)
    cut = [DimensionSlice(12, ranks, rank, blocks) for rank in range(ranks)]
    for part, expected in zip(cut, parts, strict=True):
        assert part.cut(whole, 0).tolist() == expected
        assert [i for r in part.ranges() for i in range(r.start, r.stop)] == expected
        at, here = part.local(whole)
        assert whole[here].tolist() == sorted(expected)
        assert part.cut(whole, 0)[at[here]].tolist() == whole[here].tolist()
    columns = whole.repeat(2, 1)
    assert torch.equal(cut[0].join([part.cut(columns, 1) for part in cut], 1), columns)
    assert torch.equal(cut[0].join([part.cut(whole, 0) for part in cut], 0), whole)


def test_sides_of_an_adapter() -> None:
    """Column-parallel: A whole, B cut; row-parallel: the other way round."""
    ranks, part = ThreadRanks(1, 2, Meeting(2)), DimensionSlice(8, 2, 1)
    column, row = LayerSlices(ranks, rows=part), LayerSlices(ranks, columns=part)
    assert (column.of("A"), column.of("B")) == (None, (0, part))
    assert (row.of("A"), row.of("B")) == ((1, part), None)
    assert column.whole_shape("B", (4, 3)) == [8, 3]
    assert row.whole_shape("A", (3, 4)) == [3, 8]
    assert row.whole_shape("B", (5, 3)) == [5, 3]
    assert row.cut("A", torch.arange(8)[None]).tolist() == [[4, 5, 6, 7]]
