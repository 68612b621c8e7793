"""Keys and values of sequences that a transformers model is generating, behind the face of the
decoder's own cache.

transformers' caches grow at the end for all rows alike, so prompts that were read together form a
group, padded on the left, with a cache of the model's own kind; groups of plain caches are joined
before they grow. B rows in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

from lorry.adapters.mix import AdapterContext, Mix
from lorry.models.causal_lm import CausalLM, PackedInput
from lorry.models.hf.frames import PaddedFrame


@dataclass
class _CacheGroup:
    """rows: which rows of the cache, in order; mask [b, L]: real tokens; state: transformers'
    cache.
    """

    rows: list[int]
    mask: Tensor
    state: Any


class HfCache:
    """``lengths`` [B] int64 counts each row's tokens, as in the decoder's cache; ``make`` gives an
    empty cache of the model's.
    """

    def __init__(self, rows: int, device: torch.device, make: Callable[[], Any]) -> None:
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._make = make
        self._groups: list[_CacheGroup] = []

    def add_rows(self, count: int, room: int) -> None:
        """Put ``count`` empty rows behind the others; they take memory with their prompts."""
        self.lengths = F.pad(self.lengths, (0, count))

    def extend(
        self, packed: PackedInput, rows: Tensor, *, decoding: bool
    ) -> Iterator[tuple[PaddedFrame, Tensor, Any]]:
        """The frames to run, each with the mask [b, L] over everything its rows hold by then, and
        the cache it extends.
        """
        device = packed.tokens.device
        if not decoding:
            starts = [start for start, _ in packed.segments]
            sequence_rows = rows[torch.tensor(starts, device=rows.device)].tolist()
            # a row that gets a new prompt leaves its old group
            self._narrow(
                {
                    row: row
                    for group in self._groups
                    for row in group.rows
                    if row not in sequence_rows
                }
            )
            counts = torch.tensor([stop - start for start, stop in packed.segments], device=device)
            self.lengths = self.lengths.index_copy(
                0, torch.tensor(sequence_rows, device=device), counts
            )
            # on the left: transformers appends at the end, which must be the newest token of all
            # rows
            frame = PaddedFrame(list(packed.segments), device, left=True)
            group = _CacheGroup(sequence_rows, frame.mask(), self._make())
            self._groups.append(group)
            yield frame, group.mask, group.state
            return
        self._groups = _join_groups(self._groups)
        self.lengths = self.lengths + 1
        token_of_row = {row: t for t, row in enumerate(rows.tolist())}
        for group in self._groups:
            frame = PaddedFrame(
                [(token_of_row[r], token_of_row[r] + 1) for r in group.rows], device
            )
            # the new token is real in every row
            group.mask = torch.cat([group.mask, group.mask.new_ones(len(group.rows), 1)], 1)
            yield frame, group.mask, group.state

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these; row ``rows[i]`` becomes row i."""
        kept_rows = (
            torch.nonzero(rows)[:, 0].tolist() if rows.dtype == torch.bool else rows.tolist()
        )
        new_index = {row: i for i, row in enumerate(kept_rows)}
        self._narrow(new_index)
        self.lengths = self.lengths[rows]

    def _narrow(self, new_index: dict[int, int]) -> None:
        """Keep the rows in ``new_index`` ({old row: new row}), under their new numbers."""
        for group in self._groups:
            indices = [i for i, row in enumerate(group.rows) if row in new_index]
            if len(indices) < len(group.rows):
                index = torch.tensor(indices, dtype=torch.int64, device=group.mask.device)
                group.mask = group.mask[index]
                if indices:
                    # transformers' own selection, for whatever its cache holds
                    group.state.batch_select_indices(index)
            group.rows = [new_index[group.rows[i]] for i in indices]
        self._groups = [group for group in self._groups if group.rows]


