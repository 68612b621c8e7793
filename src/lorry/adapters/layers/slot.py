"""An adapter at one module: its fp32 masters, and where compute copies of them are kept."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import torch
from torch import Tensor, nn

from lorry.adapters.layers.joined import lie_at
from lorry.adapters.layers.stacks import ComputeCopies, MasterVersion
from lorry.adapters.tensor_parallel.slices import LayerSlices, Side


class CopiesInUse:
    """Lives as long as anybody, a graph for one, holds the compute copies that were handed out with it."""


@dataclass(slots=True)
class StackEntry:
    """Compute copies, and of what they were made (``stamp``)."""

    stamp: tuple[object, ...]
    copies: ComputeCopies
    in_use: weakref.ref[CopiesInUse] | None = None

    def hand_out(self) -> ComputeCopies:
        """The copies, marked as in use for as long as what this returns lives."""
        mark = None if self.in_use is None else self.in_use()
        if mark is None:
            mark = CopiesInUse()
            self.in_use = weakref.ref(mark)
        return replace(self.copies, in_use=mark)

    def memory(self) -> ComputeCopies | None:
        """The copies whose memory may be written, since nobody reads them any more."""
        return None if self.in_use is not None and self.in_use() is not None else self.copies


class CopyMemory:
    """Where compute copies of an adapter's masters are written: one piece, laid out as the masters are.

    Made layer by layer they would lie between the activations of the pass that first asks for them, and
    the next job's, of another rank, would not fit into the holes. ``size``: of the A's and B's together.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.pieces: dict[torch.dtype, Tensor] = {}
        self.storage = 0  # where the masters were when the first place was taken
        # (slot_id, dtype): a place has one user, or a second would write what the first one's graph reads
        self.taken = set[tuple[int, torch.dtype]]()

    def __reduce__(self) -> tuple[type[CopyMemory], tuple[int]]:
        """Of a copied or pickled model: empty, for masters that lie elsewhere."""
        return CopyMemory, (self.size,)

    def take(
        self, slots: Sequence[AdapterSlot], dtype: torch.dtype
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Places [S,I] of the stacked A's and [O,R] of each B; None where there is none, or it is taken."""
        nothing: tuple[None, list[Tensor | None]] = (None, [None] * len(slots))
        keys = {(slot.slot_id, dtype) for slot in slots}
        masters = [m for slot in slots for m in (slot.A, slot.B)]
        self.storage = self.storage or masters[0].untyped_storage().data_ptr()
        # those that were moved are not laid out so
        in_place = all(
            m.is_contiguous()
            and m.storage_offset() + m.numel() <= self.size
            and m.untyped_storage().data_ptr() == self.storage
            for m in masters
        )
        if keys & self.taken or not in_place:
            return nothing
        if not lie_at([slot.A for slot in slots], [slot.A.numel() for slot in slots]):
            return nothing
        self.taken |= keys
        first = slots[0].A
        if dtype not in self.pieces or self.pieces[dtype].device != first.device:
            self.pieces[dtype] = torch.empty(self.size, dtype=dtype, device=first.device)
        piece, rows = self.pieces[dtype], sum(slot.A.shape[0] for slot in slots)
        b = [piece.as_strided(s.B.shape, s.B.stride(), s.B.storage_offset()) for s in slots]
        return piece.as_strided((rows, first.shape[1]), first.stride(), first.storage_offset()), [
            *b
        ]


@dataclass
class AdapterSlot:
    """One adapter at one module: fp32 masters A [R,I], B [O,R] (views of the adapter's flat
    buffer), scale and dropout; ``slices``: how the module, and with it one of the two, is cut over
    ranks; ``magnitude`` [O]: of a DoRA adapter; ``bias`` [O]: beside B (`lora_bias`).

    `copies.compute_copies` makes the compute copies from them. ``initial``: frozen A0 [R,I] and B0 [O,R], whose
    scaled product is taken off (an initialisation at which the adapter is not zero).
    """

    module: str
    A: nn.Parameter
    B: nn.Parameter
    scale: float
    dropout: float
    slices: LayerSlices | None = None
    initial: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    magnitude: nn.Parameter | None = None
    bias: nn.Parameter | None = None
    # whether it waits for tokens that invoke it (`variants.alora`)
    waits: bool = False
    # AdaLoRA's factor of each rank [R,1]
    E: nn.Parameter | None = field(default=None, repr=False)
    # the flat buffers that the masters are views of, whose version counters are others than theirs
    buffers: tuple[Tensor, ...] = field(default=(), repr=False)
    # Version counters miss writes through .data and by fused optimizers; `touch` counts those.
    write_count: int = field(default=0, repr=False)  # how often `touch` was called
    # whether nobody writes the masters without a `touch` for now (`Adapter.held_still`)
    still: bool = field(default=False, repr=False)
    # no two slots of a process share one
    slot_id: int = field(default_factory=count().__next__, repr=False)
    # of an embedding with a magnitude: the norms it divides by, and of what they were made
    norm: tuple[object, Tensor] | None = field(default=None, repr=False)
    # of the groups whose first slot this is
    stacks: dict[tuple[int, ...], StackEntry] = field(default_factory=dict, repr=False)
    # one for all linears of an adapter; None: each copy has memory of its own
    copy_memory: CopyMemory | None = field(default=None, repr=False)

    def stamp(self) -> tuple[int, ...]:
        """Changes whenever a master may have changed."""
        # data_ptr too: `AdapterBank.to` gives the masters other memory without a write
        stamp = (self.write_count, self.A._version, self.B._version, self.A.data_ptr())
        others = [one for one in (self.magnitude, self.bias, self.E) if one is not None]
        return (*stamp, *(one._version for one in (*self.buffers, *others)))

    def __getstate__(self) -> dict[str, object]:
        """Of a copied or pickled slot: its copies are yet to be made, from masters that lie elsewhere."""
        return {**self.__dict__, "stacks": {}, "norm": None, "buffers": ()}

    @property
    def lora_A(self) -> Tensor:
        """What x is multiplied with, [R,I]: A, times E where there is one; autograd follows it."""
        return self.A if self.E is None else self.A * self.E

    def touch(self) -> None:
        """Say that a master has changed, or is about to."""
        self.write_count += 1

    def factors(self) -> tuple[Tensor, Tensor]:
        """lora_A [R',I] and lora_B [O,R'] whose scaled product is all that the adapter adds here,
        fp32: the masters, or behind them what is taken off, R' = 2R."""
        with torch.no_grad():
            a, b = self.lora_A.detach(), self.B.detach()
        if self.initial is None:
            return a, b
        a0, b0 = self.initial
        return torch.cat([a, a0]), torch.cat([b, -b0], dim=1)

    def whole_shape(self, side: Side) -> list[int]:
        """Of a master as one device has it."""
        shape = (self.A if side == "A" else self.B).shape
        return list(shape) if self.slices is None else self.slices.whole_shape(side, shape)

    @torch.no_grad()
    def copy_whole(self, side: Side, values: Tensor) -> None:
        """Give a master these values, or, where ranks share the module, its part of them."""
        master = self.A if side == "A" else self.B
        master.copy_(values if self.slices is None else self.slices.cut(side, values))


def master_versions(slots: Sequence[AdapterSlot], storages: Collection[int]) -> list[MasterVersion]:
    """Of the A's and B's of the slots that lie in one of the ``storages`` (addresses), and of the buffers
    that these lie in, each once."""
    read = {
        id(values): MasterVersion(slot.module, values, values._version)
        for slot in slots
        for values in (slot.A, slot.B, *slot.buffers)
        if values.untyped_storage().data_ptr() in storages
    }
    return list(read.values())


def touch_slots(slots: Sequence[AdapterSlot]) -> None:
    """`AdapterSlot.touch` of those that are not held still."""
    for slot in slots:
        if not slot.still:
            slot.touch()
