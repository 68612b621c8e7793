"""A matrix [O,I] packed into 4, 8 or 16 bits a value, and opened again.

    packed = pack(weight, QUANTIZATIONS["nf4"])
    weight = packed.open(torch.bfloat16)       # the values it computes with

`nf4`, `fp4`: blocks of 64 values along the flattened matrix, two codes a byte with the first in the
high half, a scale each: the block's largest absolute value, itself an eight-bit code (double
quantisation, blocks of 256 scales) unless that is switched off; 4.127 bits a value. Codes and largest values are
bitsandbytes', bit for bit, and so is what its files are opened to; an eight-bit scale is the nearest, from which
its CPU code is one step away in some 2 of 1,000. `int8`: the largest absolute value of
each output, which 127 stands for, as bitsandbytes has it; weights alone, products are of the opened values.
`bfloat16`: a checkpoint's own numbers, for a model that computes in float32.
Formats that are read and never packed here lie in `grid.py`.

O out, I in features.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorry.adapters.quantization.codes import (
    LEVELS,
    dynamic_levels,
    dynamic_table,
    level_table,
    nearest_code,
)
from lorry.errors import ConfigError
from lorry.kernels.packed import (
    PackedSource,
    most_packed_rows,
    open_packed,
    packed_product,
    supports_packed,
)

BLOCK = 64  # values that share a scale; QLoRA's and bitsandbytes'
SCALE_BLOCK = 256  # scales that share one of their own
INT8_MOST = 127
# values that are packed or opened at a time: what is made beside the result stays small
PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a base's matrices are packed: one of `QUANTIZATIONS`, or a format of a checkpoint that was
    packed elsewhere. ``double``: whether scales of 4-bit blocks are packed too."""

    name: str
    double: bool = True

    @property
    def keeps_values(self) -> bool:
        """Whether the base is the one whose matrices are whole, bit for bit."""
        return self in (KEPT_GGUF, KEPT_BFLOAT16)

    def facts(self) -> dict[str, str | int | bool]:
        """As files of an adapter record it."""
        if self.name in LEVELS:
            return {"format": self.name, "block": BLOCK, "double": self.double}
        return {"format": self.name}


# a GGUF file's own, in place of the bfloat16 matrices that are converted from it
KEPT_GGUF = Quantization("gguf")
# a checkpoint's own bfloat16, where more is computed in
KEPT_BFLOAT16 = Quantization("bfloat16")
QUANTIZATIONS: Mapping[str, Quantization] = {
    name: Quantization(name) for name in ("nf4", "fp4", "int8")
}


