"""Matrices of few bits: codes against the definition in float64 and against bitsandbytes, both ways;
kernels against torch bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorry.adapters.quantization import packed as packing
from lorry.adapters.quantization.codes import LEVELS, dynamic_levels
from lorry.adapters.quantization.packed import (
    QUANTIZATIONS,
    Packed4Bit,
    PackedInt8,
    Quantization,
    pack,
)
from lorry.errors import ConfigError
from lorry.kernels import load_library

SHAPES = [(64, 64), (300, 96), (7, 13), (1, 1), (33, 128)]


def weight_of(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(shape[0])
    return (torch.randn(shape, generator=draw) * 0.02).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_are_the_nearest_of_sixteen(
    shape: tuple[int, int], name: str, dtype: torch.dtype
) -> None:
    weight, levels = weight_of(shape, dtype), torch.tensor(LEVELS[name], dtype=torch.float64)
    opened = pack(weight, Quantization(name, double=False)).open(torch.float32)  # type: ignore[arg-type]
    for block, got in zip(
        weight.double().reshape(-1).split(64), opened.double().reshape(-1).split(64), strict=True
    ):
        values = levels * block.abs().max()
        least = (block[:, None] - values).abs().amin(1)
        # fp32 may choose the other of two that are as near
        torch.testing.assert_close((block - got).abs(), least, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_scales_in_eight_bits_are_near_the_whole_ones(name: str) -> None:
    weight = weight_of((300, 96))
    double, single = (pack(weight, Quantization(name, double=d)) for d in (True, False))  # type: ignore[arg-type]
    assert isinstance(double, Packed4Bit)
    assert isinstance(single, Packed4Bit)
    assert double.scales.dtype == torch.uint8
    assert torch.equal(double.codes, single.codes)
    error = (double.block_scales() - single.scales).abs().max()
    # steps of the table are 1.4% of the farthest scale's distance from the mean at most
    spread = (single.scales - single.scales.mean()).abs().max()
    assert 0 < error <= 0.0071 * spread


def test_bits_a_value() -> None:
    """4.127 of four bits, with scales of scales; a scale an output beside eight."""
    weight = weight_of((256, 512))
    for name, most in (("nf4", 4.128), ("int8", 8.07)):
        held = pack(weight, QUANTIZATIONS[name]).tensors().values()
        assert sum(t.nbytes for t in held) * 8 / weight.numel() < most


def test_eight_bits_are_off_by_half_a_step() -> None:
    weight = weight_of((33, 50)).double()
    opened = pack(weight, QUANTIZATIONS["int8"]).open(torch.float32).double()
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((opened - weight).abs() <= steps * 0.50001).all())
    assert not torch.equal(opened, weight)


def test_zeros_stay() -> None:
    weight = weight_of((4, 64))
    weight[1] = 0
    for quantization in QUANTIZATIONS.values():
        opened = pack(weight, quantization).open(torch.float32)
        assert bool((opened[1] == 0).all())
        assert bool(opened.isfinite().all())


@pytest.mark.parametrize("name", list(QUANTIZATIONS))
@pytest.mark.parametrize("shape", [*SHAPES, (1, 200_001)])
def test_pieces_are_those_of_the_whole(
    name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work in pieces of a few blocks, and with a piece's end in the middle."""
    weight = weight_of(shape)
    whole = pack(weight, QUANTIZATIONS[name]).open(torch.float32)
    monkeypatch.setattr(packing, "PIECE", 1 << 10)
    monkeypatch.setattr(packing, "supports_packed", lambda codes, dtype: False)
    assert torch.equal(pack(weight, QUANTIZATIONS[name]).open(torch.float32), whole)


@pytest.mark.skipif(load_library() is None, reason="no C++ compiler")
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 200),
    name=st.sampled_from(list(QUANTIZATIONS)),
    double=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_kernels_open_the_very_bits_of_torch(
    rows: int, columns: int, name: str, double: bool, dtype: torch.dtype
) -> None:
    packed = pack(weight_of((rows, columns)), Quantization(name, double))  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "supports_packed", lambda codes, dtype: False)
        plain = packed.open(dtype)
    assert torch.equal(packed.open(dtype).view(torch.uint8), plain.view(torch.uint8))


# --- bitsandbytes


@pytest.fixture
def functional() -> object:
    return pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [True, False])
