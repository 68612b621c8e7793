"""The attention kernel against float64 attention, segment by segment; on machines without matrix
tiles these are skipped.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lorry.kernels import attention as kernel
from lorry.kernels import kernel_status

pytestmark = pytest.mark.skipif(
    not kernel_status().amx,
    reason=f"the attention kernel does not run here: {kernel_status().line()}",
)


def inputs(total: int, heads: int, groups: int, width: int, spread: float = 1.0) -> list[Tensor]:
    """q, k, v and the gradient of the output, bfloat16."""
    torch.manual_seed(total * heads + width)
    return [
        (torch.randn(total, h, width) * spread).bfloat16() for h in (heads, groups, groups, heads)
    ]


def truth(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, starts: list[int]) -> list[Tensor]:
    """Output and gradients in float64, each segment attended to by itself."""
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    share = q.shape[1] // k.shape[1]
    parts = []
    for start, stop in itertools.pairwise(starts):
        one = [
            x[start:stop].transpose(0, 1)
            for x in (wide[0], *(x.repeat_interleave(share, 1) for x in wide[1:]))
        ]
        parts.append(F.scaled_dot_product_attention(*one, is_causal=True).transpose(0, 1))
    out = torch.cat(parts)
    out.backward(grad.double())
    return [out.detach(), *(x.grad for x in wide if x.grad is not None)]


def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, starts: list[int]) -> list[Tensor]:
    bounds, scale = torch.tensor(starts), q.shape[-1] ** -0.5
    o, lse = kernel.run_attention(q, k, v, bounds, scale)
    return [o, *kernel.run_attention_backward(q, k, v, o, lse, bounds, scale, grad)]


def off(mine: Tensor, true: Tensor) -> float:
    """Relative error in the Frobenius norm; of a zero, the norm itself."""
    return float((mine.double() - true).norm() / max(float(true.norm()), 1e-2))


@pytest.mark.parametrize(
    ("heads", "groups", "width"), [(9, 3, 64), (4, 4, 32), (2, 1, 96), (4, 2, 128), (7, 1, 64)]
)
@pytest.mark.parametrize("starts", [[0, 64], [0, 1], [0, 63, 128, 193], [0, 5, 70, 71, 200, 333]])
def test_output_and_gradients(heads: int, groups: int, width: int, starts: list[int]) -> None:
    given_ = inputs(starts[-1], heads, groups, width)
    errors = [off(a, b) for a, b in zip(run(*given_, starts), truth(*given_, starts), strict=True)]
    assert max(errors) < 6e-3


def test_large_scores() -> None:
    """Trained attention is peaked: scores of a standard deviation of 16."""
    given_ = inputs(300, 9, 3, 64, spread=4.0)
    assert (
        max(
            off(a, b) for a, b in zip(run(*given_, [0, 300]), truth(*given_, [0, 300]), strict=True)
        )
        < 1e-2
    )


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 150), min_size=1, max_size=6), st.sampled_from([(3, 1), (2, 2), (4, 2)])
)
def test_any_lengths(lengths: list[int], heads: tuple[int, int]) -> None:
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    given_ = inputs(starts[-1], *heads, 32)
    assert (
        max(off(a, b) for a, b in zip(run(*given_, starts), truth(*given_, starts), strict=True))
        < 1e-2
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_a_segment_does_not_see_its_neighbours(threads: int) -> None:
    starts = [0, 40, 170, 200]
    one, other = inputs(200, 4, 2, 64), inputs(200, 4, 2, 64)
    for a, b in zip(one, other, strict=True):
        b[:40], b[170:] = torch.randn_like(b[:40]), torch.randn_like(b[170:])
        assert torch.equal(a[40:170], b[40:170])
    torch.set_num_threads(threads)
    try:
        for a, b in zip(run(*one, starts), run(*other, starts), strict=True):
            assert torch.equal(a[40:170], b[40:170])
            assert not torch.equal(a[:40], b[:40])
    finally:
        torch.set_num_threads(1)


def test_threads_split_a_lone_segment_by_heads() -> None:
    given_ = inputs(200, 9, 3, 64)
    torch.set_num_threads(2)
    try:
        errors = [
            off(a, b) for a, b in zip(run(*given_, [0, 200]), truth(*given_, [0, 200]), strict=True)
        ]
    finally:
        torch.set_num_threads(1)
    assert max(errors) < 6e-3


def test_no_number_comes_out_of_nan() -> None:
    q, k, v, grad = inputs(100, 2, 1, 64)
    k[30] = torch.nan
    out, dq, _, _ = run(q, k, v, grad, [0, 100])
    assert torch.isfinite(out[:30]).all()
    assert torch.isnan(out[30:].float()).any(-1).all()
    assert torch.isnan(dq[30:].float()).any(-1).all()


def test_what_it_does_not_take() -> None:
    q, k, _, _ = inputs(4, 4, 2, 64)
    assert kernel.supports_attention(q, k)
    assert not kernel.supports_attention(q.float(), k.float())
    assert not kernel.supports_attention(q[..., :48], k[..., :48])
    with pytest.raises(ValueError, match="contiguous"):
        kernel.run_attention(q.transpose(0, 1), k, k, torch.tensor([0, 4]), 1.0)
