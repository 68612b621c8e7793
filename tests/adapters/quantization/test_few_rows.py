"""Products of a few rows straight from packed bytes: those of the opened matrix, within the rounding of
one sum, in float32 and bfloat16; a row's result is its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.quantization import packed as packing
from lorry.adapters.quantization.grid import PackedGrid, pack_nibbles
from lorry.adapters.quantization.linear import OpenBuffers, hold_packed
from lorry.adapters.quantization.packed import (
    KEPT_BFLOAT16,
    PackedMatrix,
    Quantization,
    pack,
)
from lorry.kernels import kernel_status, load_library
from lorry.kernels.decode import linear_product
from lorry.kernels.packed import most_packed_rows, packed_product
from lorry.processor import isa_in_words

pytestmark = pytest.mark.skipif(load_library() is None, reason="no C++ compiler")
# widths of whole blocks, with a rest, odd ones, and long enough for threads
SHAPES = [(64, 64), (300, 96), (7, 13), (1, 1), (40, 70), (96, 576), (33, 160)]
# unit roundoffs: half a step of 24 and of 8 bits
EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def of_format(name: str, shape: tuple[int, int]) -> PackedMatrix:
    draw = np.random.default_rng(shape[0])
    outputs, inputs = shape
    if name in ("nf4", "nf4-single", "fp4", "int8", KEPT_BFLOAT16.name):
        weight = torch.from_numpy(draw.normal(size=shape).astype(np.float32)) * 0.02
        return pack(weight, Quantization(name.partition("-")[0], double="-" not in name))
    size = {"awq": 64, "gptq-wide": 128}.get(name, 32)
    groups = -(-inputs // size)
    codes = torch.from_numpy(draw.integers(0, 16, shape).astype(np.uint8))
    scales = torch.from_numpy((draw.random((outputs, groups)) * 0.01 + 0.001).astype(np.float16))
    bits = scales.view(torch.int16)
    zeros = torch.from_numpy(draw.integers(0, 16, (outputs, groups)).astype(np.uint8))
    order = torch.from_numpy((draw.permutation(inputs) // size).astype(np.int32))
    kind = Quantization(name)
    if name in ("gptq", "awq", "gptq-wide"):
        return PackedGrid(kind, shape, pack_nibbles(codes), bits, "nibbles", (1, size), zeros)
    if name == "gptq-single":  # scales that a product with a code may round
        single = torch.from_numpy(draw.random((outputs, groups)).astype(np.float32)) * 0.01
        return PackedGrid(kind, shape, pack_nibbles(codes), single, "nibbles", (1, size), zeros)
    if name == "gptq-rows":  # two outputs share a scale
        two = (bits[::2].contiguous(), zeros[::2].contiguous())
        return PackedGrid(kind, shape, pack_nibbles(codes), two[0], "nibbles", (2, size), two[1])
    if name == "gptq-order":
        return PackedGrid(
            kind, shape, pack_nibbles(codes), bits, "nibbles", (1, size), zeros, groups=order
        )
    if name == "gptq-8":
        return PackedGrid(kind, shape, codes * 16, bits, "unsigned", (1, size), zeros * 16)
    if name == "q4_1":
        return PackedGrid(
            Quantization("gguf"),
            shape,
            pack_nibbles(codes),
            bits,
            "nibbles",
            (1, size),
            minimums=bits,
            rounded=True,
        )
    if name == "q4_0":
        return PackedGrid(
            Quantization("gguf"),
            shape,
            pack_nibbles(codes),
            bits,
            "nibbles",
            (1, size),
            torch.full_like(zeros, 8),
            rounded=True,
        )
    if name == "q8_0":
        signed = torch.from_numpy(draw.integers(-127, 128, shape).astype(np.int8))
        return PackedGrid(
            Quantization("gguf"),
            shape,
            signed.view(torch.uint8),
            bits,
            "signed",
            (1, size),
            rounded=True,
        )
    assert name == "fp8"
    tiles = torch.rand(-(-outputs // 16), groups) * 0.01
    return PackedGrid(kind, shape, codes * 7, tiles, "e4m3", (16, size))


FORMATS = [
    *("nf4", "nf4-single", "fp4", "int8"),
    *("gptq", "gptq-order", "gptq-8", "gptq-single", "gptq-rows", "gptq-wide", "awq"),
    *("q4_0", "q4_1", "q8_0", "fp8", "bfloat16"),
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", list(EPSILON))
def test_a_few_rows_are_those_of_the_opened_matrix(
    name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Against float64 of the very values that the matrix is opened to: n sums of fp32, rounded once."""
    matrix = of_format(name, shape)
    draw = torch.Generator().manual_seed(1)
    opened = matrix.open(dtype).double()
    bias = torch.randn(shape[0], generator=draw).to(dtype)
    for rows in (1, 3, most_packed_rows()):
        x = torch.randn(rows, shape[1], generator=draw).to(dtype)
        for given in (bias, None):
            y = matrix.multiply(x, given)
            assert y is not None
            assert y.dtype == dtype
            true = x.double() @ opened.t() + (0 if given is None else given.double())
            size = x.double().abs() @ opened.abs().t() + (0 if given is None else given.abs())
            bound = size * (shape[1] + 1) * EPSILON[torch.float32] + true.abs() * EPSILON[dtype]
            assert bool(((y.double() - true).abs() <= bound).all()), (rows, given is not None)
            # a row alone is the row among others
            assert torch.equal(matrix.multiply(x[:1], given), y[:1])


