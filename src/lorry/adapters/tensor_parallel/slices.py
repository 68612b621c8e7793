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
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorry.adapters.tensor_parallel.ranks import TensorRanks

Side = Literal["A", "B"]
SIDES: tuple[Side, Side] = ("A", "B")


@dataclass(frozen=True)
class DimensionSlice:
    """Rank ``rank``'s part of a dimension of ``whole`` entries that ``ranks`` share; where they do not
    divide, the first ranks have one more. ``blocks``: that it has of each of so many equal blocks (q,
    k and v of a fused projection) its own part."""

    whole: int
    ranks: int
    rank: int
    blocks: int = 1

    @property
    def size(self) -> int:
        """Entries of this rank."""
        start, stop = self._bounds
        return self.blocks * (stop - start)

    @property
    def widest(self) -> int:
        """Entries of the rank that has the most."""
        return self.of(0).size

    @property
    def offset(self) -> int:
        """The first entry of a part that lies in one piece."""
        assert self.blocks == 1
        return self._bounds[0]

    @property
    def _bounds(self) -> tuple[int, int]:
        """Where this rank's entries of a block begin and end in it."""
        each, more = divmod(self.whole // self.blocks, self.ranks)
        start = self.rank * each + min(self.rank, more)
        return start, start + each + (self.rank < more)

    def of(self, rank: int) -> DimensionSlice:
        """Another rank's part."""
        return replace(self, rank=rank)

    def ranges(self) -> list[slice]:
        """This rank's entries among all, block by block."""
        block, (start, stop) = self.whole // self.blocks, self._bounds
        return [slice(b * block + start, b * block + stop) for b in range(self.blocks)]

    def local(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """(where entries of the whole lie in this rank's part, 0 of those that do not; whether they do)."""
        block, (start, stop) = self.whole // self.blocks, self._bounds
        inside = entries % block
        here = (inside >= start) & (inside < stop)
        at = entries // block * (stop - start) + inside - start
        return torch.where(here, at, 0), here

    def cut(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's part of a whole tensor, its own memory."""
        pieces = [tensor.narrow(dim, r.start, r.stop - r.start) for r in self.ranges()]
        return torch.cat(pieces, dim)

    def join(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """The whole tensor from every rank's part."""
        # by block, and in it by rank
        by_block = zip(*(part.chunk(self.blocks, dim) for part in parts), strict=True)
        return torch.cat([piece for pieces in by_block for piece in pieces], dim)

    def gather(self, part: Tensor, ranks: TensorRanks) -> Tensor:
        """The whole [n, whole] from every rank's columns; all ranks call this together."""
        # every rank sends as much
        even = F.pad(part, (0, self.widest - part.shape[1]))
        parts = enumerate(ranks.gather(even.contiguous()))
        return self.join([each[:, : self.of(rank).size] for rank, each in parts], 1)


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


class GatherColumns(torch.autograd.Function):
    """`apply(x [t,w], part, ranks) -> [t, whole]`: every rank's columns, side by side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: DimensionSlice, ranks: TensorRanks) -> Tensor:
        ctx.part = part
        return part.gather(x, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.part.cut(grads[0], 1), None, None


def gather_inputs(x: Tensor, slices: LayerSlices | None) -> Tensor:
    """The whole [t, I] that a row-parallel layer reads, from this rank's columns of it; as it is where
    nothing of it is cut. All ranks call this together, and each has the whole gradient."""
    if slices is None or slices.columns is None:
        return x
    whole: Tensor = GatherColumns.apply(x, slices.columns, slices.ranks)
    return whole


def gather_outputs(y: Tensor, slices: LayerSlices | None) -> Tensor:
    """The whole [t, O] of a column-parallel layer from this rank's columns of it; as it is where nothing
    is cut. All ranks call this together."""
    if slices is None:
        return y
    whole: Tensor = GatherColumns.apply(y, slices.rows, slices.ranks)
    return whole
