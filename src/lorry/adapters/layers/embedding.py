"""An embedding that keeps its base weight under its own name, with low-rank terms."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.slot import AdapterSlot, touch_slots
from lorry.adapters.mix import AdapterContext
from lorry.adapters.tensor_parallel.ranks import CopyToRanks, ReduceFromRanks
from lorry.adapters.tensor_parallel.slices import DimensionSlice
from lorry.adapters.variants.magnitude import MagnitudeFunction, weight_norm
from lorry.adapters.variants.own_weights import under, with_own_rows
from lorry.errors import ContractError


class BankEmbedding(AdaptableLayer):
    """An embedding [V, D] with low-rank terms. As PEFT has it, A [R, V] starts at zero and B [D, R]
    at random. ``embed_scale``: what everything is times, as some models have it; a tensor is a buffer that no
    checkpoint has.
    """

    def __init__(
        self, weight: nn.Parameter, *, path: str = "", embed_scale: Tensor | float | None = None
    ) -> None:
        super().__init__(path)
        self.weight = weight
        if isinstance(embed_scale, Tensor):
            self.register_buffer("embed_scale", embed_scale, persistent=False)
        else:
            self.embed_scale = embed_scale

    def matrix(self) -> Tensor:
        """The table's transpose."""
        return self.weight.t()

    @property
    def in_features(self) -> int:
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        return self.weight.shape[1]

    def stored_slice(self) -> tuple[int, DimensionSlice]:
        assert self.slices is not None
        assert self.slices.columns is not None
        return 0, self.slices.columns  # [V, D]: what its ids choose from

    def forward(self, ids: Tensor, call: AdapterContext | None = None) -> Tensor:
        """ids [...] int64 -> [..., D]. Dropout does not apply to an embedding's input."""
        call = self.resolve(call)
        if (own := under(self, call)) is not self:
            return with_own_rows(own, ids, own.forward(ids, call))
        # the lookup of a frozen base comes first: without terms it is all there is
        terms = self.terms(call)
        y = self._look_up(ids, self.weight)
        if not terms:
            return self._times_constant(self._sum_over_ranks(y))
        if any(t.adapter in self.slots and t.route is not None for t in call.mix.terms):
            raise ContractError(
                f"{self.path}: a layer router cannot gate an adapter on an embedding"
            )
        flat, flat_ids = y.reshape(-1, y.shape[-1]).float(), ids.reshape(-1)
        for slot, rows, gate in terms:
            tokens = slice(None) if rows is None else rows
            # A's columns are looked up, never multiplied with a one-hot [T, V]; masters in fp32, no
            # copies
            low = self._look_up(flat_ids[tokens], slot.A.t()) @ slot.B.t() * slot.scale
            if isinstance(gate, Tensor):
                # the gate is every rank's, and its gradient has a part from each
                cut = self.slices
                gate = gate if cut is None else CopyToRanks.apply(gate, cut.ranks)
                gate = gate[:, None]
            low = low * gate
            # padded with zeros and added out of place, so that autograd follows it
            before, after = (0, 0) if rows is None else (rows.start, flat.shape[0] - rows.stop)
            flat = flat + F.pad(low, (0, 0, before, after))
        flat = self._times_constant(self._scale(self._sum_over_ranks(flat), call))
        return flat.to(y.dtype).view_as(y)

    def _scale(self, flat: Tensor, call: AdapterContext) -> Tensor:
        """flat [T,D], behind the sum over ranks, with the magnitudes of the call's DoRA terms."""
        for term in call.mix.terms:
            slot = self.slots.get(term.adapter)
            if slot is None or slot.magnitude is None:
                continue
            self.refuse_mixed_magnitude(call, term)
            stamp = (slot.stamp(), self.base_stamp())
            if slot.norm is None or slot.norm[0] != stamp:
                slot.norm = (stamp, weight_norm(self, slot))
            start, stop, _ = (term.rows or slice(None)).indices(flat.shape[0])
            stale = partial(touch_slots, [slot])
            scaled = MagnitudeFunction.apply(flat[start:stop], slot.magnitude, slot.norm[1], stale)
            flat = torch.cat([flat[:start], scaled, flat[stop:]])
        return flat

    def _times_constant(self, y: Tensor) -> Tensor:
        scale = self.embed_scale
        if scale is None:
            return y
        # in the weight's dtype, as those models round it
        return y * (scale.to(self.weight.dtype) if isinstance(scale, Tensor) else scale)

    def _look_up(self, ids: Tensor, table: Tensor) -> Tensor:
        """The rows of a table [V, ...] at ids; where other ranks have some of them, zeros for theirs."""
        part = None if self.slices is None else self.slices.columns
        if part is None:
            return F.embedding(ids, table)
        at = ids - part.offset
        elsewhere = (at < 0) | (at >= part.size)
        return F.embedding(at.masked_fill(elsewhere, 0), table).masked_fill(elsewhere[..., None], 0)

    def _sum_over_ranks(self, y: Tensor) -> Tensor:
        if self.slices is None:
            return y
        total: Tensor = ReduceFromRanks.apply(y, self.slices.ranks)
        return total

    def delta(self, slot: AdapterSlot) -> Tensor:
        """(s B A)^T in fp32, [V, D] like the weight."""
        return (slot.B.detach() @ slot.A.detach()).mul_(slot.scale).t()