@dataclass(frozen=True, slots=True)
class PackedMatrix(ABC):
    """A matrix in few bits: how, its shape (O, I), and its codes; what else it is held in is each
    format's own."""

    quantization: Quantization
    shape: tuple[int, int]
    codes: Tensor

    def fields(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """({field: tensor} that it is held in, {field: setting} of the rest)."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return tensors, {name: v for name, v in values.items() if name not in tensors}

    def tensors(self) -> dict[str, Tensor]:
        """What it is held in, by field."""
        return self.fields()[0]

    def part(self, dim: int, ranges: Sequence[slice]) -> PackedMatrix:
        """These outputs (``dim`` 0) or inputs (1) alone, in their order, of the same values. Raises
        ConfigError where values that share a scale would part."""
        raise ConfigError(
            f"a matrix held in {self.quantization.name} is not cut over processes; nf4, fp4 and int8 of a "
            "whole checkpoint are"
        )

    @abstractmethod
    def source(self) -> PackedSource:
        """What the kernels read it from."""

    @abstractmethod
    def open_plainly(self, out: Tensor) -> None:
        """Write its values to out [O,I], contiguous, in plain torch."""

    def to(self, device: torch.device) -> PackedMatrix:
        """The same on another device."""
        tensors, settings = self.fields()
        moved: dict[str, Any] = {name: t.to(device) for name, t in tensors.items()}
        return type(self)(**settings, **moved)

    def open(self, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
        """The values [O,I] that it stands for, in ``dtype``, contiguous; written to ``into`` if given."""
        out = (
            torch.empty(self.shape, dtype=dtype, device=self.codes.device) if into is None else into
        )
        if supports_packed(self.codes, dtype):
            open_packed(self.source(), out)
        else:
            self.open_plainly(out)
        return out

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x [T,I] -> x W^T + b [T,O] of the values that `open` gives in the dtype of x, summed in fp32 and
        rounded once, of packed bytes alone; None where no kernel does that for so many rows."""
        if not 0 < x.shape[0] <= most_packed_rows() or not supports_packed(self.codes, x.dtype):
            return None
        return packed_product(self.source(), self.shape[0], x, bias)


@dataclass(frozen=True, slots=True)
class Packed4Bit(PackedMatrix):
    """Codes uint8 [ceil(O I / 2)]; the scale of each block: fp32 [blocks], or uint8 [blocks] with
    ``scale_scales`` fp32 [ceil(blocks / 256)] and ``offset`` fp32 [1] added to each."""

    scales: Tensor
    scale_scales: Tensor | None = None
    offset: Tensor | None = None

    def block_scales(self) -> Tensor:
        """fp32 [blocks]."""
        if self.scale_scales is None or self.offset is None:
            return self.scales
        values, count = dynamic_table(self.scales.device)[self.scales.int()], len(self.scales)
        blocks = F.pad(values, (0, -count % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
        return (blocks * self.scale_scales[:, None]).view(-1)[:count].add_(self.offset)

    def part(self, dim: int, ranges: Sequence[slice]) -> Packed4Bit:
        """See `PackedMatrix.part`; scales are fp32, since those that share one of their own part."""
        outputs, inputs = self.shape
        # blocks lie along the flattened matrix: of outputs whole rows are taken, of inputs a stretch of
        # each row, and both have to be whole blocks, but for the last one of all
        lines, unit = (1, inputs) if dim == 0 else (outputs, 1)
        spans = [(r.start * unit, r.stop * unit) for r in ranges]
        line = outputs * inputs // lines
        bounds = [b for span in spans for b in span if dim or b != line]
        if odd := [b for b in (*bounds, *([line] if dim else [])) if b % BLOCK]:
            raise ConfigError(
                f"a matrix {list(self.shape)} (out, in) held in {self.quantization.name} parts between blocks of "
                f"{BLOCK} values alone, and {odd[0]} is no multiple; int8 has no blocks"
            )
        shape = [outputs, inputs]
        shape[dim] = sum(r.stop - r.start for r in ranges)
        codes, scales = self.codes.view(lines, -1), self.block_scales().view(lines, -1)
        return Packed4Bit(
            self.quantization,
            (shape[0], shape[1]),
            torch.cat([codes[:, a // 2 : -(-b // 2)] for a, b in spans], 1).view(-1),
            torch.cat([scales[:, a // BLOCK : -(-b // BLOCK)] for a, b in spans], 1).view(-1),
        )

    def source(self) -> PackedSource:
        device = self.codes.device
        nested: tuple[Tensor | None, ...] = (None, None, None)
        if self.scale_scales is not None and self.offset is not None:
            nested = (dynamic_table(device), self.scale_scales, self.offset)
        levels = level_table(self.quantization.name, device)
        return PackedSource("flat", (self.codes, self.scales, *nested, levels))

    def open_plainly(self, out: Tensor) -> None:
        flat, scales = out.view(-1), self.block_scales()
        levels = level_table(self.quantization.name, self.codes.device)
        # a byte's two values side by side in eight bytes, so that one look-up gives both
        pairs = torch.cartesian_prod(levels, levels).view(torch.int64)
        for start in range(0, flat.numel(), PIECE):
            part = flat[start : start + PIECE]
            codes = self.codes[start // 2 : (start + PIECE) // 2]
            values = F.embedding(codes.int(), pairs).view(torch.float32).view(-1)
            here = scales[start // BLOCK : (start + PIECE) // BLOCK]
            if values.numel() == here.numel() * BLOCK:
                values = (values.view(-1, BLOCK) * here[:, None]).view(-1)
            else:  # the last block is shorter
                values = values * here.repeat_interleave(BLOCK)[: values.numel()]
            part.copy_(values[: part.numel()])


@dataclass(frozen=True, slots=True)
class PackedInt8(PackedMatrix):
    """Codes int8 [O,I]; scales fp32 [O], the largest absolute value of each output."""

    scales: Tensor

    def part(self, dim: int, ranges: Sequence[slice]) -> PackedInt8:
        """See `PackedMatrix.part`."""
        codes = torch.cat([self.codes.narrow(dim, r.start, r.stop - r.start) for r in ranges], dim)
        scales = self.scales if dim else torch.cat([self.scales[r] for r in ranges])
        return PackedInt8(self.quantization, (codes.shape[0], codes.shape[1]), codes, scales)

    def source(self) -> PackedSource:
        return PackedSource("rows", (self.codes, self.scales))

    def open_plainly(self, out: Tensor) -> None:
        rows = max(1, PIECE // max(1, self.shape[1]))
        for start in range(0, self.shape[0], rows):
            here = slice(start, start + rows)
            # one after the other, as bitsandbytes has it: no scale is rounded
            values = self.codes[here].float().mul_(self.scales[here, None]).mul_(1 / INT8_MOST)
            out[here].copy_(values)


@dataclass(frozen=True, slots=True)
class HeldBfloat16(PackedMatrix):
    """Codes int16 [O,I], the bits of bfloat16 numbers: a cast of the model changes no integer."""

    def part(self, dim: int, ranges: Sequence[slice]) -> HeldBfloat16:
        """See `PackedMatrix.part`."""
        codes = torch.cat([self.codes.narrow(dim, r.start, r.stop - r.start) for r in ranges], dim)
        return HeldBfloat16(self.quantization, (codes.shape[0], codes.shape[1]), codes)

    def source(self) -> PackedSource:
        return PackedSource("halves", (self.codes,))

    def open_plainly(self, out: Tensor) -> None:
        out.copy_(self.codes.view(torch.bfloat16))


def pack(weight: Tensor, quantization: Quantization) -> PackedMatrix:
    """A floating matrix [O,I], every value finite, packed; on its device."""
    if quantization.name == "int8":
        return _pack_int8(weight.detach(), quantization)
    if quantization == KEPT_BFLOAT16:
        # a copy: a view would keep all of the file's memory that was read
        bits = weight.detach().to(torch.bfloat16, copy=True).contiguous().view(torch.int16)
        return HeldBfloat16(quantization, (bits.shape[0], bits.shape[1]), bits)
    return _pack_4bit(weight.detach(), quantization)


class PackedDigest:
    """SHA-256 over packed matrices, given in the order of their names: what is held, bit for bit."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, path: str, matrix: PackedMatrix) -> None:
        """One more."""
        for name, tensor in matrix.tensors().items():
            self._digest.update(f"{path}.{name}{tuple(tensor.shape)}".encode())
            # flat: a dimension of one may have any stride, which no view of bytes takes
            flat = tensor.contiguous().flatten()
            self._digest.update(flat.view(torch.uint8).cpu().numpy().data)

    def hexdigest(self) -> str:
        """Of those that were added."""
        return self._digest.hexdigest()


def _pack_4bit(weight: Tensor, quantization: Quantization) -> Packed4Bit:
    flat, levels = weight.reshape(-1), LEVELS[quantization.name]
    codes, scales = list[Tensor](), list[Tensor]()
    for start in range(0, flat.numel(), PIECE):
        part = flat[start : start + PIECE].float()
        # zeros change no block's largest absolute value
        blocks = F.pad(part, (0, -part.numel() % BLOCK)).view(-1, BLOCK)
        largest = blocks.abs().amax(1)
        numbers = nearest_code(_shares(blocks, largest), levels).view(-1)
        # up to a whole byte: what was padded are codes of zero
        numbers = numbers[: part.numel() + part.numel() % 2]
        codes.append(numbers[::2] << 4 | numbers[1::2])
        scales.append(largest)
    shape = (weight.shape[0], weight.shape[1])
    packed = Packed4Bit(quantization, shape, torch.cat(codes), torch.cat(scales))
    return _pack_scales(packed) if quantization.double else packed


def _shares(blocks: Tensor, largest: Tensor) -> Tensor:
    """Values [n, block] by their block's largest absolute value, which is 0 where all are."""
    # times its inverse, as bitsandbytes has it: a quotient would choose another of two equally near
    return blocks * (1.0 / largest.where(largest > 0, 1.0))[:, None]


def _pack_scales(packed: Packed4Bit) -> Packed4Bit:
    """The same with its scales in eight bits: their mean taken off, blocks of 256."""
    offset = packed.scales.mean()
    centred = packed.scales - offset
    blocks = F.pad(centred, (0, -centred.numel() % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    largest = blocks.abs().amax(1)
    codes = nearest_code(_shares(blocks, largest), dynamic_levels()).view(-1)[: centred.numel()]
    return Packed4Bit(
        packed.quantization, packed.shape, packed.codes, codes, largest, offset.reshape(1)
    )


def _pack_int8(weight: Tensor, quantization: Quantization) -> PackedInt8:
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], device=weight.device)
    rows = max(1, PIECE // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows].float()
        largest = part.abs().amax(1)
        scales[start : start + rows] = largest
        codes[start : start + rows] = (
            part * (INT8_MOST / largest.where(largest > 0, 1.0))[:, None]
        ).round()
    return PackedInt8(quantization, (weight.shape[0], weight.shape[1]), codes, scales)
