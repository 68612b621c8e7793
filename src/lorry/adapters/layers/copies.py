"""The compute copies of the adapters at linears with one input: their A's stacked, each linear's share
of them, in the dtype of the product, remade where a master has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.joined import cast_values, joined_columns, joined_rows
from lorry.adapters.layers.slot import AdapterSlot, StackEntry, master_versions
from lorry.adapters.layers.stacks import AdapterShare, ComputeCopies, SlotBias, SlotShare
from lorry.adapters.variants.magnitude import output_scale

# (the linear's and the term's number, the slot of that term's adapter at that linear)
PlacedSlot = tuple[int, int, AdapterSlot]


def compute_copies(
    linears: Sequence[AdaptableLayer],
    slots: Sequence[PlacedSlot],
    dtype: torch.dtype,
    constants: Sequence[float],
    columns: Sequence[int] | None,
) -> ComputeCopies:
    """The stacked A's, each linear's share, and who has what of it, remade where a master has
    changed: in the same memory unless a graph still reads it, since new copies at every step would
    lie between the activations of one. ``slots``: linear by linear; ``constants``: of each
    term."""
    several = columns is not None or len(constants) > 1
    # dtype and place in the group as well as the masters: a base cast to another dtype needs
    # new copies
    stamp = (
        dtype,
        several and (tuple(constants), columns and tuple(columns)),
        slots[0][2].magnitude is not None and tuple(linears[i].base_stamp() for i, _, _ in slots),
        *(value for i, _, slot in slots for value in (i, *slot.stamp())),
    )
    cache, key = slots[0][2].stacks, (several, *(slot.slot_id for _, _, slot in slots))
    entry = cache.get(key)
    if entry is None or entry.stamp != stamp:
        memory = None if entry is None else entry.memory()
        if memory is not None and not several and _written_again(slots, dtype, memory):
            copies = memory
        elif several:
            copies = _copies_of_several(slots, dtype, constants, columns, memory)
        else:
            copies = _copies_of_one(linears, slots, dtype, memory)
        if dtype == slots[0][2].A.dtype:
            versions = master_versions([slot for _, _, slot in slots], copies.storages())
            copies = replace(copies, masters=versions)
        cache[key] = entry = StackEntry(stamp, copies)
    copies = entry.hand_out()
    if any(slot.bias is not None for _, _, slot in slots):
        copies = replace(copies, biases=_slot_biases(slots, dtype, constants, columns))
    if several or constants[0] == 1.0:
        return copies
    parts = [replace(p, scale=p.scale * constants[0]) for p in copies.parts]
    return replace(copies, parts=parts)


def _copies_of_one(
    linears: Sequence[AdaptableLayer],
    slots: Sequence[PlacedSlot],
    dtype: torch.dtype,
    memory: ComputeCopies | None,
) -> ComputeCopies:
    """Of one adapter without gates: its scale, and a constant, multiply the product. ``memory``: of
    earlier copies, which may be written."""
    factors = [slot.factors() for _, _, slot in slots]
    first, place = slots[0][2], None
    places: Sequence[Tensor | None] = [None] * len(slots)
    if memory is not None:
        place, places = memory.lora_A, [part.lora_B for part in memory.parts]
    elif first.copy_memory is not None and dtype != first.A.dtype and first.initial is None:
        place, places = first.copy_memory.take([slot for _, _, slot in slots], dtype)
    a = joined_rows([a for a, _ in factors], dtype, place)
    parts, at = [], 0
    for j, ((i, _, slot), (own, b)) in enumerate(zip(slots, factors, strict=True)):
        rows = slice(at, at + own.shape[0])
        trained = None if slot.initial is None else slice(at, at + slot.A.shape[0])
        scale = None if slot.magnitude is None else output_scale(linears[i], slot)
        b = cast_values(b, dtype, places[j])
        parts.append(AdapterShare(i, rows, b, slot.scale, trained, scale))
        at = rows.stop
    return ComputeCopies(a, parts)


@torch.no_grad()
def _written_again(slots: Sequence[PlacedSlot], dtype: torch.dtype, memory: ComputeCopies) -> bool:
    """Write the masters over the copies that `_copies_of_one` has made of them earlier, where they are no more
    than that: in a training step this is done for every group."""
    own = [slot for _, _, slot in slots]
    if any(s.magnitude is not None or s.initial is not None or s.E is not None for s in own):
        return False
    # nor with another scale, place or rank, all of which the shares hold
    held = [
        (part.layer, part.scale, part.rows.stop - part.rows.start, part.lora_B.shape)
        for part in memory.parts
    ]
    if held != [(i, slot.scale, len(slot.A), slot.B.shape) for i, _, slot in slots]:
        return False
    into = [memory.lora_A, *(part.lora_B for part in memory.parts)]
    device = own[0].A.device
    if own[0].A.dtype == dtype or any(
        to.dtype != dtype or to.device != device or to.is_inference() for to in into
    ):
        return False
    rows = [memory.lora_A] if len(own) == 1 else memory.lora_A.split([len(s.A) for s in own])
    masters: list[Tensor] = [*(slot.A for slot in own), *(slot.B for slot in own)]
    torch._foreach_copy_([*rows, *into[1:]], masters)
    return True


def _copies_of_several(
    slots: Sequence[PlacedSlot],
    dtype: torch.dtype,
    constants: Sequence[float],
    columns_of_slots: Sequence[int] | None,
    memory: ComputeCopies | None,
) -> ComputeCopies:
    """Of several, or of one with gates; ``memory`` as above. In the masters' own dtype they are views
    where masters lie side by side (`routing.stacking.stack_masters`), and scales and constants the
    part's, or `rank_scales` where they differ; elsewhere they are in the copies of the B's."""
    factors = {id(slot): slot.factors() for _, _, slot in slots}
    a = joined_rows(
        [factors[id(slot)][0] for _, _, slot in slots],
        dtype,
        None if memory is None else memory.lora_A,
    )
    by_linear = {i: [entry for entry in slots if entry[0] == i] for i, _, _ in slots}
    views = [
        joined_columns([factors[id(slot)][1] for _, _, slot in own], dtype)
        for own in by_linear.values()
    ]
    scales = [slot.scale * constants[k] for _, k, slot in slots]
    lie_together = all(view is not None for view in views)
    # one scale for all is free: the product's own factor
    common = scales[0] if lie_together and len(set(scales)) == 1 else 1.0
    by_rank = lie_together and len(set(scales)) > 1
    parts, shares, at = list[AdapterShare](), list[SlotShare](), 0
    for (i, own), view in zip(by_linear.items(), views, strict=True):
        start, ups = at, []
        for _, _, slot in own:
            # those that are taken off lie behind, and have no gradient
            rows, scale = slice(at, at + slot.A.shape[0]), scales[len(shares)]
            columns = slice(rows.start - start, rows.stop - start)
            shares.append(SlotShare(len(parts), rows, columns, 1.0 if by_rank else scale))
            ups.append((factors[id(slot)][1], scale))
            at += factors[id(slot)][0].shape[0]
        b = (
            view
            if lie_together and view is not None
            else cast_values(
                torch.cat([up * scale for up, scale in ups], 1),
                dtype,
                None if memory is None else memory.parts[len(parts)].lora_B,
            )
        )
        parts.append(AdapterShare(i, slice(start, at), b, common))
    ranks = torch.tensor([factors[id(slot)][0].shape[0] for _, _, slot in slots])
    wanted = rank_scales = None
    if columns_of_slots is not None:
        wanted = torch.tensor(columns_of_slots).repeat_interleave(ranks).to(a.device)
    if by_rank:
        rank_scales = torch.tensor(scales, dtype=dtype).repeat_interleave(ranks).to(a.device)
    return ComputeCopies(a, parts, shares, wanted, rank_scales)


def _slot_biases(
    slots: Sequence[PlacedSlot],
    dtype: torch.dtype,
    constants: Sequence[float],
    columns: Sequence[int] | None,
) -> list[SlotBias]:
    """Of those of the slots that have one, in their order; as `compute_copies` has them."""
    biases = list[SlotBias]()
    for j, (i, k, slot) in enumerate(slots):
        if slot.bias is not None:
            scale = slot.scale * constants[k]
            values = (slot.bias.detach() * scale).to(dtype)
            biases.append(SlotBias(i, values, scale, None if columns is None else columns[j]))
    return biases
