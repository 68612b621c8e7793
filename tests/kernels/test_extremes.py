"""The kernels in bfloat16 on numbers that few tests draw, against float64 of the formulas: very large and very small ones,
sums that cancel, zeros of both signs, and a row that is no number, which spoils no other.

The same bounds hold whatever the kernels are built for: LORRY_ISA=portable, avx2, avx512, avx512_bf16, and matrix tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lorry.kernels import decode, load_library, softmax
from lorry.models.decoder import pointwise
from lorry.models.decoder.pointwise import SILU, DecoderNorm

pytestmark = pytest.mark.skipif(load_library() is None, reason="no kernels here")

# what float32 keeps, and the smallest number that it keeps so much of
EPSILON, NORMAL = 2.0**-24, 2.0**-126
# half of a step of bfloat16: of its number, and of those below NORMAL
ROUNDING, FLOOR = 2.0**-8, 2.0**-134


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spoiled(x: Tensor, value: float) -> Tensor:
    x[2, 3] = value
    return x


def cancelling(x: Tensor) -> Tensor:
    x[:, 1::2] = -x[:, ::2]
    return x


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "middling": lambda x: x,
    "large": lambda x: x * 1e18,
    "small": lambda x: x * 1e-30,
    "denormal": lambda x: x * 1e-39,
    "cancelling": cancelling,
    "minus zero": lambda x: torch.full_like(x, -0.0),
    "nan": lambda x: spoiled(x, math.nan),
    "infinity": lambda x: spoiled(x, math.inf),
    "minus infinity": lambda x: spoiled(x, -math.inf),
}


@pytest.fixture(params=list(NUMBERS))
def x(request: pytest.FixtureRequest) -> Tensor:
    """[5, 70] of each kind."""
    return NUMBERS[request.param](random(5, 70)).bfloat16()


def near(got: Tensor, truth: Tensor, size: Tensor | float = 0.0, floor: float = FLOOR) -> None:
    """Within a rounding of the truth, and what sums of terms of ``size`` in all may be off in float32; what is no
    number is the same."""
    assert got.dtype == torch.bfloat16
    got = got.double()
    assert torch.equal(got.isnan(), truth.isnan())
    assert torch.equal(got.isinf(), truth.isinf())
    here = truth.isfinite()
    assert torch.equal(got[~here & ~got.isnan()], truth[~here & ~truth.isnan()])
    allowed = ROUNDING * truth.abs() + EPSILON * torch.as_tensor(size) + floor
    assert ((got - truth).abs() <= allowed)[here].all()


def test_norms(x: Tensor) -> None:
    norm = DecoderNorm("rms", 70, 1e-5).requires_grad_(False)
    norm.weight.data = random(70, seed=1).bfloat16()
    weight, grad = norm.weight.double(), random(5, 70, seed=2).bfloat16()
    rstd = (x.double().square().mean(1, keepdim=True) + 1e-5).rsqrt()
    # rounded before the weight, as the published norm is
    near(norm.compute(x), (x.double() * rstd).bfloat16().double() * weight)
    wide = x.double().requires_grad_()
    (dx,) = torch.autograd.grad(F.rms_norm(wide, (70,), weight, 1e-5), wide, grad.double())
    near(
        norm.backward(grad, x), dx, 70 * (grad.double() * weight).abs().sum(1, keepdim=True) * rstd
    )


def test_gates(x: Tensor) -> None:
    up, grad = (random(5, 70, seed=s).bfloat16() for s in (1, 2))
    wide = [t.double().requires_grad_() for t in (x, up)]
    out = F.silu(wide[0]) * wide[1]
    near(pointwise.gated_activation(SILU, x, up), out.detach())
    slopes = torch.autograd.grad(out, wide, grad.double())
    mine, again = pointwise.gated_activation_backward(SILU, grad.clone(), x, up)
    near(again, out.detach())
    # the slope's two halves are of size 1 and cancel near its zeros
    near(mine[0], slopes[0], 8 * (grad.double() * up.double()).abs())
    near(mine[1], slopes[1])


@pytest.mark.parametrize("value", [-90.0, -1e3, -1e18, -3e38])
def test_a_shut_gate_lets_nothing_through(value: float) -> None:
    """However far it is shut: x / (1 + e^-x) is next to nothing, though x alone is large."""
    x, one = torch.full((2, 70), value).bfloat16(), torch.ones(2, 70).bfloat16()
    assert float(pointwise.gated_activation(SILU, x, one).abs().max()) <= 100 * math.exp(-87)
    slopes, _ = pointwise.gated_activation_backward(SILU, one.clone(), x, one)
    assert max(float(slope.abs().max()) for slope in slopes) <= 100 * math.exp(-87)


def test_rotary(x: Tensor) -> None:
    angles = random(5, 35, seed=1) * 3
    cos, sin = angles.cos().double()[:, None], angles.sin().double()[:, None]
    a, b = x.double().view(5, 1, 70).split(35, 2)
    got = pointwise.apply_rotary(x.clone().view(5, 1, 70), angles.cos(), angles.sin())
    size = ((a * cos).abs() + (b * sin).abs()).repeat(1, 1, 2)
    near(got, torch.cat([a * cos - b * sin, b * cos + a * sin], -1), 4 * size)


@pytest.mark.parametrize("width", [33, 64, 70])
def test_products(x: Tensor, width: int) -> None:
    """Instructions that multiply pairs of bfloat16 take numbers below 2^-126 for 0, and make 0 of such sums."""
    x, w = x[:, :width].contiguous(), random(40, width, seed=1).bfloat16()
    wide, weights = x.double(), w.double()
    size = wide.abs() @ weights.abs().t()
    nothing = (wide.abs() * (wide.abs() < NORMAL)) @ weights.abs().t()
    lost = (nothing + NORMAL).nan_to_num(0, 0, 0)
    near(decode.linear_product(x, w, None), wide @ weights.t(), width * size + lost / EPSILON)


def test_slopes_of_the_vocabulary(x: Tensor) -> None:
    terms = torch.ones(5, 6)
    terms[:, 0], terms[:, 2] = x.float().logsumexp(1), 0.7
    truth = (x.double() - terms[:, :1].double()).exp() * terms[:, 2:3].double()
    # e^-87 is the least that it makes
    got = softmax.write_slope(x, terms, moments=False, out=torch.empty_like(x))
    near(got, truth, truth.nan_to_num(0, 0, 0) * 70, floor=2 * math.exp(-87))


def test_sums_of_the_vocabulary(x: Tensor) -> None:
    sums = softmax.SoftmaxSums.empty(5, x, moments=False)
    sums.fold(x.clone())
    truth = (x.double() - x.double().amax(1, keepdim=True)).exp().sum(1)
    got = sums.state[:, 1].double()
    assert torch.equal(got.isnan(), truth.isnan())
    here = ~truth.isnan()
    assert ((got - truth).abs() <= 70 * EPSILON * truth)[here].all()
