"""The norm of a flat buffer against numpy's sum in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorry.adapters.flat_buffer import BLOCK, euclidean_norm


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
