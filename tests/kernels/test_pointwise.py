"""Norms, rotary positions and gates in bfloat16 and float32 against float64 autograd of the formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lorry.kernels import load_library
from lorry.models.decoder import pointwise
from lorry.models.decoder.pointwise import SILU, DecoderNorm

pytestmark = pytest.mark.skipif(load_library() is None, reason="no kernels here")

# what a result may be off, relative to float64's; a bfloat16 one is rounded once or twice
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 6e-3}
FORMS = pytest.mark.parametrize("dtype", list(BOUNDS))
# 1 row and many, widths that no vector divides
SHAPES = pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (70, 96), (130, 576)])


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, spread: float = 3.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def check(mine: Tensor, true: Tensor) -> None:
    assert mine.dtype in BOUNDS
    assert float((mine.double() - true).norm() / true.norm().clamp(min=1e-3)) < BOUNDS[mine.dtype]


@pytest.fixture(autouse=True)
def _no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested is the kernels, and not the torch beside them."""
    monkeypatch.setattr(pointwise, "promote_to_fp32", lambda x: pytest.fail("torch ran"))


@FORMS
@SHAPES
def test_rms_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    norm = DecoderNorm("rms", width, 1e-5).requires_grad_(False)
    norm.weight.data = draw(width, dtype=dtype, seed=1)
    x, dy, carry = (draw(rows, width, dtype=dtype, seed=s) for s in (2, 3, 4))
    wide = x.double().requires_grad_()
    y = F.rms_norm(wide, (width,), norm.weight.double(), 1e-5)
    (dx,) = torch.autograd.grad(y, wide, dy.double())
    check(norm.compute(x), y.detach())
    if width > 1:  # of one column the gradient is all but 0
        check(norm.backward(dy, x), dx)
    check(norm.backward(dy, x, carry), dx + carry.double())
    total, y_total = norm.add_and_normalise(x.clone(), carry)
    check(total, x.double() + carry.double())
    check(y_total, F.rms_norm(total.double(), (width,), norm.weight.double(), 1e-5))


@FORMS
@pytest.mark.parametrize(("heads", "dim", "half"), [(1, 2, 1), (3, 64, 32), (5, 23, 7)])
def test_rotary(heads: int, dim: int, half: int, dtype: torch.dtype) -> None:
    x = draw(9, heads, dim, dtype=dtype)
    angles = torch.rand(9, half, generator=torch.Generator().manual_seed(1)) * 7
    turned = pointwise.apply_rotary(x.clone(), angles.cos(), angles.sin())
    pairs = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
    true = pairs * torch.polar(torch.ones(9, half).double(), angles.double())[:, None]
    check(turned, torch.cat([true.real, true.imag, x[..., 2 * half :].double()], -1))
    back = pointwise.apply_rotary(turned.clone(), angles.cos(), angles.sin(), inverse=True)
    check(back, x.double())


@FORMS
@SHAPES
def test_silu_gate(rows: int, width: int, dtype: torch.dtype) -> None:
    g, u, dh = (draw(rows, width, dtype=dtype, seed=s, spread=4.0) for s in (1, 2, 3))
    g[0, 0] = -200.0  # e^200 is no float
    wide = [x.double().requires_grad_() for x in (g, u)]
    h = F.silu(wide[0]) * wide[1]
    dg, du = torch.autograd.grad(h, wide, dh.double())
    check(pointwise.gated_activation(SILU, g, u), h.detach())
    (my_dg, my_du), my_h = pointwise.gated_activation_backward(SILU, dh.clone(), g, u)
    for mine, true in ((my_dg, dg), (my_du, du), (my_h, h.detach())):
        check(mine, true)


@FORMS
def test_nan_passes_through(dtype: torch.dtype) -> None:
    x = draw(4, 40, dtype=dtype)
    x[2, 7] = torch.nan
    norm = DecoderNorm("rms", 40, 1e-5).requires_grad_(False)
    norm.weight.data = torch.ones(40, dtype=dtype)
    for y in (norm.compute(x), norm.backward(x, x)):
        assert y[2].isnan().all()
        assert y[[0, 1, 3]].isfinite().all()
    h = pointwise.gated_activation(SILU, x, torch.ones_like(x))
    assert h.isnan().sum() == 1


def test_formats_are_not_mixed() -> None:
    x = draw(2, 8, dtype=torch.float32)
    assert pointwise.supports_pointwise_kernels(x, x)
    assert not pointwise.supports_pointwise_kernels(x, x.bfloat16())
    assert not pointwise.supports_pointwise_kernels(x.double())
    assert not pointwise.supports_pointwise_kernels(x.T)
