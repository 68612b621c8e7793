"""The kernels of generation against the same maths in float64, and each row against itself alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorry.kernels import decode, kernel_status, load_library

pytestmark = pytest.mark.skipif(load_library() is None, reason=f"kernels: {kernel_status().reason}")
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 1e-5}


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(got: Tensor, truth: Tensor, dtype: torch.dtype, size: Tensor | None = None) -> None:
    """Within one rounding to ``dtype`` of the truth, or of what was summed (``size``) where it
    cancels.
    """
    allowed = ROUNDING[dtype] * ((truth.abs() if size is None else size) + 1e-3)
    assert ((got.double() - truth).abs() <= allowed).all()


# --- products


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(list(ROUNDING)),
    st.integers(1, 70),
    st.sampled_from([1, 2, 3, 8, 15, 16, 17, 31, 33, 48, 63, 64, 96, 100, 576]),
    st.integers(1, 100),
    st.booleans(),
)
def test_a_product_is_rounded_once(
    dtype: torch.dtype, rows: int, ins: int, outs: int, biased: bool
) -> None:
    x, w, b = (
        random(*shape, dtype=dtype, seed=seed)
        for seed, shape in enumerate([(rows, ins), (outs, ins), (outs,)])
    )
    assert decode.supports_product(w)
    truth = x.double() @ w.double().t() + (b.double() if biased else 0)
    size = x.double().abs() @ w.double().abs().t() if dtype == torch.float32 else truth.abs() + 1e-2
    near(decode.linear_product(x, w, b if biased else None), truth, dtype, size)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("width", [576, 50])
def test_a_row_multiplied_alone_is_the_same_bit_for_bit(
    dtype: torch.dtype, width: int, threads: int
) -> None:
    x, w = random(77, width, dtype=dtype), random(1536, width, dtype=dtype, seed=1)
    together = decode.linear_product(x, w, None)
    assert all(
        torch.equal(together[i : i + 1], decode.linear_product(x[i : i + 1], w, None))
        for i in (0, 15, 16, 40, 73, 74, 76)
    )
    assert torch.equal(together[:3], decode.linear_product(x[:3], w, None))


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_what_is_no_number_spoils_its_row_and_output_alone(dtype: torch.dtype) -> None:
    x, w = random(6, 70, dtype=dtype), random(20, 70, dtype=dtype, seed=1)
    x[2, 69], w[17, 3] = math.nan, math.inf
    y = decode.linear_product(x, w, None)
    odd = ~y.isfinite()
    expected = torch.zeros(6, 20, dtype=torch.bool)
    expected[2], expected[:, 17] = True, True
    assert torch.equal(odd, expected)


def test_what_the_product_does_not_take() -> None:
    good = random(64, 64)
    assert decode.supports_product(good)
    assert decode.supports_product(good.float())
    for weight in (good.double(), good.t(), good[0], good.to("meta")):
        assert not decode.supports_product(weight)


# --- the cache and attention over it


def cache_of(
    lengths: list[int], groups: int, width: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Two layers of random keys and values for every row, with room beyond its length that holds
    NaN; and the table.
    """
    memory = []
    for seed, length in enumerate(lengths):
        row = torch.full((2, 2, groups, length + 5, width), math.nan, dtype=dtype)
        row[:, :, :, :length] = random(2, 2, groups, length, width, dtype=dtype, seed=seed)
        memory.append(row)
    return memory, torch.tensor([[row.data_ptr(), row.shape[3]] for row in memory])


