"""The softmax by tiles, compiled and in plain torch, against whole rows in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorry.kernels import softmax
from lorry.kernels.softmax import SoftmaxSums, add_scaled, write_slope

FORMS = [
    (torch.bfloat16, True),
    (torch.bfloat16, False),
    (torch.float32, True),
    (torch.float32, False),
    (torch.float64, False),
]


@pytest.fixture(params=FORMS, ids=lambda f: f"{str(f[0])[6:]}-{'compiled' if f[1] else 'torch'}")
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    form, compiled = request.param
    if not compiled:
        monkeypatch.setattr(softmax, "load_library", lambda: None)
    elif softmax.load_library() is None:
        pytest.skip("no compiled kernels here")
    return form


def draw(rows: int, columns: int, seed: int = 0) -> Tensor:
    return (
        torch.randn(
            rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        * 3
    )


def folded(x: Tensor, width: int, *, moments: bool = True) -> SoftmaxSums:
    sums = SoftmaxSums.empty(len(x), x, moments=moments)
    for tile in x.split(width, 1):
        sums.fold(tile.contiguous())
    return sums


def exactness(dtype: torch.dtype) -> dict[str, float]:
    return (
        {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    )


@given(columns=st.integers(1, 300), width=st.integers(1, 120), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize(
    ("form", "compiled"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)]
)
def test_sums_do_not_depend_on_the_tiles(
    columns: int, width: int, seed: int, form: torch.dtype, compiled: bool
) -> None:
    """Logits in tiles of any width against float64 over whole rows."""
    if compiled and softmax.load_library() is None:
        pytest.skip("no compiled kernels here")
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(softmax, "load_library", lambda: None)
        x = draw(3, columns, seed).to(form)
        sums = folded(x, width)
    wide = x.double()
    z = wide - wide.amax(1, keepdim=True)
    expected = torch.stack(
        [wide.amax(1), z.exp().sum(1), (z.exp() * z).sum(1), (z.exp() * z * z).sum(1), z.sum(1)], 1
    )
    assert torch.allclose(sums.state.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(sums.top, wide.argmax(1))


def test_sums_in_every_precision(dtype: torch.dtype) -> None:
    x = draw(5, 1000).to(dtype)
    wide, sums = x.double(), folded(x, 170)
    z = wide - wide.amax(1, keepdim=True)
    expected = torch.stack(
        [wide.amax(1), z.exp().sum(1), (z.exp() * z).sum(1), (z.exp() * z * z).sum(1), z.sum(1)], 1
    )
    assert torch.allclose(sums.state.double(), expected, **exactness(dtype))
    plain = folded(x, 170, moments=False)
    assert torch.allclose(plain.state[:, :2].double(), expected[:, :2], **exactness(dtype))


def test_written_tiles_and_scales_give_the_weighted_sum(dtype: torch.dtype) -> None:
    """e^(l - peak) tile by tile, partial products rescaled as the peak rises: the softmax's mean of
    any vectors.
    """
    # sorted: every tile raises the peak
    x, vectors = (
        draw(4, 400).sort(1).values.to(dtype),
        draw(400, 8, seed=1).to(dtype),
    )
    sums, total = (
        SoftmaxSums.empty(4, x, moments=False),
        torch.zeros(4, 8, dtype=softmax.accumulator_dtype(x)),
    )
    for tile, part in zip(x.split(90, 1), vectors.split(90), strict=True):
        tile = tile.contiguous()
        scale = sums.fold(tile, write=True)
        add_scaled(total, tile @ part, scale)
    expected = x.double().softmax(1) @ vectors.double()
    bound = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else exactness(dtype)
    assert torch.allclose((total / sums.state[:, 1:2]).double(), expected, **bound)


@pytest.mark.parametrize("moments", [True, False])
def test_slopes(dtype: torch.dtype, moments: bool) -> None:
    x, terms = (
        draw(6, 333).to(dtype),
        draw(6, 6, seed=2).to(softmax.accumulator_dtype(torch.empty(0, dtype=dtype))),
    )
    terms[:, 0] = x.to(terms.dtype).logsumexp(1)
    shift, centre, a, b, c, k = (t[:, None] for t in terms.double().unbind(1))
    wide = x.double()
    y = wide - centre
    expected = (wide - shift).exp() * ((a + b * y + c * y * y) if moments else a) + (
        k if moments else 0
    )
    before = x.clone()
    apart = write_slope(x, terms, moments=moments, out=torch.empty_like(x))
    assert torch.equal(x, before)
    bound = 4e-3 if dtype == torch.bfloat16 else exactness(dtype)["rtol"]
    assert torch.allclose(apart.double(), expected, rtol=bound, atol=bound)
    assert torch.equal(write_slope(x, terms, moments=moments, out=x), apart)


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 31, 40, 98])
def test_what_is_not_finite_stays_so(dtype: torch.dtype, bad: float, column: int) -> None:
    x = draw(3, 99).to(dtype)
    x[1, column] = bad
    clean = folded(draw(3, 99).to(dtype), 40)
    for moments in (True, False):
        sums = folded(x, 40, moments=moments)
        assert sums.state[1, 1].isnan()
        assert torch.equal(sums.state[[0, 2], 1], clean.state[[0, 2], 1])
    terms = torch.ones(3, 6, dtype=sums.state.dtype)
    assert not write_slope(x, terms, moments=True, out=torch.empty_like(x))[1, column].isfinite()


def test_a_nan_of_either_sign_survives_every_lane() -> None:
    """Sign and payload of a NaN, anywhere in a vector of the compiled loop."""
    if softmax.load_library() is None:
        pytest.skip("no compiled kernels here")
    # as int16: quiet, signalling, all ones, and negative ones
    for bits in (
        0x7FC0,
        0x7F81,
        0x7FFF,
        -0x0040,
        -0x0001,
    ):
        for column in range(70):
            x = draw(1, 70).bfloat16()
            x.view(torch.int16)[0, column] = bits
            assert folded(x, 70).state[0, 1].isnan()
            tile = x.clone()
            SoftmaxSums.empty(1, x, moments=False).fold(tile, write=True)
            assert tile[0, column].isnan()


def test_masked_columns_count_for_nothing(dtype: torch.dtype) -> None:
    """-inf is a logit like any other, even where it fills the first tile; a row of nothing else has no softmax."""
    x = draw(3, 100).to(dtype)
    x[0, :50] = -torch.inf
    x[2] = -torch.inf
    sums, alone = folded(x, 25), folded(x[:1, 50:], 25)
    assert torch.allclose(sums.state[0, :4], alone.state[0, :4], rtol=1e-5, atol=1e-6)
    assert sums.top[0] == alone.top[0] + 50
    assert not sums.state[2, 0].isfinite()


def test_rows_do_not_see_each_other(dtype: torch.dtype) -> None:
    x, other = draw(9, 500).to(dtype), draw(9, 500, seed=5).to(dtype)
    other[4] = x[4]
    assert torch.equal(folded(x, 128).state[4], folded(other, 128).state[4])
