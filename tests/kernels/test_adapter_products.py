"""The products of an adapter in one call for linears that read the same input, against the same in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorry.kernels import adapter_products, kernel_status
from lorry.kernels.adapter_products import AdapterPart

pytestmark = pytest.mark.skipif(
    not kernel_status().dots, reason="no fast dot products of bfloat16 on this processor"
)
HALF = torch.finfo(torch.bfloat16).eps / 2
UNIT = torch.finfo(torch.float32).eps


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def near(got: Tensor, truth: Tensor, size: Tensor, depth: int) -> None:
    """Within summing ``depth`` products in float32 and, of bfloat16, one rounding; ``size``: the sum of
    absolute values."""
    rounding = HALF * truth.abs() if got.dtype == torch.bfloat16 else 0
    assert ((got.double() - truth).abs() <= rounding + (depth + 3) * UNIT * size + 1e-37).all()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, 7, 8, 65, 300]),
    st.sampled_from([1, 31, 96, 577]),
    st.lists(
        st.tuples(st.sampled_from([1, 48, 101]), st.sampled_from([1, 3, 16])),
        min_size=1,
        max_size=3,
    ),
    st.floats(-3, 3, width=32),
    st.booleans(),
)
def test_forward_and_backward_are_the_products(
    tokens: int, width: int, linears: list[tuple[int, int]], scale: float, needs_dx: bool
) -> None:
    ranks = sum(rank for _, rank in linears)
    x, lora_A = random(tokens, width, seed=0), random(ranks, width, seed=1)
    parts, at = list[AdapterPart](), 0
    for k, (outputs, rank) in enumerate(linears):
        parts.append(AdapterPart(random(outputs, rank, seed=10 + k), at, scale * (k + 1)))
        at += rank
    ys = [random(tokens, outputs, seed=20 + k) for k, (outputs, _) in enumerate(linears)]
    before = [y.double() for y in ys]
    exact = [part.lora_B.double() for part in parts]

    low = adapter_products.add_adapter_terms(x, lora_A, parts, ys)
    near(low, x.double() @ lora_A.double().t(), x.double().abs() @ lora_A.double().abs().t(), width)
    rows = [slice(part.first, part.first + part.lora_B.shape[1]) for part in parts]
    for part, own, y, start, b in zip(parts, rows, ys, before, exact, strict=True):
        # of low as it was rounded
        added, size = (low[:, own].double() @ b.t(), low[:, own].double().abs() @ b.abs().t())
        near(y, start + part.scale * added, start.abs() + abs(part.scale) * size, ranks)

    grads = [random(tokens, outputs, seed=30 + k) for k, (outputs, _) in enumerate(linears)]
    dx = random(tokens, width, seed=3) if needs_dx else None
    start = None if dx is None else dx.double()
    up = adapter_products.input_gradient(lora_A, parts, grads, dx)
    for part, own, g, b in zip(parts, rows, grads, exact, strict=True):
        size = abs(part.scale) * (g.double().abs() @ b.abs())
        near(up[:, own], part.scale * (g.double() @ b), size, len(b))
    if dx is not None:
        assert start is not None
        size = start.abs() + up.double().abs() @ lora_A.double().abs()
        near(dx, start + up.double() @ lora_A.double(), size, ranks)

    wanted = [k % 2 == 0 for k in range(len(parts))]
    da, dbs = adapter_products.master_gradients(x, low, up, parts, grads, (True, wanted))
    assert da is not None
    assert da.dtype == torch.float32
    near(da, up.double().t() @ x.double(), up.double().abs().t() @ x.double().abs(), tokens)
    for part, own, g, db, one in zip(parts, rows, grads, dbs, wanted, strict=True):
        assert (db is not None) == one
        if db is not None:
            assert db.dtype == torch.float32
            size = abs(part.scale) * (g.double().abs().t() @ low[:, own].double().abs())
            near(db, part.scale * (g.double().t() @ low[:, own].double()), size, tokens)
    assert adapter_products.master_gradients(x, low, up, parts, grads, (False, wanted))[0] is None


def test_gradients_lie_where_the_factors_do() -> None:
    """Whatever device is torch's default: the kernel writes into them."""
    x, low, g, b = (random(*shape, seed=0) for shape in ((4, 6), (4, 2), (4, 3), (3, 2)))
    with torch.device("meta"):
        da, (db,) = adapter_products.master_gradients(
            x, low, low, [AdapterPart(b, 0, 1.0)], [g], (True, [True])
        )
    assert da is not None
    assert db is not None
    near(da, low.double().t() @ x.double(), low.double().abs().t() @ x.double().abs(), 4)
    near(db, g.double().t() @ low.double(), g.double().abs().t() @ low.double().abs(), 4)


def test_what_the_kernel_takes() -> None:
    x, other = random(4, 6, seed=0), random(3, 6, seed=1)
    assert adapter_products.supports_adapter(x, other)
    assert not adapter_products.supports_adapter(x.float(), other.float())
    assert not adapter_products.supports_adapter(x, other.float())
    assert not adapter_products.supports_adapter(x, random(6, 3, seed=1).t())
    assert not adapter_products.supports_adapter(x, other[:0])
    recorded = other.clone().requires_grad_()
    assert not adapter_products.supports_adapter(x, recorded)
    with torch.no_grad():
        assert adapter_products.supports_adapter(x, recorded)
