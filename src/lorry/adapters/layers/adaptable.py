"""What every layer of a bank shares: its path, its slots, which terms of a mix are here, and its base
weight without the adapters while merged.

Adapters are not parameters of the module (FSDP, state dicts and optimizers of the base never see
them): they are `AdapterSlot`s.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorry.adapters.layers.shares import is_sharded, local_share, whole_weight
from lorry.adapters.layers.slot import AdapterSlot
from lorry.adapters.mix import AMBIENT_CONTEXT, AdapterContext, MixTerm
from lorry.adapters.tensor_parallel.slices import DimensionSlice, LayerSlices
from lorry.errors import ConfigError, ContractError


class AdaptableLayer(nn.Module):
    """What linears and embeddings share: their path, their slots, and the base weight without
    the adapters while merged.
    """

    weight: nn.Parameter

    def __init__(self, path: str = "") -> None:
        super().__init__()
        self.path = path
        self.slots: dict[str, AdapterSlot] = {}
        self.default = AdapterContext()
        # adapters that belong to the frozen base (`AdapterBank.move_to_base`): under every mix
        self.base_terms: tuple[MixTerm, ...] = ()
        self.unmerged_weight: nn.Parameter | None = None
        # of a layer whose matrix is cut over ranks (tensor parallel)
        self.slices: LayerSlices | None = None
        # layers of another library that hold its base weight, and multiply it themselves
        self.holders: tuple[nn.Module, ...] = ()
        # the foreign layer this one stands in for, so that `detach` puts the very object back;
        # a tuple, so that it is no submodule
        self.replaced: tuple[nn.Module, ...] = ()
        # the squared norms of the weight's rows, and of what they were made (`variants.magnitude`)
        self.row_squares: tuple[object, Tensor] | None = None

    @property
    def in_features(self) -> int:
        raise AssertionError("every bank layer defines its own width")

    @property
    def out_features(self) -> int:
        raise AssertionError("every bank layer defines its own width")

    def matrix(self) -> Tensor:
        """W [O,I] of the base, as it is multiplied; it may be the memory of the next that is asked for."""
        raise ConfigError(
            f"{self.path}: use_dora is for linears and embeddings, and this is neither; leave it out with "
            "exclude_modules, or train a plain LoRA (use_dora=false)"
        )

    def check_matrix(self) -> None:
        """Raise what `matrix` raises, without opening it."""
        self.matrix()

    @property
    def num_experts(self) -> int:
        """How many matrices its weight holds, each of which has a rank of its own in A and B: PEFT's
        layout A [E r, in], B [out, r E] of fused experts."""
        return 1

    def stored_slice(self) -> tuple[int, DimensionSlice]:
        """Along which dimension the weight of a layer that ranks share is cut as it lies in memory, and
        how."""
        raise AssertionError("every layer that ranks can share says how it is cut")

    def whole_table(self) -> Tensor:
        """[V, D]: all of an embedding's or a head's weight; where it is cut over ranks all of them come here
        together."""
        here = whole_weight(self.weight)
        if self.slices is None:
            return here
        return self.stored_slice()[1].gather(here.t(), self.slices.ranks).t()

    def count_tokens(self, x: Tensor, *others: object) -> int:
        """How many tokens its forward is called with, from the arguments of that."""
        # token ids (an embedding's input) have no width
        return x.numel() // (x.shape[-1] if x.is_floating_point() else 1)

    def whole_features(self) -> tuple[int, int]:
        """(out, in) features on one device, of which this rank may have a part."""
        local, cut = (self.out_features, self.in_features), self.slices
        if cut is None:
            return local
        parts = zip((cut.rows, cut.columns), local, strict=True)
        out, into = (size if part is None else part.whole for part, size in parts)
        return out, into

    def use_merged_weight(self, merged: nn.Parameter) -> None:
        """Compute with a merged weight and keep the unmerged one, where no state dict, optimizer or FSDP
        sees it. Of a weight that FSDP2 has sharded, ``merged`` and what is kept are this rank's
        share.
        """
        # past nn.Module.__setattr__, which would register it as a second parameter
        if is_sharded(self.weight):
            # FSDP2 gathers this very parameter: its memory is written, the object stays
            share = local_share(self.weight)
            kept = nn.Parameter(share.clone(), requires_grad=False)
            self.__dict__["unmerged_weight"] = kept
            share.copy_(merged)
            return
        self.__dict__["unmerged_weight"], self.weight = self.weight, merged

    def restore_weight(self) -> None:
        """Put the unmerged weight back: the same object, so what was tied is tied again; of a
        sharded one the same values.
        """
        assert self.unmerged_weight is not None
        if is_sharded(self.weight):
            with torch.no_grad():
                local_share(self.weight).copy_(self.unmerged_weight)
        else:
            self.weight = self.unmerged_weight
        self.__dict__["unmerged_weight"] = None

    def resolve(self, call: AdapterContext | None) -> AdapterContext:
        """The context of this forward pass: the argument, the one set around a foreign model, or
        what the bank made active.
        """
        # the nearest wins: an explicit argument, then the block of code around it, then the model
        return call or AMBIENT_CONTEXT.get() or self.default

    def terms(self, call: AdapterContext) -> list[tuple[AdapterSlot, slice | None, float | Tensor]]:
        """The terms that have a slot at this module: those of the frozen base, then the call's.
        Raises ContractError on a merged layer, whose weight holds what was active when it was, and for
        an adapter that waits for tokens which nobody has looked for."""
        here = [(self.slots[t.adapter], t) for t in call.mix.terms if t.adapter in self.slots]
        if any(slot.waits and not t.invoked for slot, t in here):
            raise ContractError(
                f"{self.path}: an adapter that tokens invoke (alora_invocation_tokens) is active, and "
                "this way of running the model has not looked for them; call the model itself, or "
                "lorry.generate"
            )
        terms = [(slot, t.rows, t.gate) for slot, t in here]
        if self.unmerged_weight is not None:
            if terms:
                raise ContractError(
                    f"{self.path} is merged; call unmerge(model) before using its adapters again"
                )
            return []
        return [(self.slots[t.adapter], t.rows, t.gate) for t in self.base_terms] + terms

    def refuse_mixed_magnitude(self, call: AdapterContext, term: MixTerm) -> None:
        """Raises ContractError unless ``term``, of a DoRA adapter with a slot here, is alone with the base
        in its rows, with g = 1: what else it should be, nobody has said."""
        if isinstance(term.gate, Tensor) or term.route is not None or term.gate != 1:
            raise ContractError(
                f"{self.path}: the adapter {term.adapter!r} is a DoRA, whose weight in a mix is 0 or 1; give "
                "it 1, or train a plain LoRA (use_dora=false) to weigh, route or negate"
            )
        beside = [
            each.adapter
            for each in call.mix.terms
            if each is not term and each.adapter in self.slots and _share_rows(each.rows, term.rows)
        ]
        if beside:
            raise ContractError(
                f"{self.path}: the adapter {term.adapter!r} is a DoRA, and {beside[0]!r} is active beside "
                "it; what both together are is not defined: use one at a time"
            )

    def base_stamp(self) -> tuple[object, ...]:
        """Changes whenever the base here may have."""
        tensors = (self.weight, getattr(self, "bias", None))
        memory = (value for t in tensors if t is not None for value in (t.data_ptr(), t._version))
        return *memory, self.base_terms


def _share_rows(one: slice | None, other: slice | None) -> bool:
    """Whether two terms are for a token in common; None: for all."""
    if one is None or other is None:
        return True
    return bool(one.start < other.stop and other.start < one.stop)
