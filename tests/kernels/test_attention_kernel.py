"""The attention kernels against float64 attention, segment by segment: on vectors in float32 and
bfloat16, and in bfloat16 products where the machine has them, on matrix tiles or in dot products.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lorry.kernels import attention as kernel
from lorry.kernels import kernel_status

pytestmark = pytest.mark.skipif(
    not kernel_status().active, reason=f"no kernels here: {kernel_status().line()}"
)


class Way(NamedTuple):
    """A kernel, the numbers it is given, and how far from float64 it may be: relative, of an output
    whose truth is about 0 relative to ``floor``."""

    products: bool
    dtype: torch.dtype
    bound: float
    floor: float


PRODUCTS = Way(True, torch.bfloat16, 6e-3, 1e-2)
WAYS = [
    Way(False, torch.float32, 5e-6, 10.0),
    Way(False, torch.bfloat16, 6e-3, 1e-2),
    pytest.param(
        PRODUCTS,
        marks=pytest.mark.skipif(
            kernel_status().attention not in ("tiles", "dots"),
            reason="no matrix tiles or fast dot products",
        ),
    ),
]


@pytest.fixture(params=WAYS, ids=["vectors-float32", "vectors-bfloat16", "products-bfloat16"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    chosen: Way = request.param
    if not chosen.products:
        monkeypatch.setattr(kernel, "attends_in_bfloat16", lambda q: False)
    return chosen


def inputs(
    total: int, heads: int, groups: int, width: int, dtype: torch.dtype, spread: float = 1.0
) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    torch.manual_seed(total * heads + width)
    return [
        (torch.randn(total, h, width) * spread).to(dtype) for h in (heads, groups, groups, heads)
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


def worst(given_: list[Tensor], starts: list[int], floor: float) -> float:
    """The largest relative error of output and gradients, in the Frobenius norm."""
    pairs = zip(run(*given_, starts), truth(*given_, starts), strict=True)
    return max(
        float((mine.double() - true).norm() / max(float(true.norm()), floor))
        for mine, true in pairs
    )


ODD_WIDTHS = [(5, 5, 33), (3, 1, 7), (8, 2, 80), (9, 1, 48), (2, 2, 200), (1, 1, 1)]


@pytest.mark.parametrize(
    ("heads", "groups", "width"),
    [(9, 3, 64), (4, 4, 32), (2, 1, 96), (4, 2, 128), (7, 1, 64), *ODD_WIDTHS],
)
@pytest.mark.parametrize("starts", [[0, 64], [0, 1], [0, 63, 128, 193], [0, 5, 70, 71, 200, 333]])
def test_output_and_gradients(
    way: Way, heads: int, groups: int, width: int, starts: list[int]
) -> None:
    if way.products and (heads, groups, width) in ODD_WIDTHS:
        pytest.skip("compiled for other widths")
    given_ = inputs(starts[-1], heads, groups, width, way.dtype)
    assert worst(given_, starts, way.floor) < way.bound


def test_large_scores(way: Way) -> None:
    """Trained attention is peaked: scores of a standard deviation of 16."""
    given_ = inputs(300, 9, 3, 64, way.dtype, spread=4.0)
    assert worst(given_, [0, 300], way.floor) < (1e-5 if way.dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 150), min_size=1, max_size=6), st.sampled_from([(3, 1), (2, 2), (4, 2)])
)
def test_any_lengths(dtype: torch.dtype, lengths: list[int], heads: tuple[int, int]) -> None:
    """By whichever kernel this machine takes."""
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    given_ = inputs(starts[-1], *heads, 32, dtype)
    floor, bound = (10.0, 1e-5) if dtype == torch.float32 else (1e-2, 1e-2)
    assert worst(given_, starts, floor) < bound


@pytest.mark.parametrize("threads", [1, 2])
def test_a_segment_does_not_see_its_neighbours(way: Way, threads: int) -> None:
    starts = [0, 40, 170, 200]
    one, other = inputs(200, 4, 2, 64, way.dtype), inputs(200, 4, 2, 64, way.dtype)
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


def test_threads_split_a_lone_segment(way: Way) -> None:
    """On vectors alike to the bit; in bfloat16 products sums over rows may differ."""
    given_ = inputs(200, 9, 3, 64, way.dtype)
    torch.set_num_threads(2)
    try:
        assert worst(given_, [0, 200], way.floor) < way.bound
        shared = run(*given_, [0, 200])
    finally:
        torch.set_num_threads(1)
    alone = run(*given_, [0, 200])
    count = 2 if way.products else 4
    assert all(torch.equal(a, b) for a, b in zip(shared[:count], alone[:count], strict=True))


def test_no_number_comes_out_of_nan(way: Way) -> None:
    q, k, v, grad = inputs(100, 2, 1, 64, way.dtype)
    k[30] = torch.nan
    out, dq, _, _ = run(q, k, v, grad, [0, 100])
    assert torch.isfinite(out[:30]).all()
    assert torch.isnan(out[30:].float()).any(-1).all()
    assert torch.isnan(dq[30:].float()).any(-1).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "grad"])
def test_what_is_no_number_stays_in_its_segment(way: Way, which: int, bad: float) -> None:
    """And spoils in it what depends on it: what a token says, all that see it."""
    given_, starts = inputs(170, 4, 2, 64, way.dtype), [0, 30, 110, 170]
    clean = run(*given_, starts)
    given_[which][40] = bad
    spoiled = run(*given_, starts)
    for a, b in zip(spoiled, clean, strict=True):
        assert torch.equal(a[:30], b[:30])
        assert torch.equal(a[110:], b[110:])
    out, dq, dk, dv = ((~x.isfinite()).any(-1).any(-1) for x in spoiled)
    if which in (0, 3):
        assert dq[40]
        assert dk[30:41].all()
        assert dv[30:41].all()
    if which == 0:
        assert out[40]
    elif which == 3:
        assert not out.any()
    else:
        assert out[40:110].all()
        assert dq[40:110].all()


def test_far_scores_are_nothing(way: Way) -> None:
    """Beside a score that is 2000 higher the others have no share, and nothing overflows."""
    q, k, v, grad = inputs(40, 2, 1, 32, way.dtype)
    q[:] = 40.0
    k[:] = -10.0
    k[0] = 10.0
    out, dq, dk, dv = run(q, k, v, grad, [0, 40])
    assert torch.equal(out, v[:1].expand_as(out))
    assert all(torch.isfinite(x).all() for x in (dq, dk, dv))
    assert float(dv[1:].abs().max()) == 0.0


def test_what_it_does_not_take() -> None:
    q, k, _, _ = inputs(4, 4, 2, 64, torch.bfloat16)
    assert kernel.supports_attention(q, k)
    assert kernel.supports_attention(q.float(), k.float())
    assert kernel.supports_attention(q[..., :48], k[..., :48])
    assert not kernel.supports_attention(q.double(), k.double())
    assert not kernel.supports_attention(q.half(), k.half())
    assert not kernel.supports_attention(q.float(), k)
    assert not kernel.supports_attention(q[:, :3], k)
    assert not kernel.supports_attention(q.repeat(1, 1, 5), k.repeat(1, 1, 5))
    with pytest.raises(ValueError, match="contiguous"):
        kernel.run_attention(q.transpose(0, 1), k, k, torch.tensor([0, 4]), 1.0)