# two codes a byte: float32 sums their even and odd places apart in registers of AVX-512
HALF_BYTES = {"nf4", "nf4-single", "fp4", "awq", "q4_0", "q4_1"} | {
    f"gptq{kind}" for kind in ("", "-single", "-rows", "-wide")
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", list(EPSILON))
def test_a_product_of_packed_bytes_is_that_of_the_opened_matrix(
    name: str, dtype: torch.dtype, threads: int
) -> None:
    """To the bit, of any number of rows: what generation from a kept base says is what the whole one says."""
    if dtype == torch.bfloat16 and kernel_status().amx:
        pytest.skip("matrix tiles multiply the opened one")
    if dtype == torch.float32 and name in HALF_BYTES and isa_in_words() not in ("avx2", "portable"):
        pytest.skip("even and odd places apart")
    for shape in SHAPES:
        matrix = of_format(name, shape)
        opened = matrix.open(dtype)
        bias = torch.arange(shape[0]).to(dtype)
        for rows in (1, 2, 5, 9, 40):
            x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(dtype)
            y = packed_product(matrix.source(), shape[0], x, bias)
            assert torch.equal(y, linear_product(x, opened, bias)), (shape, rows)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", list(EPSILON))
def test_kernels_open_the_very_bits_of_torch(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape in SHAPES:
        matrix = of_format(name, shape)
        compiled = matrix.open(dtype)
        with monkeypatch.context() as patch:
            patch.setattr(packing, "supports_packed", lambda codes, dtype: False)
            plain = matrix.open(dtype)
        # signs of zero apart: a sum with a minimum has none of its own
        assert torch.equal(compiled, plain), shape


def test_more_rows_open_the_matrix() -> None:
    matrix = of_format("nf4", (64, 64))
    assert matrix.multiply(torch.zeros(most_packed_rows() + 1, 64), None) is None
    assert matrix.multiply(torch.zeros(0, 64), None) is None
    assert matrix.multiply(torch.zeros(1, 64, dtype=torch.float16), None) is None


def layer_of(matrix: PackedMatrix, dtype: torch.dtype) -> tuple[BankLinear, OpenBuffers]:
    weight = torch.nn.Parameter(torch.empty(matrix.shape, dtype=dtype))
    layer, buffers = BankLinear(weight, None), OpenBuffers()
    hold_packed(layer, matrix, dtype, buffers)
    return layer, buffers


def test_decoding_opens_no_matrix() -> None:
    """A layer's forward of one row touches no buffer of a whole matrix; of many it does."""
    layer, buffers = layer_of(of_format("nf4", (64, 64)), torch.bfloat16)
    one: Tensor = layer(torch.ones(1, 64, dtype=torch.bfloat16))
    assert not buffers.buffers
    many: Tensor = layer(torch.ones(most_packed_rows() + 1, 64, dtype=torch.bfloat16))
    assert len(buffers.buffers) == 1
    torch.testing.assert_close(many[:1], one, rtol=2**-7, atol=1e-4)
