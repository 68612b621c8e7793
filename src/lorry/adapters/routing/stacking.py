"""The masters of frozen experts, side by side in one buffer: in float32 the stacks that a mixture
computes with are views of it, and hold nothing of their own.

    stack_masters(model, mix)

A group of linears with one input reads every expert's A as one matrix [S, I], and each linear's B's
as one [O, S] (`layers.LinearGroup`). Adapters have a buffer each, so that an optimizer steps one
tensor; frozen ones need none, and are moved to where the group reads them. At `level: expert` a
layer's MLP is asked for each expert by itself, whose A's lie below each other then. In another dtype
the group has copies, which are of that dtype; and so has, of A, a linear that is read the other way
(an expert alone at `level: delta`, by its name).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lorry.adapters.adapter import Adapter
from lorry.adapters.attach import get_bank
from lorry.adapters.layers.linear import BankLinear, LinearGroup
from lorry.adapters.layers.slot import AdapterSlot
from lorry.adapters.mix import Mix, mixes_mlps


@torch.no_grad()
def stack_masters(model: nn.Module, mix: Mix) -> None:
    """Move the masters of a mix's adapters, all frozen, into one buffer, in the order in which it
    reads them; `Adapter.values` is gone from then on. If any trains, or was moved already, all stay
    where they are. No value changes."""
    bank = get_bank(model)
    adapters = [bank[term.adapter] for term in mix.terms]
    if any(one.buffer is None or one.further or one.wanting_gradients() for one in adapters):
        return
    if any(one.initial is not None for one in adapters):  # what they add is in two places
        return
    buffers = [one.values for one in adapters]
    size, device = sum(buffer.numel() for buffer in buffers), buffers[0].device
    memory = torch.empty(size, dtype=torch.float32, device=device)
    rest = memory
    for dim, masters in _stacks(model, adapters, whole_mlps=mixes_mlps(mix.router)):
        joined = torch.cat([master.data for master in masters], dim)
        taken, rest = rest[: joined.numel()].view(joined.shape), rest[joined.numel() :]
        taken.copy_(joined)
        views = taken.split([master.shape[dim] for master in masters], dim)
        for master, view in zip(masters, views, strict=True):
            master.data = view
    assert not rest.numel()
    for one in adapters:
        one.buffer = None
        one.touch()
        for slot in one.slots.values():
            slot.stacks.clear()  # copies of what has moved
            slot.copy_memory, slot.buffers = None, ()


def _stacks(
    model: nn.Module, adapters: Sequence[Adapter], *, whole_mlps: bool
) -> Iterator[tuple[int, list[nn.Parameter]]]:
    """(0, A's that lie below each other) and (1, B's that lie beside each other), each once."""
    blocks: Sequence[Any] = getattr(model, "blocks", ())
    groups: list[LinearGroup] = [group for block in blocks for group in block.linears]
    mlps = [group for block in blocks for group in (block.linears.mlp_in, block.linears.mlp_out)]
    in_group = {linear.path for group in groups for linear in group.linears}
    modules = get_bank(model).modules
    alone = {path: module for path, module in modules.items() if path not in in_group}
    groups += [module.group for module in alone.values() if isinstance(module, BankLinear)]
    for group in groups:
        # of whole MLPs each expert is a reader of its own
        by_itself = whole_mlps and any(group is mlp for mlp in mlps)
        for readers in [[one] for one in adapters] if by_itself else [adapters]:
            by_linear = [_slots_at(linear.path, readers) for linear in group.linears]
            # `LinearGroup` reads A linear by linear, in each expert by expert
            if together := [slot.A for slots in by_linear for slot in slots]:
                yield 0, together
            for slots in filter(None, by_linear):
                yield 1, [slot.B for slot in slots]
    for path, module in alone.items():
        if not isinstance(module, BankLinear):  # an embedding, which reads each by itself
            for slot in _slots_at(path, adapters):
                yield 0, [slot.A]
                yield 1, [slot.B]


def _slots_at(path: str, adapters: Sequence[Adapter]) -> list[AdapterSlot]:
    return [one.slots[path] for one in adapters if path in one.slots]
