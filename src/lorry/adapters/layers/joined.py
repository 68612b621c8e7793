"""Matrices as one, side by side or one below the other, in the dtype of a product: a view where their
memory lies so, else a copy, in memory of an earlier one where it fits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def joined_rows(
    masters: Sequence[Tensor], dtype: torch.dtype, memory: Tensor | None = None
) -> Tensor:
    """[S,I], one below the other, in a dtype: a view where that is their own and they lie so; in
    ``memory`` if they fit there (`cast_values`)."""
    first, rows = masters[0].detach(), sum(m.shape[0] for m in masters)
    if dtype == first.dtype:
        if lie_at(masters, [m.numel() for m in masters]):
            return first.as_strided((rows, first.shape[1]), first.stride(), first.storage_offset())
        return torch.cat([m.detach() for m in masters])
    if memory is None or not _fits(memory, (rows, first.shape[1]), first.device, dtype):
        memory = first.new_empty((rows, first.shape[1]), dtype=dtype)
    # each into its place: joined first, they would be there once more in float32
    for part, master in zip(memory.split([m.shape[0] for m in masters]), masters, strict=True):
        part.copy_(master.detach())
    return memory


def cast_values(values: Tensor, dtype: torch.dtype, memory: Tensor | None) -> Tensor:
    """Values in a dtype: themselves where that is their own (then ``memory`` may be theirs, and stays
    as it is), else a copy, in ``memory`` if it fits there."""
    if values.dtype == dtype:
        return values
    if memory is None or not _fits(memory, values.shape, values.device, dtype):
        return values.to(dtype)
    return memory.copy_(values)


def _fits(memory: Tensor, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether such values can be written there."""
    # what inference mode made cannot be written outside of it
    writable = not memory.is_inference() or torch.is_inference_mode_enabled()
    alike = memory.shape == torch.Size(shape) and memory.dtype == dtype
    return writable and alike and memory.device == device


def joined_columns(masters: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """A view [O,S], one beside the other; None where they do not lie so, or in another dtype."""
    first = masters[0].detach()
    if dtype != first.dtype or not lie_at(masters, [m.shape[1] for m in masters]):
        return None
    columns = sum(m.shape[1] for m in masters)
    return first.as_strided((first.shape[0], columns), first.stride(), first.storage_offset())


def lie_at(masters: Sequence[Tensor], steps: Sequence[int]) -> bool:
    """Whether each begins so many values behind the one before, in the same memory."""
    first, at = masters[0], masters[0].storage_offset()
    for master, step in zip(masters, steps, strict=True):
        alike = master.stride() == first.stride() and master.device == first.device
        memory = master.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (alike and memory and master.storage_offset() == at):
            return False
        at += step
    return True