def test_codes_are_those_of_bitsandbytes(
    functional: object, name: str, dtype: torch.dtype, double: bool
) -> None:
    weight = weight_of((256, 512), dtype)
    theirs, state = functional.quantize_4bit(  # type: ignore[attr-defined]
        weight, blocksize=64, quant_type=name, compress_statistics=double
    )
    ours = pack(weight, Quantization(name, double))  # type: ignore[arg-type]
    assert isinstance(ours, Packed4Bit)
    assert torch.equal(ours.codes, theirs.view(-1))
    if not double:
        assert torch.equal(ours.scales, state.absmax)
    else:
        assert torch.equal(ours.scale_scales, state.state2.absmax)  # type: ignore[arg-type]
        assert torch.equal(ours.offset, state.offset.reshape(1))  # type: ignore[arg-type]
        # its CPU code does not always find the nearest: a step away, and rarely
        away = (ours.scales.int() - state.absmax.int()).abs()
        assert int(away.max()) <= 1
        assert float((away > 0).float().mean()) < 0.01
    # what its file holds is opened to what it computes with
    scales = state.absmax
    read = Packed4Bit(
        ours.quantization,
        (256, 512),
        theirs.view(-1),
        scales,
        state.state2.absmax if double else None,
        state.offset.reshape(1) if double else None,
    )
    assert torch.equal(read.open(dtype), functional.dequantize_4bit(theirs, state))  # type: ignore[attr-defined]


def test_tables_are_those_of_bitsandbytes(functional: object) -> None:
    assert functional.create_dynamic_map().tolist() == list(dynamic_levels())  # type: ignore[attr-defined]
    for name, levels in LEVELS.items():
        theirs = functional.get_4bit_type(name, device="cpu").tolist()  # type: ignore[attr-defined]
        assert theirs == pytest.approx(levels, abs=1e-7)


def test_dynamic_levels_by_their_definition() -> None:
    """Seven decades, each with twice the fractions of the one below, evenly between a tenth and one."""
    values = dynamic_levels()
    assert len(values) == 256
    assert len(set(values)) == 256
    assert list(values) == sorted(values)
    top = [v for v in values if 0.1 < v < 1]
    assert len(top) == 64
    assert math.isclose(top[1] - top[0], 0.9 / 64, rel_tol=1e-5)
    assert math.isclose(min(v for v in values if v > 0), 0.55e-6, rel_tol=1e-5)


def test_int8_of_bitsandbytes_is_opened_alike(functional: object) -> None:
    weight = weight_of((64, 128), torch.float16)
    codes, scales, _ = functional.int8_vectorwise_quant(weight)  # type: ignore[attr-defined]
    ours = pack(weight, QUANTIZATIONS["int8"])
    assert isinstance(ours, PackedInt8)
    # it divides in fp16
    assert int((ours.codes.int() - codes.int()).abs().max()) <= 1
    torch.testing.assert_close(ours.scales, scales, rtol=0, atol=0)


@pytest.mark.parametrize("name", list(QUANTIZATIONS))
@pytest.mark.parametrize(
    ("dim", "ranges"),
    [(0, [(0, 2), (6, 8)]), (0, [(4, 9)]), (1, [(64, 128)]), (1, [(0, 64), (128, 192)])],
)
def test_a_part_opens_to_the_same_values(
    name: str, dim: int, ranges: list[tuple[int, int]]
) -> None:
    """Of outputs, also the last ones, and of inputs; in float32, to the bit."""
    weight = torch.randn(9, 192, generator=torch.Generator().manual_seed(0))
    whole, slices = pack(weight, QUANTIZATIONS[name]), [slice(*each) for each in ranges]
    true = torch.cat([whole.open(torch.float32).narrow(dim, a, b - a) for a, b in ranges], dim)
    part = whole.part(dim, slices)
    assert part.shape == tuple(true.shape)
    assert torch.equal(part.open(torch.float32), true)


def test_values_that_share_a_scale_do_not_part() -> None:
    odd = torch.ones(9, 32)
    whole = pack(odd, QUANTIZATIONS["nf4"])
    # two rows are a block; the last block is half of one
    assert torch.equal(whole.part(0, [slice(8, 9)]).open(torch.float32), torch.ones(1, 32))
    for dim, cut in ((0, slice(0, 3)), (1, slice(0, 16))):
        with pytest.raises(ConfigError, match=r"\[9, 32\] \(out, in\) held in nf4 .*blocks of 64"):
            whole.part(dim, [cut])
    assert pack(odd, QUANTIZATIONS["int8"]).part(0, [slice(0, 3)]).shape == (3, 32)
