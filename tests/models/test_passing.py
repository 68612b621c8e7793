"""Tensors that pass between lasting ones: same bits, and a block behind them that a lasting one
fits into.
"""

from __future__ import annotations

import pytest
import torch

from lorry.models.decoder.pointwise import DecoderNorm, empty_scratch_like

# bytes that glibc wants beyond an aligned request: the alignment and its smallest block
ALIGNED = 64 + 32
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def rms(dtype: torch.dtype) -> DecoderNorm:
    norm = DecoderNorm("rms", 48, 1e-5).requires_grad_(False)
    norm.weight.data = torch.randn(48, generator=torch.Generator().manual_seed(1)).to(dtype)
    return norm


def spare(x: torch.Tensor) -> int:
    """Bytes of the storage behind the tensor's own."""
    return x.untyped_storage().nbytes() - x.numel() * x.element_size()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_passing_tensor_leaves_room_for_a_lasting_one(dtype: torch.dtype) -> None:
    x = torch.randn(7, 3, 5).to(dtype)
    made = empty_scratch_like(x)
    assert (made.shape, made.dtype, made.is_contiguous(), made._is_view()) == (
        x.shape,
        dtype,
        True,
        False,
    )
    assert spare(made) >= ALIGNED
    assert empty_scratch_like(x[:0]).shape == (0, 3, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_leave_such_blocks(dtype: torch.dtype) -> None:
    x = torch.randn(9, 48).to(dtype)
    norm = rms(dtype)
    if dtype == torch.float32:
        assert spare(norm.compute(x)) >= ALIGNED
        assert spare(norm.add_and_normalise(x.clone(), x)[1]) >= ALIGNED
    assert torch.equal(norm.add_and_normalise(x.clone(), x)[1], norm.compute(x + x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [torch.float32, None])
def test_the_rms_norm_is_that_of_the_formula(
    dtype: torch.dtype, weight: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what separate operations give; x, weight and the format of the result are left
    alone.
    """
    monkeypatch.setattr(
        "lorry.models.decoder.pointwise.supports_pointwise_kernels", lambda *tensors: False
    )
    norm, x = (
        rms(weight or dtype),
        torch.randn(33, 48, generator=torch.Generator().manual_seed(2)).to(dtype),
    )
    before, wide = (x.clone(), norm.weight.clone()), x if dtype == torch.float64 else x.float()
    want = norm.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
    got = norm.compute(x)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
    assert torch.equal(x, before[0])
    assert torch.equal(norm.weight, before[1])
    exact = norm.weight.double() * (
        x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    )
    assert torch.allclose(
        got.double(),
        exact,
        rtol=2 * torch.finfo(dtype).eps,
        atol=1e-6 if dtype != torch.float64 else 1e-12,
    )
