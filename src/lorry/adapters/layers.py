"""The layers a bank lives in: a linear and an embedding that keep their base weight under its own
name.

`BankLinear` is the only linear of Lorry's own decoder and takes the place of `nn.Linear` or
`Conv1D` in any other model. Adapters are not parameters of the module (FSDP, state dicts and
optimizers of the base never see them): they are `AdapterSlot`s.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.mix import AdapterContext, LinearRouter, MixTerm
from lorry.adapters.product import (
    AdapterShare,
    CastLinear,
    ComputeCopies,
    DenseLinear,
    FrozenLinear,
    Linears,
    LowRankFunction,
    PartParams,
    SlotBias,
    SlotShare,
    StackedAdapters,
    TermParams,
)
from lorry.adapters.tensor_parallel.ranks import CopyToRanks, ReduceFromRanks
from lorry.adapters.tensor_parallel.slices import (
    DimensionSlice,
    LayerSlices,
    Side,
    gather_inputs,
)
from lorry.adapters.variants.magnitude import (
    MagnitudeFunction,
    MatrixProduct,
    output_scale,
    weight_norm,
)
from lorry.adapters.variants.own_weights import OwnTensor, under, with_own_rows
from lorry.errors import ConfigError, ContractError

# Other people's models cannot pass an AdapterContext down; `models/hf/model.py` sets it around their forward.
# It is read in forward only.
AMBIENT_CONTEXT: ContextVar[AdapterContext | None] = ContextVar("lorry_call", default=None)


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

    def __reduce__(self) -> tuple[type[StackEntry], tuple[object, ...]]:
        """Of a copied or pickled model: no graph reads its copies, and a weak reference has no pickle."""
        return StackEntry, (self.stamp, self.copies)


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
        if not _lie_at([slot.A for slot in slots], [slot.A.numel() for slot in slots]):
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

    `LinearGroup` makes the compute copies from them. ``initial``: frozen A0 [R,I] and B0 [O,R], whose
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
        return (*stamp, *(one._version for one in others)) if others else stamp

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


def is_sharded(weight: Tensor) -> bool:
    """Whether a weight is a DTensor, of which a rank holds a share."""
    return hasattr(weight, "to_local")


def local_share(weight: Tensor) -> Tensor:
    """This rank's share of a sharded weight, the memory itself; any other weight as it is."""
    return weight.detach().to_local() if is_sharded(weight) else weight.detach()  # type: ignore[attr-defined]


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

    @property
    def num_experts(self) -> int:
        """How many matrices its weight holds, each of which has a rank of its own in A and B: PEFT's
        layout A [E r, in], B [out, r E] of fused experts."""
        return 1

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


