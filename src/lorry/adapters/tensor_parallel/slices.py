"""Which part of a whole matrix a rank holds, and what of an adapter on it is whole, cut, or a part
of a sum.

    column-parallel (rows of W [O,I] are cut): A [R,I] whole, B [O,R] cut; the gradient of A is a
    partial sum, and that of x, which all ranks have, too.
    row-parallel (columns of W are cut): A cut, B whole; the gradient of B is a partial sum, and y.

An embedding cut by vocabulary is row-parallel: its A [R,V] is cut.

Sums ride in the base's own, as wide as the layer, unless these are another's: in a linear of
Megatron-core's the terms add up by themselves, as wide as their rank (`LayerSlices.sums_ranks`), and
every gradient is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorry.adapters.tensor_parallel.ranks import TensorRanks

Side = Literal["A", "B"]
SIDES: tuple[Side, Side] = ("A", "B")


@dataclass(frozen=True)
class DimensionSlice:
    """Rank ``rank``'s part of a dimension of ``whole`` entries that ``ranks`` share. ``blocks``: that
    it has of each of so many equal blocks (q, k and v of a fused projection) its own part."""

    whole: int
    ranks: int
    rank: int
    blocks: int = 1

    @property
    def size(self) -> int:
        """Entries of a rank."""
        return self.whole // self.ranks

    @property
    def offset(self) -> int:
        """The first entry of a part that lies in one piece."""
        assert self.blocks == 1
        return self.rank * self.size

    def ranges(self) -> list[slice]:
        """This rank's entries among all, block by block."""
        block, part = self.whole // self.blocks, self.size // self.blocks
        starts = (b * block + self.rank * part for b in range(self.blocks))
        return [slice(start, start + part) for start in starts]

    def local(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """(where entries of the whole lie in this rank's part, 0 of those that do not; whether they do)."""
        block, part = self.whole // self.blocks, self.size // self.blocks
        inside = entries % block
        here = inside // part == self.rank
        return torch.where(here, entries // block * part + inside % part, 0), here

    def cut(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's part of a whole tensor, its own memory."""
        pieces = [tensor.narrow(dim, r.start, r.stop - r.start) for r in self.ranges()]
        return torch.cat(pieces, dim)

    def join(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """The whole tensor from every rank's part."""
        # by block, and in it by rank
        by_block = zip(*(part.chunk(self.blocks, dim) for part in parts), strict=True)
        return torch.cat([piece for pieces in by_block for piece in pieces], dim)


@dataclass(frozen=True)
class LayerSlices:
    """A layer [O,I] cut over ranks: ``rows`` of a column-parallel one, ``columns`` of a row-parallel
    one; the other is None. ``sums_ranks``: what is summed over ranks for a term is A x and its
    gradient, and not y and that of x: the base sums its own."""

    ranks: TensorRanks
    rows: DimensionSlice | None = None
    columns: DimensionSlice | None = None
    sums_ranks: bool = False

    def of(self, side: Side) -> tuple[int, DimensionSlice] | None:
        """The dimension of lora_A [R,I] or lora_B [O,R] that is cut, and how; None of the whole side."""
        part, dim = (self.columns, 1) if side == "A" else (self.rows, 0)
        return None if part is None else (dim, part)

    def whole_shape(self, side: Side, shape: Sequence[int]) -> list[int]:
        """The shape of a side on one device, from this rank's."""
        whole, cut = list(shape), self.of(side)
        if cut is not None:
            whole[cut[0]] = cut[1].whole
        return whole

    def cut(self, side: Side, whole: Tensor) -> Tensor:
        """This rank's part of a whole side."""
        cut = self.of(side)
        return whole if cut is None else cut[1].cut(whole, cut[0])
