"""Products of float32 matrices by the kernel, against the same in float64, whatever the processor, and of
bfloat16 where dot products are fast; and where torch's own are taken instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from lorry.adapters.layers.frozen_linear import DenseLinear
from lorry.kernels import kernel_status, load_library, matmul

has_kernels = pytest.mark.skipif(
    load_library() is None, reason=f"kernels: {kernel_status().reason}"
)
has_dots = pytest.mark.skipif(
    not kernel_status().dots, reason="no fast dot products of bfloat16 on this processor"
)
# of edges: a vector, a tile, a panel and a block, one more and one less
LENGTHS = [1, 2, 3, 7, 15, 16, 17, 31, 33, 47, 48, 49, 96, 100, 255, 257]
DEPTHS = [1, 2, 15, 16, 17, 64, 193, 255, 256, 257, 576]


@pytest.fixture(autouse=True)
def with_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where the kernel multiplies."""
    monkeypatch.setattr(matmul, "multiplies_float32", lambda: load_library() is not None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each product of the kernel."""
    made, kernel = list[int](), matmul._kernel

    def counted(dtype: torch.dtype) -> Callable[..., None]:
        made.append(1)
        return kernel(dtype)

    monkeypatch.setattr(matmul, "_kernel", counted)
    return made


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def laid(rows: int, columns: int, layout: str, seed: int) -> Tensor:
    """[rows, columns] of random numbers that lie as ``layout`` says."""
    match layout:
        case "rows":
            return random(rows, columns, seed=seed)
        case "columns":
            return random(columns, rows, seed=seed).t()
        case "part":
            return random(rows + 2, columns + 9, seed=seed)[1:-1, 5:-4]
        case _:
            return random(rows, 2 * columns, seed=seed)[:, ::2]


def near(got: Tensor, truth: Tensor, size: Tensor, depth: int) -> None:
    """Within what summing ``depth`` products in float32, one after the other, may be off; ``size``: the sum
    of absolute values."""
    unit = torch.finfo(torch.float32).eps / 2
    assert got.dtype == torch.float32
    assert ((got.double() - truth).abs() <= (depth + 3) * unit * size).all()


@has_kernels
@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(LENGTHS),
    st.sampled_from(LENGTHS),
    st.sampled_from(DEPTHS),
    st.sampled_from(["rows", "columns", "part", "strided"]),
    st.sampled_from(["rows", "columns", "part", "strided"]),
    st.floats(-3, 3, width=32),
)
def test_each_form_is_the_product(
    rows: int, columns: int, depth: int, left: str, right: str, alpha: float
) -> None:
    a, b = laid(rows, depth, left, 0), laid(depth, columns, right, 1)
    bias, base = random(columns, seed=2), random(rows + 2, columns + 5, seed=3)
    product, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    near(matmul.mm(a, b), product, size, depth)
    near(matmul.addmm(bias, a, b), product + bias, size + bias.abs(), depth)
    for into, out in ((base.clone(), None), (base.clone(), base.clone())):
        here = into[1:-1, 2:-3]
        expected = base.double().clone()
        if out is None:
            got = matmul.addmm_(here, a, b, alpha=alpha)
            expected[1:-1, 2:-3] += alpha * product
            bound = here.abs() + base[1:-1, 2:-3].abs() + abs(alpha) * size
        else:
            got = matmul.mm(a, b, out=here)
            expected[1:-1, 2:-3], bound = product, size
        assert got.data_ptr() == here.data_ptr()
        near(here, expected[1:-1, 2:-3], bound, depth)
        # nothing beside it
        into[1:-1, 2:-3] = expected[1:-1, 2:-3] = 0
        assert torch.equal(into.double(), expected)


def same_whatever_surrounds(
    x: Tensor, w: Tensor, rows: Sequence[slice], columns: Sequence[slice]
) -> None:
    """x @ w bit for bit, of one to three threads, of some rows or columns alone, and laid otherwise."""
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(matmul.mm(x, w))
    finally:
        torch.set_num_threads(before)
    together = found[0]
    assert all(torch.equal(other, together) for other in found)
    assert all(torch.equal(together[some], matmul.mm(x[some], w)) for some in rows)
    assert all(torch.equal(together[:, some], matmul.mm(x, w[:, some])) for some in columns)
    assert torch.equal(together, matmul.mm(x.t().contiguous().t(), w.t().contiguous().t()))


@has_kernels
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_row_is_the_same_bit_for_bit_whatever_surrounds_it(layout: str) -> None:
    """Rows beside it, threads, where it lies, and how either operand is laid."""
    same_whatever_surrounds(
        random(777, 576),
        laid(576, 1300, layout, 1),
        rows=(slice(0, 1), slice(15, 17), slice(300, 557), slice(776, 777)),
        columns=(slice(0, 1), slice(47, 50), slice(640, 1299)),
    )


@has_kernels
def test_what_is_no_number_spoils_its_row_and_column_alone() -> None:
    a, b = random(37, 300), random(300, 101, seed=1)
    a[2, 299], a[36, 0], b[3, 100] = math.nan, math.inf, -math.inf
    expected = torch.zeros(37, 101, dtype=torch.bool)
    expected[[2, 36]], expected[:, 100] = True, True
    assert torch.equal(~matmul.mm(a, b).isfinite(), expected)
    # 0 * inf is NaN, as IEEE has it
    a[:], b[3] = 0, 1
    b[7, 50] = math.inf
    got = matmul.mm(a, b)
    assert got[:, 50].isnan().all()
    got[:, 50] = 0
    assert not got.any()


@has_kernels
def test_nothing_of_a_product_is_nothing(calls: list[int]) -> None:
    """With an alpha of 0 torch reads neither matrix: not even NaN makes a difference."""
    a, b, into = random(5, 6), random(6, 7, seed=1), random(5, 7, seed=2)
    into[3, 3] = math.inf
    for left, right in ((a, b), (a.where(a > 0, math.inf), b), (a, b.where(b > 0, math.nan))):
        got = matmul.addmm_(into.clone(), left, right, alpha=0.0)
        assert torch.equal(got, into)
        assert torch.equal(got, into.clone().addmm_(left, right, alpha=0.0))
    assert torch.equal(matmul.addmm_(into.clone(), a, b, alpha=2.0)[3, 3], into[3, 3])
    assert calls == [1]


@has_kernels
def test_under_autocast_torch_multiplies(calls: list[int]) -> None:
    """In the dtype that it casts to; what is written in its place stays float32, as torch has it."""
    a, b, bias, into = random(5, 6), random(6, 7, seed=1), random(7, seed=2), random(5, 7, seed=3)
    truth = a.bfloat16().double() @ b.bfloat16().double()
    with torch.autocast("cpu", torch.bfloat16):
        product, shifted = matmul.mm(a, b), matmul.addmm(bias, a, b)
        written = matmul.addmm_(into.clone(), a, b)
    for got, exact in ((product, truth), (shifted, truth + bias)):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), exact, rtol=2.0**-8, atol=2.0**-8)
    near(written, into + a.double() @ b.double(), into.abs() + a.abs() @ b.abs(), 6)
    assert not calls
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert matmul.mm(a, b).dtype == torch.float32
    assert calls


@has_kernels
def test_a_linear_forward_and_backward(calls: list[int]) -> None:
    x, g, into = random(70, 50), random(70, 33, seed=1), random(70, 50, seed=2)
    weight, bias = random(33, 50, seed=3), random(33, seed=4)
    for transposed in (False, True):
        stored = nn.Parameter(weight.t().contiguous() if transposed else weight)
        linear = DenseLinear(stored, nn.Parameter(bias), transposed)
        with torch.no_grad():
            y, dx = linear.forward(x), linear.backward(g, into.clone())
            dw, db = linear.parameter_gradients(x, g)
        exact = weight.double()
        near(y, x.double() @ exact.t() + bias, x.abs() @ weight.abs().t() + bias.abs(), 50)
        near(dx, into + g.double() @ exact, into.abs() + g.abs() @ weight.abs(), 33)
        near(dw.t() if transposed else dw, g.double().t() @ x.double(), g.abs().t() @ x.abs(), 70)
        near(db, g.double().sum(0), g.abs().sum(0), 70)
    assert len(calls) == 6


@has_kernels
@pytest.mark.parametrize(
    "shapes", [((0, 5), (5, 3)), ((4, 0), (0, 3)), ((4, 5), (5, 0)), ((0, 0), (0, 0))]
)
def test_nothing_to_multiply(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    a, b = (random(*shape) for shape in shapes)
    zeros = torch.zeros(a.shape[0], b.shape[1])
    assert torch.equal(matmul.mm(a, b), zeros)
    assert torch.equal(matmul.addmm(zeros.new_ones(b.shape[1]), a, b), zeros + 1)
    assert torch.equal(matmul.addmm_(zeros + 2, a, b), zeros + 2)


@has_kernels
def test_what_autograd_records_is_torchs(calls: list[int]) -> None:
    a, b = random(5, 6).requires_grad_(), random(6, 7, seed=1)
    for product in (
        matmul.mm(a, b),
        matmul.addmm(random(7), a, b),
        matmul.addmm_(random(5, 7), a, b),
    ):
        (grad,) = torch.autograd.grad(product.sum(), a)
        torch.testing.assert_close(grad, b.sum(1).expand(5, 6))
    assert not calls
    with torch.no_grad():
        assert not matmul.mm(a, b).requires_grad
    assert calls


class Named(Tensor):
    """A subclass."""


@has_kernels
def test_what_the_kernel_does_not_take_is_torchs(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "multiplies_bfloat16", lambda: False)
    a, b = random(5, 6), random(6, 7, seed=1)
    truth = a.double() @ b.double()
    for dtype in (torch.float64, torch.bfloat16):
        torch.testing.assert_close(matmul.mm(a.to(dtype), b.to(dtype)), (a.to(dtype) @ b.to(dtype)))
    with pytest.raises(RuntimeError, match="dtype"):
        matmul.mm(a, b.bfloat16())
    assert matmul.mm(a.to("meta"), b.to("meta")).shape == (5, 7)
    assert type(matmul.mm(a.as_subclass(Named), b)) is Named
    with FakeTensorMode() as mode:
        assert matmul.mm(mode.from_tensor(a), mode.from_tensor(b)).shape == (5, 7)
    with FlopCounterMode(display=False) as counter:
        matmul.mm(a, b)
    assert counter.get_total_flops() == 2 * 5 * 6 * 7
    # torch's own broadcasts, and writes what has no rows
    torch.testing.assert_close(matmul.addmm(random(1), a, b), (truth + random(1)).float())
    torch.testing.assert_close(matmul.mm(a, b, out=torch.empty(7, 5).t()), truth.float())
    for wrong in (random(7, 6), random(6), random(2, 6, 7)):
        with pytest.raises(RuntimeError):
            matmul.mm(a, wrong)
    assert not calls


@has_kernels
def test_memory_that_does_not_say_the_numbers_is_torchs(calls: list[int]) -> None:
    """Of views with the other sign, of zeros that have none, and of sparse matrices; and rows that share it,
    which torch refuses to write."""
    a, b = random(5, 6), random(6, 7, seed=1)
    truth, bias = a.double() @ b.double(), random(7, seed=2)
    for got, exact in (
        (matmul.mm(torch._neg_view(a), b), -truth),
        (matmul.mm(a, torch._neg_view(b)), -truth),
        (matmul.addmm(torch._neg_view(bias), a, b), truth - bias),
        (matmul.mm(a, b, out=torch._neg_view(random(5, 7))), truth),
        (matmul.addmm_(torch._neg_view(bias.expand(5, 7).clone()), a, b), truth - bias),
        (matmul.mm(torch._efficientzerotensor(5, 6), b), 0 * truth),
        (matmul.mm(a.to_sparse(), b), truth),
    ):
        torch.testing.assert_close(got, exact.float())
    for write in (
        lambda: matmul.mm(a, b, out=torch.zeros(1, 7).expand(5, 7)),
        lambda: matmul.addmm_(torch.zeros(1, 7).expand(5, 7), a, b),
    ):
        with pytest.raises(RuntimeError, match="single memory location"):
            write()
    assert not calls


@has_kernels
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_is_transformed_is_torchs(calls: list[int]) -> None:
    """Forward-mode derivatives, several products as one, and a trace, which would hold what the memory said
    when it was made."""
    a, b, change = random(5, 6), random(6, 7, seed=1), random(5, 6, seed=2)
    slope = (change.double() @ b.double()).float()
    with forward_ad.dual_level(), torch.no_grad():
        product = matmul.mm(forward_ad.make_dual(a, change), b)
        torch.testing.assert_close(forward_ad.unpack_dual(product).tangent, slope)
    torch.testing.assert_close(torch.func.jvp(lambda x: matmul.mm(x, b), (a,), (change,))[1], slope)
    several = torch.func.vmap(lambda x: matmul.mm(x, b))(torch.stack([a, change]))
    torch.testing.assert_close(several[1], slope)
    torch.testing.assert_close(torch.func.functionalize(lambda x: matmul.mm(x, b))(change), slope)
    traced = torch.jit.trace(lambda x: matmul.mm(x, b), (a,), check_trace=False)
    torch.testing.assert_close(traced(change), slope)
    assert not calls


@has_kernels
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiler_sees_torchs(calls: list[int]) -> None:
    a, b = random(5, 6), random(6, 7, seed=1)
    compiled = torch.compile(matmul.mm, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(a, b), (a.double() @ b.double()).float())
    assert not calls


# --- bfloat16


def near_bfloat16(got: Tensor, truth: Tensor, size: Tensor, depth: int) -> None:
    """Within one rounding to bfloat16 of what `near` allows; what is next to nothing may be nothing, as
    the processor's dot products have it."""
    unit, sums = torch.finfo(torch.bfloat16).eps / 2, (depth + 3) * torch.finfo(torch.float32).eps
    assert got.dtype == torch.bfloat16
    tiny = torch.finfo(torch.float32).tiny
    assert ((got.double() - truth).abs() <= unit * truth.abs() + sums * size + tiny).all()


# beside those above: more than a block of the depth holds, and than one of the rows
DEEP = [*DEPTHS, 2047, 2048, 2050, 4099]


@has_dots
@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([*LENGTHS, 1023, 1025]),
    st.sampled_from(LENGTHS),
    st.sampled_from(DEEP),
    st.sampled_from(["rows", "columns", "part", "strided"]),
    st.sampled_from(["rows", "columns", "part", "strided"]),
    st.floats(-3, 3, width=32),
)
def test_each_form_is_the_product_in_bfloat16(
    rows: int, columns: int, depth: int, left: str, right: str, alpha: float
) -> None:
    a, b = laid(rows, depth, left, 0).bfloat16(), laid(depth, columns, right, 1).bfloat16()
    bias, base = (
        random(columns, seed=2).bfloat16(),
        random(rows + 2, columns + 5, seed=3).bfloat16(),
    )
    product, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    near_bfloat16(matmul.mm(a, b), product, size, depth)
    near_bfloat16(matmul.addmm(bias, a, b), product + bias, size + bias.abs(), depth)
    for into, out in ((base.clone(), None), (base.clone(), base.clone())):
        here = into[1:-1, 2:-3]
        expected, before = base.double(), base[1:-1, 2:-3].double()
        if out is None:
            got = matmul.addmm_(here, a, b, alpha=alpha)
            truth, bound = before + alpha * product, before.abs() + abs(alpha) * size
        else:
            got = matmul.mm(a, b, out=here)
            truth, bound = product, size
        assert got.data_ptr() == here.data_ptr()
        near_bfloat16(here, truth, bound, depth)
        # nothing beside it
        into[1:-1, 2:-3] = expected[1:-1, 2:-3] = 0
        assert torch.equal(into.double(), expected)


