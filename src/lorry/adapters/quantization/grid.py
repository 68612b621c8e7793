"""Matrices that other tools have packed: codes in rows, and a grid of scales over outputs and inputs.

Read from checkpoints (`models/packed`) and never made here. One class holds GPTQ's and AWQ's (4 or 8
bits, groups of inputs with a scale and a zero), block FP8 (eight-bit floats, tiles of 128 x 128) and
GGUF's Q4_0, Q4_1 and Q8_0 (groups of 32 inputs, Q4_1 with a minimum).

    w[o, i] = (code[o, i] - zero[a, b]) * scale[a, b]      or      code[o, i] * scale[a, b] + minimum[a, b]

with a = o // outputs of a tile and b = i // inputs of one, or, where a file orders its inputs itself
(GPTQ's `desc_act`), b = groups[i]. Scales of 16 bits are held as their bits in integers: half of fp32's
memory, and a cast of the model changes no integer.

O out, I in features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorry.adapters.quantization.packed import PIECE, PackedMatrix
from lorry.kernels.packed import PackedSource

# two codes a byte, the first in the high half; whole numbers; signed ones; eight-bit floats (e4m3)
CodeKind = Literal["nibbles", "unsigned", "signed", "e4m3"]
KIND_NUMBERS: dict[CodeKind, int] = {"nibbles": 0, "unsigned": 1, "signed": 2, "e4m3": 3}


@dataclass(frozen=True, slots=True)
class PackedGrid(PackedMatrix):
    """Codes uint8 [O,ceil(I/2)] for nibbles, else [O,I]; scales fp32, or fp16 as int16 bits, [ceil(O /
    outputs), groups]; zeros uint8 like the scales, or None; minimums fp16 as int16 bits likewise; groups
    int32 [I] or None: which column of scales each input has. ``tile``: (outputs, inputs) that share a scale,
    the inputs an even number or all of them. ``rounded``: whether values are those of a bfloat16 checkpoint,
    whatever they are opened to."""

    scales: Tensor
    kind: CodeKind
    tile: tuple[int, int]
    zeros: Tensor | None = None
    minimums: Tensor | None = None
    groups: Tensor | None = None
    rounded: bool = False

    def source(self) -> PackedSource:
        kind, halves = KIND_NUMBERS[self.kind], int(self.scales.dtype == torch.int16)
        tensors = (self.codes, self.scales, self.zeros, self.minimums, self.groups)
        across, rounded = self.scales.shape[1], int(self.rounded)
        return PackedSource("grid", (*tensors, kind, halves, *self.tile, across, rounded))

    def open_plainly(self, out: Tensor) -> None:
        outputs, width = self.tile
        columns = (
            torch.arange(self.shape[1], device=self.codes.device) // width
            if self.groups is None
            else self.groups.long()
        )
        scales, minimums = _as_floats(self.scales), self.minimums
        rows = max(1, PIECE // max(1, self.shape[1]))
        for start in range(0, self.shape[0], rows):
            here = slice(start, min(start + rows, self.shape[0]))
            values = self._codes(here)
            # [rows, 1] and [I]: which scale each value has
            place = (
                torch.arange(here.start, here.stop, device=columns.device)[:, None] // outputs,
                columns,
            )
            if self.zeros is not None:
                values -= self.zeros[place]
            values *= scales[place]
            if minimums is not None:
                values += _as_floats(minimums)[place]
            out[here].copy_(values.bfloat16() if self.rounded else values)

    def _codes(self, rows: slice) -> Tensor:
        """The codes of some outputs as numbers, fp32 [rows, I]."""
        stored = self.codes[rows]
        match self.kind:
            case "nibbles":
                pairs = torch.stack((stored >> 4, stored & 15), 2)
                return pairs.flatten(1)[:, : self.shape[1]].float()
            case "unsigned":
                return stored.float()
            case "signed":
                return stored.view(torch.int8).float()
            case "e4m3":
                return stored.view(torch.float8_e4m3fn).float()


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes below 16, uint8 [O,I] -> [O,ceil(I/2)], the first of two in the high half."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()


def _as_floats(scales: Tensor) -> Tensor:
    return scales.view(torch.float16).float() if scales.dtype == torch.int16 else scales
