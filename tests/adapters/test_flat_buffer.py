"""A flat buffer: its norm against numpy's sum in float64; its tensors in stacks against slices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorry.adapters.flat_buffer import BLOCK, euclidean_norm, nonzero_somewhere, stack_equal


@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, 5 * BLOCK + 3, 30_000_000])
def test_the_norm_of_fp32_is_that_of_fp64(count: int) -> None:
    """torch's own norm of 30 million fp32 values is 1e-4 off and more."""
    flat = torch.rand(count, generator=torch.Generator().manual_seed(0)) - 0.5
    # by numpy, which sums in pairs, in float64
    expected = math.sqrt(float(np.square(flat.numpy().astype(np.float64)).sum()))
    assert euclidean_norm(flat) == pytest.approx(expected, rel=1e-7)


@given(st.integers(0, 2 * BLOCK), st.sampled_from([math.inf, -math.inf, math.nan]))
def test_a_value_that_is_none_is_in_the_norm(at: int, value: float) -> None:
    flat = torch.ones(2 * BLOCK + 1, dtype=torch.float32)
    flat[at] = value
    assert not math.isfinite(euclidean_norm(flat))


def test_first_values_tell_of_parts_that_are_not_zero() -> None:
    flat = torch.tensor([0.0, 5.0, -0.0, math.nan, 0.0, 1e-45])
    sizes = [2, 0, 1, 1, 0, 1, 1, 0]
    # of the first part the second value alone is not zero, which is not looked at; -0.0 is zero
    assert nonzero_somewhere(flat, sizes) == [False, False, False, True, False, False, True, False]
    assert nonzero_somewhere(flat[:0], [0, 0]) == [False, False]


# of three layers that are alike: q, k, a wide one; and of modules in no order
LAYERS = [(4, 6), (2, 6), (4, 6), (4, 9)] * 3
NO_ORDER = [(4, 6), (4, 6), (2, 3), (4, 6), (4, 6), (4, 6), (2, 3)]


@pytest.mark.parametrize(("shapes", "count"), [(LAYERS, 4), (NO_ORDER, 4), ([(3, 2)], 1), ([], 0)])
def test_stacks_hold_every_tensor_once(shapes: list[tuple[int, int]], count: int) -> None:
    before, behind = 5, 3
    flat = torch.arange(before + sum(math.prod(s) for s in shapes) + behind, dtype=torch.float32)
    starts = [before + sum(math.prod(s) for s in shapes[:n]) for n in range(len(shapes))]
    stacks = stack_equal(shapes, starts)
    assert len(stacks) == count
    assert sorted(m for stack in stacks for m in stack.members) == list(range(len(shapes)))
    for stack in stacks:
        for number, got in zip(stack.members, stack.view(flat), strict=True):
            size = math.prod(shapes[number])
            wanted = flat[starts[number] : starts[number] + size].view(shapes[number])
            assert torch.equal(got, wanted)
        stack.view(flat).zero_()
    assert flat.count_nonzero() == before + behind - 1  # the first value is 0