def plain_attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q [H,D] over keys, values [G,n,D], in float64."""
    share = q.shape[0] // keys.shape[0]
    k, v = keys.double().repeat_interleave(share, 0), values.double().repeat_interleave(share, 0)
    p = (torch.einsum("hd,hnd->hn", q.double(), k) / math.sqrt(q.shape[1])).softmax(-1)
    return torch.einsum("hn,hnd->hd", p, v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("heads", "groups", "width"),
    [(9, 3, 64), (4, 4, 64), (7, 1, 64), (5, 1, 128), (4, 2, 96), (6, 2, 8)],
)
def test_attention_is_the_formula(
    dtype: torch.dtype, heads: int, groups: int, width: int, threads: int
) -> None:
    lengths = [1, 15, 16, 17, 200, 3]
    memory, table = cache_of(lengths, groups, width, dtype)
    q = random(len(lengths), heads, width, dtype=dtype, seed=99) * 3
    for layer in (0, 1):
        got = decode.attend_to_cache(q, table, torch.tensor(lengths), layer, groups)
        for row, length in enumerate(lengths):
            keys, values = memory[row][layer, :, :, :length]
            near(
                got[row], plain_attention(q[row], keys, values), dtype, values.double().abs().max()
            )
            alone = decode.attend_to_cache(
                q[row : row + 1], table[row : row + 1], torch.tensor([length]), layer, groups
            )
            assert torch.equal(alone[0], got[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_extreme_scores(dtype: torch.dtype) -> None:
    """One key far ahead of the others takes everything; a NaN in the row spoils that row and no
    other.
    """
    memory, table = cache_of([20, 20], 1, 64, dtype)
    q = torch.ones(2, 1, 64, dtype=dtype)
    memory[0][0, 0, 0, 7] = 100
    memory[1][0, 0, 0, 3, 0] = math.nan
    got = decode.attend_to_cache(q, table, torch.tensor([20, 20]), 0, 1)
    assert torch.equal(got[0, 0], memory[0][0, 1, 0, 7])
    assert got[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_go_where_they_belong(dtype: torch.dtype) -> None:
    memory, table = cache_of([6, 9], 3, 32, dtype)
    before = [row.clone() for row in memory]
    k, v = random(3, 3, 32, dtype=dtype, seed=5), random(3, 3, 32, dtype=dtype, seed=6)
    decode.store_kv(k, v, table, torch.tensor([1, 0, 1]), torch.tensor([10, 2, 0]), 1)
    for t, (row, position) in enumerate([(1, 10), (0, 2), (1, 0)]):
        before[row][1, 0, :, position], before[row][1, 1, :, position] = k[t], v[t]
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(memory, before, strict=True)
    )


# --- the likeliest token


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_first_of_the_largest(dtype: torch.dtype) -> None:
    logits = random(5, 3001, dtype=dtype)
    logits[1, [700, 2000, 3000]] = 50
    logits[2] = -math.inf
    logits[2, 17] = -3
    logits[3, 5] = math.nan
    logits[4, 2999] = math.inf
    places, values = decode.argmax_rows(logits)
    best, expected = logits[[0, 1, 2, 4]].float().max(-1)
    assert places[[0, 1, 2, 4]].tolist() == expected.tolist()
    assert places[1] == 700
    assert torch.equal(values[[0, 1, 2, 4]], best)
    assert values[3].isnan()
    assert int(decode.argmax_rows(torch.full((1, 4), -math.inf, dtype=dtype))[0]) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_draw_passes_its_number(dtype: torch.dtype, temperature: float) -> None:
    """The cumulative distribution in float64 lies on either side of the number, for 1700 tokens:
    blocks, and a part of one.
    """
    logits = random(64, 1700, dtype=dtype) * 4
    logits[:, 600:1100] = -math.inf  # a whole block among them
    numbers = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    numbers[:2] = torch.tensor([0.0, 1 - 2.0**-53])
    places, values = decode.sample_rows(logits, numbers, temperature)
    sums = (logits.double() / temperature).softmax(-1).cumsum(-1)
    after = sums.gather(1, places[:, None])[:, 0]
    before = after - (logits.double() / temperature).softmax(-1).gather(1, places[:, None])[:, 0]
    assert ((before - 1e-6 <= numbers) & (numbers <= after + 1e-6)).all()
    assert (after > before).all()
    assert torch.equal(values, logits.float().amax(-1))
    alone = [
        decode.sample_rows(logits[i : i + 1], numbers[i : i + 1], temperature)[0] for i in range(64)
    ]
    assert torch.equal(torch.cat(alone), places)


def test_a_draw_of_certainty_and_of_nothing() -> None:
    logits = torch.full((3, 1300), -math.inf)
    logits[0, 1000] = 5.0
    logits[1] = math.nan
    places, values = decode.sample_rows(logits, torch.full((3,), 0.9, dtype=torch.float64), 1.0)
    assert places[0] == 1000
    assert values.isfinite().tolist() == [True, False, False]


def test_what_the_kernels_do_not_take() -> None:
    assert decode.supports_decode(torch.bfloat16, torch.device("cpu"))
    assert not decode.supports_decode(torch.float64, torch.device("cpu"))
    assert not decode.supports_decode(torch.bfloat16, torch.device("meta"))
