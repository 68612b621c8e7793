"""Low-rank terms of many adapters in one call: against the formula in float64, and each row against itself
alone, for any number of threads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorry.adapters.layers.stacks import AdapterShare, ComputeCopies, StackedAdapters
from lorry.kernels import decode, kernel_status, load_library
from lorry.models.decoder.low_rank import TermDescription, supports_term

pytestmark = pytest.mark.skipif(load_library() is None, reason=f"kernels: {kernel_status().reason}")
# half a step of 8 and of 24 bits
EPSILON = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stack_of(
    rows: slice,
    width: int,
    parts: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    seed: int,
    *,
    scaled: bool = False,
    columns: int = 0,
) -> StackedAdapters:
    """A term of these rows; parts: linear, its outputs, rank. ``scaled``: a scale of each rank; ``columns``: of
    gates, 0 for none."""
    ranks, shares = 0, list[AdapterShare]()
    for number, (linear, outputs, rank) in enumerate(parts):
        b = random(outputs, rank, dtype=dtype, seed=100 * seed + number)
        shares.append(AdapterShare(linear, slice(ranks, ranks + rank), b, 0.5 - 0.75 * number))
        ranks += rank
    copies = ComputeCopies(
        random(ranks, width, dtype=dtype, seed=100 * seed + 50) / math.sqrt(width),
        shares,
        columns=torch.arange(ranks) % columns if columns else None,
        rank_scales=random(ranks, dtype=dtype, seed=100 * seed + 51) if scaled else None,
    )
    return StackedAdapters(rows, len(parts), lambda: copies, None, lambda: None)


def added(
    stacks: Sequence[StackedAdapters],
    gates: Sequence[Tensor | None],
    x: Tensor,
    ys: Sequence[Tensor],
) -> list[Tensor]:
    """What the kernel makes of copies of ys."""
    out = [y.clone() for y in ys]
    description = TermDescription.of(stacks, gates, x.dtype)
    decode.add_low_rank_terms(description.words, x, out)
    return out


def check(
    stacks: Sequence[StackedAdapters],
    gates: Sequence[Tensor | None],
    x: Tensor,
    ys: Sequence[Tensor],
    got: Sequence[Tensor],
) -> None:
    """Against the formula in float64, within what its roundings may come to: of fp32 sums, and of what is
    kept between the two matrices and behind every term."""
    wide = [y.double() for y in ys]
    sizes = [y.double().abs() for y in ys]
    steps = [torch.zeros(len(x)) for _ in ys]
    for stack, gate in zip(stacks, gates, strict=True):
        rows = stack.own_tokens
        low, size = (
            f(x[rows].double()) @ f(stack.lora_A.double()).t()
            for f in (torch.Tensor.clone, torch.Tensor.abs)
        )
        if stack.rank_scales is not None:
            low, size = low * stack.rank_scales.double(), size * stack.rank_scales.double().abs()
        if gate is not None:
            assert stack.columns is not None
            by = gate.double()[:, stack.columns]
            low, size = low * by, size * by.abs()
        for part in stack.parts:
            b = part.lora_B.double()
            wide[part.layer][rows] += part.scale * (low[:, part.rows] @ b.t())
            sizes[part.layer][rows] += abs(part.scale) * (size[:, part.rows] @ b.abs().t())
            steps[part.layer][rows] += 1
    for y, truth, size, many, before in zip(got, wide, sizes, steps, ys, strict=True):
        sums = size * (x.shape[1] + 64) * EPSILON[torch.float32]
        # three roundings of what A makes, one of y a term
        allowed = sums + (3 + many.double()[:, None]) * EPSILON[x.dtype] * size
        assert ((y.double() - truth).abs() <= allowed + 1e-30).all()
        # rows of no term are as they were, bit for bit
        assert torch.equal(y[many == 0], before[many == 0])


TERMS = st.lists(
    st.tuples(
        st.integers(0, 11),  # the first row
        st.integers(1, 12),  # rows
        st.lists(
            st.sampled_from([1, 2, 3, 4, 7, 8, 15, 16, 17, 32, 33, 70]), min_size=2, max_size=2
        ),
        st.sampled_from([(0,), (1,), (0, 1)]),  # linears
        st.booleans(),  # scales
        st.sampled_from([0, 0, 1, 3]),  # gates
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(list(EPSILON)),
    TERMS,
    st.sampled_from([1, 2, 15, 16, 33, 96, 130]),
    st.sampled_from([(1, 5), (16, 31), (33, 64), (300, 17)]),
)
def test_terms_are_the_formula(
    dtype: torch.dtype,
    terms: list[tuple[int, int, list[int], tuple[int, ...], bool, int]],
    width: int,
    outputs: tuple[int, int],
) -> None:
    """Terms that share rows, and rows of none; of one linear or of both; ranks and widths of any size."""
    x = random(12, width, dtype=dtype, seed=1)
    ys = [random(12, out, dtype=dtype, seed=2 + i) for i, out in enumerate(outputs)]
    stacks, gates = list[StackedAdapters](), list[Tensor | None]()
    for seed, (first, rows, ranks, linears, scaled, columns) in enumerate(terms):
        here = slice(first, min(first + rows, 12))
        parts = [(i, outputs[i], rank) for i, rank in zip(linears, ranks, strict=False)]
        stacks.append(stack_of(here, width, parts, dtype, seed + 7, scaled=scaled, columns=columns))
        assert supports_term(stacks[-1])
        shape = (here.stop - here.start, columns)
        gates.append(random(*shape, dtype=torch.float32, seed=seed) if columns else None)
    check(stacks, gates, x, ys, added(stacks, gates, x, ys))


def eight_adapters(
    dtype: torch.dtype, width: int = 576, per: int = 3
) -> tuple[list[StackedAdapters], Tensor, list[Tensor]]:
    """Of ``per`` rows each, at two linears; and x and ys of all rows."""
    outputs, rows = (576, 192), 8 * per
    ranks = [16, 8, 5, 64, 16, 1, 40, 16]
    stacks = [
        stack_of(
            slice(i * per, (i + 1) * per), width, [(0, outputs[0], r), (1, outputs[1], r)], dtype, i
        )
        for i, r in enumerate(ranks)
    ]
    ys = [random(rows, out, dtype=dtype, seed=60 + i) for i, out in enumerate(outputs)]
    return stacks, random(rows, width, dtype=dtype, seed=59), ys


@pytest.mark.parametrize("dtype", list(EPSILON))
def test_a_row_alone_is_the_same_bit_for_bit(dtype: torch.dtype, threads: int) -> None:
    """Whoever shares the call, whatever number of threads."""
    stacks, x, ys = eight_adapters(dtype)
    together = added(stacks, [None] * 8, x, ys)
    check(stacks, [None] * 8, x, ys, together)
    torch.set_num_threads(1)
    for row in (0, 4, 11, 22, 23):
        (own,) = [s for s in stacks if s.tokens.start <= row < s.tokens.stop]
        copies = own.copies
        alone = StackedAdapters(slice(0, 1), 2, lambda made=copies: made, None, lambda: None)
        here = slice(row, row + 1)
        got = added([alone], [None], x[here], [y[here] for y in ys])
        assert all(torch.equal(a, b[here]) for a, b in zip(got, together, strict=True))


@pytest.mark.parametrize("dtype", list(EPSILON))
def test_more_rows_than_are_held_at_once(dtype: torch.dtype) -> None:
    stacks, x, ys = eight_adapters(dtype, width=40, per=70)
    check(stacks, [None] * 8, x, ys, added(stacks, [None] * 8, x, ys))


@pytest.mark.parametrize("dtype", list(EPSILON))
def test_what_is_no_number_spoils_its_row_alone(dtype: torch.dtype) -> None:
    """Of ranks that are no multiple of anything, beside which others lie."""
    stacks = [stack_of(slice(0, 5), 33, [(0, 20, 3), (1, 9, 5)], dtype, 1)]
    x = random(5, 33, dtype=dtype, seed=2)
    ys = [random(5, out, dtype=dtype, seed=3) for out in (20, 9)]
    x[3, 32] = math.nan
    for y in added(stacks, [None], x, ys):
        assert torch.equal(y.isnan().any(1), torch.arange(5) == 3)
    # a rank of one linear, and none of the other's
    x[3, 32] = 0.0
    stacks[0].lora_A[2] = math.inf
    first, second = added(stacks, [None], x, ys)
    assert not first.isfinite().any()
    assert second.isfinite().all()


def test_what_goes_through_torch() -> None:
    dtype = torch.float32
    good = stack_of(slice(0, 2), 8, [(0, 4, 3)], dtype, 1)
    assert supports_term(good)
    wide, strided = good.copies, stack_of(slice(0, 2), 8, [(0, 4, 3)], dtype, 1).copies
    part = strided.parts[0]
    across = AdapterShare(0, part.rows, part.lora_B.t().contiguous().t(), part.scale)
    for copies in (
        ComputeCopies(wide.lora_A.double(), wide.parts),
        ComputeCopies(wide.lora_A, [across]),
    ):
        assert not supports_term(
            StackedAdapters(slice(0, 2), 1, lambda made=copies: made, None, lambda: None)
        )