@has_dots
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_row_is_the_same_bit_for_bit_in_bfloat16(layout: str) -> None:
    """As in float32; of a depth of several blocks."""
    same_whatever_surrounds(
        random(1100, 2100).bfloat16(),
        laid(2100, 300, layout, 1).bfloat16(),
        rows=(slice(0, 1), slice(7, 17), slice(1000, 1057), slice(1099, 1100)),
        columns=(slice(0, 1), slice(47, 50), slice(100, 299)),
    )


@has_dots
@pytest.mark.parametrize("depth", [300, 301])
def test_what_is_no_number_in_bfloat16_spoils_its_row_and_column_alone(depth: int) -> None:
    a, b = random(37, depth).bfloat16(), random(depth, 101, seed=1).bfloat16()
    a[2, depth - 1], a[36, 0], b[3, 100] = math.nan, math.inf, -math.inf
    expected = torch.zeros(37, 101, dtype=torch.bool)
    expected[[2, 36]], expected[:, 100] = True, True
    assert torch.equal(~matmul.mm(a, b).isfinite(), expected)


@has_dots
def test_bfloat16_goes_to_the_kernel_where_nothing_records_it(calls: list[int]) -> None:
    a, b = random(5, 6).bfloat16(), random(6, 7, seed=1).bfloat16()
    recorded = a.clone().requires_grad_()
    assert matmul.mm(recorded, b).requires_grad
    with pytest.raises(RuntimeError, match="dtype"):
        matmul.mm(a, b.float())
    torch.testing.assert_close(matmul.mm(a, b, out=torch.empty(7, 5, dtype=a.dtype).t()), a @ b)
    assert not calls
    matmul.mm(a, b)
    assert len(calls) == 1
