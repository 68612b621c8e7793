"""A flat fp32 buffer as a whole: the norm of gradients in it, without the error of one fp32 sum, and
the tensors in it that one batched operation can take together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

BLOCK = 4096  # values whose squares one fp32 sum can take without losing late ones


def euclidean_norm(flat: Tensor) -> float:
    """Euclidean norm of [P] fp32 (inf or nan if any entry is), to 1e-7 of it.

    A single fp32 sum of 10^6 squares or more rounds late ones away: torch's own norm of an adapter's
    5 million gradients is 2e-5 off, of 30 million 2.5e-4. The blocks take as long.
    """
    # the remainder is shorter than a block and goes to fp64 directly
    whole = flat.numel() // BLOCK * BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, BLOCK), dim=1).double()
    return math.hypot(
        *(float(torch.linalg.vector_norm(part)) for part in (blocks, flat[whole:].double()))
    )


def nonzero_somewhere(flat: Tensor, sizes: Sequence[int]) -> list[bool]:
    """Of each of consecutive parts of a flat buffer the first value that is there, whether it is other than
    zero: True says that the part is, False nothing; all in one operation."""
    # of n sizes the sums before each; that of all of them is left over
    places = zip(accumulate(sizes, initial=0), sizes, strict=False)
    starts = torch.tensor([at for at, size in places if size], dtype=torch.int64)
    values = iter(flat[starts.to(flat.device)].ne(0).tolist())
    return [bool(size) and next(values) for size in sizes]


@dataclass(frozen=True)
class TensorStack:
    """Tensors of one ``shape`` in a flat buffer, the first at ``start``, each ``apart`` values behind the
    one before; ``members``: which they are of all those asked about."""

    members: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    apart: int

    def view(self, flat: Tensor) -> Tensor:
        """[n, *shape] of a flat buffer [P], the memory itself."""
        inner = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        offset = flat.storage_offset() + self.start
        return flat.as_strided((len(self.members), *self.shape), (self.apart, *inner), offset)


def stack_equal(shapes: Sequence[Sequence[int]], starts: Sequence[int]) -> list[TensorStack]:
    """Tensors of a flat buffer, by shape and where they lie, in as few stacks as their order allows: of layers
    that are alike one for each tensor of a layer."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for number, shape in enumerate(shapes):
        by_shape.setdefault(tuple(shape), []).append(number)
    stacks = list[TensorStack]()
    for shape, numbers in by_shape.items():
        at = [starts[number] for number in numbers]
        # the shortest period: every so many of them are equally far apart
        period = next(
            p
            for p in range(1, len(at) + 1)
            if len({after - before for before, after in zip(at, at[p:], strict=False)}) <= 1
        )
        for first in range(period):
            members = tuple(numbers[first::period])
            apart = starts[members[1]] - starts[members[0]] if len(members) > 1 else 0
            stacks.append(TensorStack(members, shape, starts[members[0]], apart))
    return stacks