class BankLinear(AdaptableLayer):
    """y = W x + b + the bank's terms. weight [out, in], or [in, out] when ``transposed`` (GPT-2's
    Conv1D).
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        transposed: bool = False,
        path: str = "",
    ) -> None:
        super().__init__(path)
        self.weight = weight
        self.register_parameter("bias", bias)
        self.transposed = transposed
        # on its own it is a group of one; decoder layers make groups of the linears with one input
        self.group = LinearGroup([self])
        self.product: FrozenLinear | None = None

    def use_product(self, product: FrozenLinear) -> None:
        """Compute with ``product`` in place of weight and bias, which nothing reads from then on
        and which no longer train. Raises ContractError on a merged layer or another shape."""
        if self.unmerged_weight is not None:
            raise ContractError(
                f"{self.path} is merged; call unmerge(model) before changing its product"
            )
        if product.shape != (self.out_features, self.in_features):
            expected = (self.out_features, self.in_features)
            raise ContractError(
                f"{self.path} is {expected} features (out, in), its new product {product.shape}"
            )
        # nothing reads them from now on: an optimizer that held them would decay unused weights
        for param in self.parameters(recurse=False):
            param.requires_grad_(False)
        self.product = product

    def base_product(self) -> FrozenLinear:
        """The base product, as it is now (a merge or a device may have changed it)."""
        if self.product is not None:
            return self.product
        return DenseLinear(self.weight, self.added_bias(), self.transposed)

    def base_matrix(self) -> Tensor:
        """[O,I] fp32: the matrix that the base product multiplies, opened where it is packed. Raises
        ConfigError where the product has none."""
        if self.product is None:
            weight = self.weight.detach()
            return (weight.t() if self.transposed else weight).float()
        opened = getattr(self.product, "open", None)
        if opened is None:
            raise ConfigError(f"{self.path} has a custom product, of which no matrix is known")
        matrix: Tensor = opened(torch.float32)
        return matrix

    def matrix(self) -> Tensor:
        """As `AdaptableLayer.matrix`. Raises ConfigError where another layer multiplies it."""
        product = self.base_product()
        if not isinstance(product, MatrixProduct):
            raise ConfigError(
                f"{self.path}: use_dora needs the base's matrix, and the product of this linear does not "
                "show it; train a plain LoRA (use_dora=false)"
            )
        return product.matrix()

    def added_bias(self) -> Tensor | None:
        """The bias that this process adds: of a sum over ranks one of them alone."""
        cut = self.slices
        is_sum = cut is not None and cut.columns is not None
        return None if is_sum and cut is not None and cut.ranks.rank else self.bias

    def trainable_base_tensors(self) -> list[Tensor]:
        """What of the base product trains, in the order of `FrozenLinear.parameter_gradients`."""
        tensors = (self.weight, self.bias) if self.product is None else self.product.parameters()
        return [t for t in tensors if t is not None and t.requires_grad]

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.weight.dtype if self.product is None else self.product.dtype

    @property
    def in_features(self) -> int:
        return self.base_product().shape[1]

    @property
    def out_features(self) -> int:
        return self.base_product().shape[0]

    def forward(
        self, x: Tensor, call: AdapterContext | None = None, site: str | None = None
    ) -> Tensor:
        """x [..., in] -> [..., out]. ``site`` names the input for dropout; layers that share an
        input pass the same one.
        """
        call = self.resolve(call)
        if (own := under(self, call)) is not self:
            return with_own_rows(own, x, own.forward(x, call, site))
        # without a term plain torch, which also fuses the bias and serves double backward
        if self.product is None and self.slices is None and not self.terms(call):
            return F.linear(x, self.weight.t() if self.transposed else self.weight, self.bias)
        rows, dtype = x.reshape(-1, x.shape[-1]), None
        if torch.is_autocast_enabled(x.device.type) and self.dtype != torch.float64:
            # as autocast does with every linear; our own backward runs outside of it
            dtype = torch.get_autocast_dtype(x.device.type)
            rows = rows.to(dtype)
        call = self._with_own_gates(call, rows)
        (y,) = self.group.forward(rows, call, site or self.path, dtype)
        return y.view(*x.shape[:-1], -1) if x.dim() != 2 else y

    def use_own_weights(self, whole: Mapping[str, OwnTensor]) -> None:
        """Of a twin (`variants.own_weights.under`): compute with an adapter's weights."""
        self.group = LinearGroup([self])
        if "weight" in whole:
            self.product = None
        elif self.product is not None and "bias" in whole:
            held_by: Callable[[BankLinear], FrozenLinear] | None = getattr(
                self.product, "held_by", None
            )
            if held_by is None:
                raise ContractError(f"{self.path} has a custom product, which reads no other bias")
            self.product = held_by(self)

    def _with_own_gates(self, call: AdapterContext, x: Tensor) -> AdapterContext:
        """The call with the gates that a router of the linears makes of x [T,in], what this one
        reads; any other call as it is."""
        router = call.router
        routed = any(t.route is not None and t.adapter in self.slots for t in call.mix.terms)
        if not routed or not isinstance(router, LinearRouter):
            return call
        gates = router.linear_gates([self.path], gather_inputs(x, self.slices))
        return replace(call, mix=call.mix.with_token_gates(gates))

    def delta(self, slot: AdapterSlot) -> Tensor:
        """s B A in fp32, in the layout of the stored weight."""
        a, b = slot.factors()
        product = (b @ a).mul_(slot.scale)
        return product.t() if self.transposed else product


def stored_slice(layer: nn.Module) -> tuple[int, DimensionSlice]:
    """Along which dimension the weight of a layer that ranks share is cut as it lies in memory, and
    how."""
    slices = layer.slices
    assert isinstance(slices, LayerSlices)
    if isinstance(layer, BankEmbedding):
        assert slices.columns is not None
        return 0, slices.columns  # [V, D]: what its ids choose from
    assert isinstance(layer, BankLinear)
    dim, part = (0, slices.rows) if slices.rows is not None else (1, slices.columns)
    assert part is not None
    return (1 - dim if layer.transposed else dim), part