def _join_groups(groups: list[_CacheGroup]) -> list[_CacheGroup]:
    """One group of several, padded on the left to the longest, where every layer's cache is plain
    keys and values; else as it was (sliding windows and recurrent states cannot be shifted; such
    groups go on side by side).
    """
    # the exact class: a subclass (sliding window) has other rules of growth
    plain = all(type(layer) is DynamicLayer for group in groups for layer in group.state.layers)
    if len(groups) < 2 or not plain:
        return groups
    longest = max(group.mask.shape[1] for group in groups)
    pads = [longest - group.mask.shape[1] for group in groups]
    first = groups[0].state
    for i, layer in enumerate(first.layers):
        for part in ("keys", "values"):
            tensors = [getattr(group.state.layers[i], part) for group in groups]
            setattr(
                layer,
                part,
                # keys are [b, heads, L, D]: padded on L, in front, where the mask is 0
                torch.cat([F.pad(x, (0, 0, pad, 0)) for x, pad in zip(tensors, pads, strict=True)]),
            )
    mask = torch.cat([F.pad(group.mask, (pad, 0)) for group, pad in zip(groups, pads, strict=True)])
    return [_CacheGroup([row for group in groups for row in group.rows], mask, first)]


class RecomputeCache:
    """The tokens alone of B sequences being generated, for a model whose cache is missing or wrong:
    every step reads each sequence again from its start. ``lengths`` [B] int64 counts each row's
    tokens, as in the decoder's cache."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._tokens: list[list[int]] = [[] for _ in range(rows)]

    def add_rows(self, count: int, room: int) -> None:
        """Put ``count`` empty rows behind the others."""
        self.lengths = F.pad(self.lengths, (0, count))
        self._tokens += [[] for _ in range(count)]

    def extend(self, packed: PackedInput, rows: Tensor, *, decoding: bool) -> PackedInput:
        """Take whole prompts, or one more token for every row; returns all tokens of the rows that
        were named, in order.
        """
        sequence_rows = [int(rows[start]) for start, _ in packed.segments]
        for row, (start, stop) in zip(sequence_rows, packed.segments, strict=True):
            self._tokens[row] = [
                *(self._tokens[row] if decoding else ()),
                *packed.tokens[start:stop].tolist(),
            ]
        self.lengths = torch.tensor(
            [len(tokens) for tokens in self._tokens], device=self.lengths.device
        )
        # from position 0 again: the model sees plain whole sequences
        return PackedInput.of([self._tokens[row] for row in sequence_rows], packed.tokens.device)

    def hidden_of_newest(
        self,
        model: CausalLM,
        packed: PackedInput,
        rows: Tensor,
        call: AdapterContext,
        *,
        decoding: bool,
    ) -> Tensor:
        """`CausalLM.forward_cached` of a model that this is the cache of: whole sequences are run."""
        whole = self.extend(packed, rows, decoding=decoding)
        last = model.hidden(whole, repeat_context_per_token(call, whole) if decoding else call).last
        assert last is not None
        # only the newest token's state, as keys and values would give
        return last[[stop - 1 for _, stop in whole.segments]] if decoding else last

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these; row ``rows[i]`` becomes row i."""
        kept_rows = (
            torch.nonzero(rows)[:, 0].tolist() if rows.dtype == torch.bool else rows.tolist()
        )
        self._tokens = [self._tokens[row] for row in kept_rows]
        self.lengths = self.lengths[rows]


def repeat_context_per_token(call: AdapterContext, whole: PackedInput) -> AdapterContext:
    """The call of one token per sequence, for all tokens of those sequences. Generation's gates are
    constants.
    """
    starts = [start for start, _ in whole.segments] + [whole.tokens.numel()]
    terms = (
        term
        if term.rows is None
        else replace(term, rows=slice(starts[term.rows.start], starts[term.rows.stop]))
        for term in call.mix.terms
    )
    return replace(call, mix=Mix(tuple(terms), call.mix.router), noise=None)
