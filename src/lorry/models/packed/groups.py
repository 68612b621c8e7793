"""GPTQ's and AWQ's checkpoints: whole numbers of 4 or 8 bits, a scale and a zero for each group of inputs.

Both store [I,O] with eight (or four) codes in an int32. GPTQ packs along the inputs, zeros along the
outputs; AWQ packs both along the outputs, in the order its kernels want them. Here both become
`PackedGrid`: rows of outputs, codes in bytes. Published layouts: AutoGPTQ 0.7 and GPTQModel (`gptq`,
whose zeros are stored less one, and `gptq_v2`), AutoAWQ 0.2 (`gemm`).

O out, I in features; G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorry.adapters.quantization.grid import CodeKind, PackedGrid, pack_nibbles
from lorry.adapters.quantization.packed import Quantization
from lorry.errors import ModelError
from lorry.models.packed.parts import Shapes, finite_scales, need_parts, need_shape

WORD = 32  # bits of what codes are packed into
# the code that lies in bits 4j to 4j + 3 of a word of AWQ is that of output AWQ_ORDER[j] of its eight
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Gptq:
    """`P.qweight` int32 [I bits/32, O], `P.qzeros` int32 [G, O bits/32], `P.scales` [G,O], `P.g_idx` int32
    [I] (older files: none). ``group_size``: inputs of a group, None for all of them; ``zeros_off``: what is
    added to stored zeros; ``ordered``: whether the file says that its inputs are in an order of their
    own (`desc_act`), which only g_idx has."""

    group_size: int | None
    zeros_off: int = 1
    ordered: bool = False
    quantization: ClassVar[Quantization] = Quantization("gptq")
    marker: ClassVar[str] = "qweight"
    endings: ClassVar[Mapping[str, str]] = {
        f".{part}": part for part in ("qweight", "qzeros", "scales", "g_idx")
    }

    def check(self, where: str, shapes: Shapes, shape: tuple[int, int]) -> None:
        # without it every input would be read with another group's scale
        order = ["g_idx"] if self.ordered and self.group_size is not None else []
        need_parts(where, shapes, ["qweight", "qzeros", "scales", *order])
        (outputs, inputs), size = shape, self.group_size or shape[1]
        bits = _bits(where, shapes["qweight"], inputs)
        groups = _group_count(where, size, inputs)
        need_shape(where, "qweight", shapes["qweight"], (inputs * bits // WORD, outputs), shape)
        need_shape(where, "qzeros", shapes["qzeros"], (groups, outputs * bits // WORD), shape)
        need_shape(where, "scales", shapes["scales"], (groups, outputs), shape)
        if "g_idx" in shapes:
            need_shape(where, "g_idx", shapes["g_idx"], (inputs,), shape)

    def read(self, where: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedGrid:
        bits = _bits(where, tuple(parts["qweight"].shape), shape[1])
        codes = _unpack(where, parts["qweight"].t(), bits)
        zeros = _unpack(where, parts["qzeros"], bits)
        # in so many bits: less one of a zero of 0 is all ones
        zeros = (zeros + self.zeros_off).bitwise_and_(2**bits - 1)
        return _grid(
            self.quantization,
            shape,
            codes,
            zeros.t(),
            finite_scales(where, "scales", parts["scales"].t()),
            bits,
            self.group_size or shape[1],
            _groups(where, parts.get("g_idx"), self.group_size or shape[1], len(zeros)),
        )


@dataclass(frozen=True)
class Awq:
    """`P.qweight` int32 [I, O/8], `P.qzeros` int32 [G, O/8], `P.scales` [G,O]; 4 bits."""

    group_size: int | None
    quantization: ClassVar[Quantization] = Quantization("awq")
    marker: ClassVar[str] = "qweight"
    endings: ClassVar[Mapping[str, str]] = {
        f".{part}": part for part in ("qweight", "qzeros", "scales")
    }

    def check(self, where: str, shapes: Shapes, shape: tuple[int, int]) -> None:
        need_parts(where, shapes, ["qweight", "qzeros", "scales"])
        (outputs, inputs), size = shape, self.group_size or shape[1]
        groups = _group_count(where, size, inputs)
        need_shape(where, "qweight", shapes["qweight"], (inputs, outputs // 8), shape)
        need_shape(where, "qzeros", shapes["qzeros"], (groups, outputs // 8), shape)
        need_shape(where, "scales", shapes["scales"], (groups, outputs), shape)

    def read(self, where: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedGrid:
        codes, zeros = (_in_order(_unpack(where, parts[part], 4)) for part in ("qweight", "qzeros"))
        return _grid(
            self.quantization,
            shape,
            codes.t(),
            zeros.t(),
            finite_scales(where, "scales", parts["scales"].t()),
            4,
            self.group_size or shape[1],
            None,
        )


def _bits(where: str, words: tuple[int, ...], inputs: int) -> int:
    """Bits of a code, from how many words hold those of all inputs: files may have other numbers in other
    layers. Raises ModelError for any but 4 and 8."""
    bits = next((b for b in (4, 8) if len(words) == 2 and words[0] * WORD == inputs * b), None)
    if bits is None:
        raise ModelError(
            f"{where}: its qweight have shape {list(words)}, which for {inputs} inputs is neither 4 nor 8 bits a "
            "value; other widths cannot be read: use the unquantised checkpoint"
        )
    return bits


def _group_count(where: str, size: int, inputs: int) -> int:
    if size < 2 or (size % 2 and size != inputs):
        raise ModelError(f"{where}: groups of {size} inputs cannot be read; an even number can")
    return -(-inputs // size)


def _unpack(where: str, words: Tensor, bits: int) -> Tensor:
    """int32 [rows, n] -> uint8 [rows, n 32/bits], the lowest bits first."""
    if words.dtype != torch.int32:
        raise ModelError(f"{where}: its codes are {words.dtype}, not int32")
    # bytes lie lowest first on every machine that safetensors is read on
    codes = words.contiguous().view(torch.uint8)
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), 2).flatten(1)
    return codes


def _in_order(codes: Tensor) -> Tensor:
    """AWQ's codes [rows, O] in the order of outputs."""
    places = torch.tensor(AWQ_ORDER, device=codes.device).argsort()
    return codes.view(codes.shape[0], -1, 8)[:, :, places].flatten(1)


def _groups(where: str, stored: Tensor | None, size: int, count: int) -> Tensor | None:
    """The group of each input as the file has it; None where they follow one another. Raises ModelError
    for one that does not exist."""
    if stored is None:
        return None
    if stored.is_floating_point():
        raise ModelError(f"{where}: its g_idx is {stored.dtype}; whole numbers are expected")
    plain = torch.arange(len(stored), device=stored.device) // size
    if torch.equal(stored.long(), plain):
        return None
    if int(stored.min()) < 0 or int(stored.max()) >= count:
        raise ModelError(
            f"{where}: its g_idx name groups from {stored.min()} to {stored.max()}, and there are {count}"
        )
    return stored.to(torch.int32).contiguous()


def _grid(
    quantization: Quantization,
    shape: tuple[int, int],
    codes: Tensor,
    zeros: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,
    groups: Tensor | None,
) -> PackedGrid:
    """From codes uint8 [O,I], zeros uint8 [O,G], scales [O,G]."""
    kind: CodeKind = "nibbles" if bits == 4 else "unsigned"
    return PackedGrid(
        quantization,
        shape,
        pack_nibbles(codes) if bits == 4 else codes.contiguous(),
        scales,
        kind,
        (1, group_size),
        zeros=zeros.contiguous(),
        groups=groups,
    )