class LinearGroup:
    """Linears that read the same input, and the stacked compute copies of their adapters in the
    base's dtype.

    The copies are remade after every backward pass and whenever a master's version has moved: an
    optimizer of the user's own that updates the masters, even one that no version counter sees
    (fused AdamW, `p.data.add_`), can never train a stale copy. Whoever else writes the memory under
    the masters calls `Adapter.touch`.
    """

    def __init__(self, linears: Sequence[BankLinear]) -> None:
        self.linears = linears

    def trainable_base_tensors(self) -> list[Tensor]:
        """What of the base products trains."""
        return [t for linear in self.linears for t in linear.trainable_base_tensors()]

    def base_products(self, dtype: torch.dtype | None = None) -> list[FrozenLinear]:
        """The base products, as they are now; in another dtype than their own where one is given."""
        products = [linear.base_product() for linear in self.linears]
        if dtype is None:
            return products
        return [p if p.dtype == dtype else CastLinear(p, dtype) for p in products]

    @property
    def slices(self) -> LayerSlices | None:
        """How they are cut over ranks: as alike as their input is."""
        return self.linears[0].slices

    def forward(
        self, x: Tensor, call: AdapterContext, site: str, dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """x [T,I] -> y [T,O] of each linear, one node of autograd. ``dtype``: of x and y, where that
        is not the base's own (autocast)."""
        stacks, terms = self.stacks(call, site, dtype=dtype)
        linears = Linears(self.base_products(dtype), stacks, self.slices)
        base = self.trainable_base_tensors()
        return list(LowRankFunction.apply(x, linears, *TermParams.flat(terms), *base))

    def stacks(
        self,
        call: AdapterContext,
        site: str,
        *,
        routed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> tuple[list[StackedAdapters], list[TermParams[Tensor | None]]]:
        """What the call's terms need here, and their masters and gates. ``routed``: whether the
        call's router may be asked here; ``dtype``: of the compute copies, the base's own where
        None. Raises ContractError for a term of its elsewhere."""
        dtype = dtype or self.linears[0].dtype
        stacks, terms = list[StackedAdapters](), list[TermParams[Tensor | None]]()
        for linear in self.linears:
            # all of them before any product: half a group computed would be memory for nothing
            linear.terms(call)  # refuses a merged layer
        # a merged layer's weight holds the terms of the base already
        of_base = [
            t
            for linear in self.linears
            if linear.unmerged_weight is None
            for t in linear.base_terms
        ]
        for term in dict.fromkeys(of_base):
            self._add_stack([term], call, site, dtype, stacks, terms)
        for alike in self._alike(call, routed=routed):
            self._add_stack(alike, call, site, dtype, stacks, terms)
        return stacks, terms

    def _alike(self, call: AdapterContext, *, routed: bool) -> list[list[MixTerm]]:
        """The call's terms that have a slot here; together those that one product computes: of the
        same tokens and dropout rate, and with gates from the same place."""
        groups: dict[object, list[MixTerm]] = {}
        for term in call.mix.terms:
            slot = next(
                (m.slots[term.adapter] for m in self.linears if term.adapter in m.slots), None
            )
            if slot is None:
                continue
            per_token = isinstance(term.gate, Tensor)
            if term.route is not None and call.router is None:
                # without its gate the term would count in full
                raise ContractError(
                    f"{self.linears[0].path}: the adapter {term.adapter!r} is an "
                    "expert of a router, but the mix has no router (one of the "
                    "prompt makes its gates before the layers run: "
                    "`with_prompt_gates`)"
                )
            if term.route is not None and (not routed or per_token):
                raise self._unroutable(term)
            # one adapter has one dropout rate, so its first slot speaks for the group
            rate = slot.dropout if call.noise is not None else 0.0
            rows = None if term.rows is None else (term.rows.start, term.rows.stop)
            # a DoRA scales what it is added to: by itself
            alone = slot.magnitude is not None and term.adapter
            key = (rows, rate, per_token, term.route is not None, alone)
            groups.setdefault(key, []).append(term)
        return list(groups.values())

    def _add_stack(
        self,
        group: Sequence[MixTerm],
        call: AdapterContext,
        site: str,
        dtype: torch.dtype,
        stacks: list[StackedAdapters],
        terms: list[TermParams[Tensor | None]],
    ) -> None:
        """Put what these terms (`_alike`) need here behind the others."""
        slots = [
            (i, k, linear.slots[term.adapter])
            for i, linear in enumerate(self.linears)
            for k, term in enumerate(group)
            if term.adapter in linear.slots
        ]
        first = group[0]
        routed, gates = (
            first.route is not None,
            [t.gate for t in group if isinstance(t.gate, Tensor)],
        )
        # a constant g goes into the scale (no work per token); a tensor stays a gate with a gradient
        constants = [1.0 if isinstance(t.gate, Tensor) else t.gate for t in group]
        # which of the gates is a slot's
        columns = None
        if routed:
            assert call.router is not None
            # a router of the linears has a block of columns for each of them
            step = len(call.router.adapters) if isinstance(call.router, LinearRouter) else 0
            columns = [i * step + (group[k].route or 0) for i, k, _ in slots]
        elif gates:
            columns = [k for _, k, _ in slots]
        rate = slots[0][2].dropout if call.noise is not None else 0.0
        columns_here = None if self.slices is None else self.slices.columns
        dropout = (
            call.noise.at(site, rate, columns_here) if call.noise is not None and rate else None
        )
        tokens, term_rows = slice(None) if first.rows is None else first.rows, None
        if (
            # gates are [rows] of the term, which widened rows would no longer match
            columns is None
            and first.rows is not None
            and dtype == torch.bfloat16
            and slots[0][2].A.device.type == "cpu"
        ):
            # only oneDNN's bf16 products are compiled per shape; elsewhere wider rows would be
            # waste
            tokens, term_rows = align_rows(first.rows)
        masters = [slot for _, _, slot in slots]
        # a DoRA has a magnitude at each, any other adapter a bias or nothing
        scaled = masters[0].magnitude is not None
        own = [(j, s.magnitude if scaled else s.bias) for j, s in enumerate(masters)]
        vectors = [(j, vector) for j, vector in own if vector is not None]
        if scaled:
            for i, _, _ in slots:
                self.linears[i].refuse_mixed_magnitude(call, first)
            # biases may: a magnitude leaves them as they are
            if any(t.dim() > 1 for t in self.trainable_base_tensors()):
                raise ContractError(
                    f"{self.linears[0].path}: base weights do not train beside a DoRA adapter"
                )
        stacks.append(
            StackedAdapters(
                tokens,
                len(slots),
                partial(self._compute_copies, slots, dtype, constants, columns),
                dropout,
                partial(_touch_slots, masters),
                term_rows,
                routed,
                [j for j, _ in vectors],
                scaled,
            )
        )
        terms.append(
            TermParams(
                tuple(PartParams(slot.lora_A, slot.B) for slot in masters),
                torch.stack(gates, 1) if gates else None,
                tuple(vector for _, vector in vectors),
            )
        )

    def _unroutable(self, term: MixTerm) -> ContractError:
        where = f"{self.linears[0].path}: the adapter {term.adapter!r} has gates of a layer router"
        if isinstance(term.gate, Tensor):
            return ContractError(f"{where} and a gate of its own; give the term a number")
        return ContractError(
            f"{where}, but this linear is not in a decoder layer; remove it from target_modules"
        )

    def _compute_copies(
        self,
        slots: Sequence[tuple[int, int, AdapterSlot]],
        dtype: torch.dtype,
        constants: Sequence[float],
        columns: Sequence[int] | None,
    ) -> ComputeCopies:
        """The stacked A's, each linear's share, and who has what of it, remade where a master has
        changed: in the same memory unless a graph still reads it, since new copies at every step would
        lie between the activations of one. slots: (linear, term, slot), linear by linear; constants:
        of each term."""
        several = columns is not None or len(constants) > 1
        # dtype and place in the group as well as the masters: a base cast to another dtype needs
        # new copies
        stamp = (
            dtype,
            several and (tuple(constants), columns and tuple(columns)),
            slots[0][2].magnitude is not None
            and tuple(self.linears[i].base_stamp() for i, _, _ in slots),
            *(value for i, _, slot in slots for value in (i, *slot.stamp())),
        )
        cache, key = slots[0][2].stacks, (several, *(slot.slot_id for _, _, slot in slots))
        entry = cache.get(key)
        if entry is None or entry.stamp != stamp:
            memory = None if entry is None else entry.memory()
            copies = (
                self._copies_of_several(slots, dtype, constants, columns, memory)
                if several
                else self._copies_of_one(slots, dtype, memory)
            )
            cache[key] = entry = StackEntry(stamp, copies)
        copies = entry.hand_out()
        if any(slot.bias is not None for _, _, slot in slots):
            copies = replace(copies, biases=_slot_biases(slots, dtype, constants, columns))
        if several or constants[0] == 1.0:
            return copies
        parts = [replace(p, scale=p.scale * constants[0]) for p in copies.parts]
        return replace(copies, parts=parts)

    def _copies_of_one(
        self,
        slots: Sequence[tuple[int, int, AdapterSlot]],
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
            scale = None if slot.magnitude is None else output_scale(self.linears[i], slot)
            b = cast_values(b, dtype, places[j])
            parts.append(AdapterShare(i, rows, b, slot.scale, trained, scale))
            at = rows.stop
        return ComputeCopies(a, parts)

    def _copies_of_several(
        self,
        slots: Sequence[tuple[int, int, AdapterSlot]],
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
    slots: Sequence[tuple[int, int, AdapterSlot]],
    dtype: torch.dtype,
    constants: Sequence[float],
    columns: Sequence[int] | None,
) -> list[SlotBias]:
    """Of those of the slots that have one, in their order; as `LinearGroup._compute_copies` has them."""
    biases = list[SlotBias]()
    for j, (i, k, slot) in enumerate(slots):
        if slot.bias is not None:
            scale = slot.scale * constants[k]
            values = (slot.bias.detach() * scale).to(dtype)
            biases.append(SlotBias(i, values, scale, None if columns is None else columns[j]))
    return biases


def _share_rows(one: slice | None, other: slice | None) -> bool:
    """Whether two terms are for a token in common; None: for all."""
    if one is None or other is None:
        return True
    return bool(one.start < other.stop and other.start < one.stop)


def joined_rows(
    masters: Sequence[Tensor], dtype: torch.dtype, memory: Tensor | None = None
) -> Tensor:
    """[S,I], one below the other, in a dtype: a view where that is their own and they lie so; in
    ``memory`` if they fit there (`cast_values`)."""
    first, rows = masters[0].detach(), sum(m.shape[0] for m in masters)
    if dtype == first.dtype:
        if _lie_at(masters, [m.numel() for m in masters]):
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
    if dtype != first.dtype or not _lie_at(masters, [m.shape[1] for m in masters]):
        return None
    columns = sum(m.shape[1] for m in masters)
    return first.as_strided((first.shape[0], columns), first.stride(), first.storage_offset())


def _lie_at(masters: Sequence[Tensor], steps: Sequence[int]) -> bool:
    """Whether each begins so many values behind the one before, in the same memory."""
    first, at = masters[0], masters[0].storage_offset()
    for master, step in zip(masters, steps, strict=True):
        alike = master.stride() == first.stride() and master.device == first.device
        memory = master.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (alike and memory and master.storage_offset() == at):
            return False
        at += step
    return True


def align_rows(rows: slice) -> tuple[slice, slice]:
    """Some rows, widened to multiples of 64, and where they lie among those: oneDNN compiles a
    product anew for every shape it meets, and the shares of several adapters in a batch would have
    ever new ones.
    """
    # 64: coarse enough for few distinct shapes, and at most 126 rows of waste a term
    start = rows.start // 64 * 64
    return slice(start, -(-rows.stop // 64) * 64), slice(rows.start - start, rows.stop - start)


def _touch_slots(slots: Sequence[AdapterSlot]) -> None:
    for slot in slots:
        if not slot.still:
            slot.touch()


class BankEmbedding(AdaptableLayer):
    """An embedding [V, D] with low-rank terms. As PEFT has it, A [R, V] starts at zero and B [D, R]
    at random.
    """

    def __init__(self, weight: nn.Parameter, *, path: str = "") -> None:
        super().__init__(path)
        self.weight = weight

    def matrix(self) -> Tensor:
        """The table's transpose."""
        return self.weight.t()

    @property
    def in_features(self) -> int:
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        return self.weight.shape[1]

    def forward(self, ids: Tensor, call: AdapterContext | None = None) -> Tensor:
        """ids [...] int64 -> [..., D]. Dropout does not apply to an embedding's input."""
        call = self.resolve(call)
        if (own := under(self, call)) is not self:
            return with_own_rows(own, ids, own.forward(ids, call))
        # the lookup of a frozen base comes first: without terms it is all there is
        terms = self.terms(call)
        y = self._look_up(ids, self.weight)
        if not terms:
            return self._sum_over_ranks(y)
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
        flat = self._scale(self._sum_over_ranks(flat), call)
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
            stale = partial(_touch_slots, [slot])
            scaled = MagnitudeFunction.apply(flat[start:stop], slot.magnitude, slot.norm[1], stale)
            flat = torch.cat([flat[:start], scaled, flat[stop:]])
        return flat

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
