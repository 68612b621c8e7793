"""Merge: fold adapters into the weights, in fp32 and rounded once, and take them out again bit for
bit.

    W' = round(W + sum_k g_k s_k B_k A_k)

`merge` swaps Parameters and keeps the originals, `unmerge` puts them back; nothing is ever
subtracted. `merged_tensors` streams the same weights one at a time without touching the model, for
writing them to disk.

Rounding to bf16 can lose most of a small delta, so every merge measures |stored - exact| / |delta|
(Frobenius norms). An adapter on one side of a tied head and embedding gives that side a weight of
its own (`separates_tied_head`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorry.adapters.adapter import Adapter
from lorry.adapters.attach import FSDP1, FSDP2, find_wrapper, get_bank
from lorry.adapters.bank import AdapterBank
from lorry.adapters.layers.embedding import BankEmbedding
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.layers.shares import is_sharded, local_share
from lorry.adapters.layers.slot import AdapterSlot
from lorry.adapters.merging.replaced import (
    displace,
    put_back,
    replaced_tensor,
    replacements,
)
from lorry.adapters.mix import Mix
from lorry.adapters.parameters.experts import ExpertMatrices
from lorry.adapters.spec import unscaled_spec
from lorry.adapters.targets.candidates import find_linears, head_and_embedding
from lorry.adapters.variants.dora import fold_magnitude
from lorry.adapters.variants.parameters import FurtherParameter
from lorry.errors import ConfigError, ModelError

MergedLayer = BankLinear | BankEmbedding | ExpertMatrices
WARN_ERROR_RATIO = 0.1  # above this share of the delta lost to rounding, a merge warns


@dataclass(frozen=True)
class MergeRow:
    """One merged module: |sum g s B A| and |stored - exact|, Frobenius norms."""

    module: str
    delta: float
    error: float

    @property
    def ratio(self) -> float:
        """The share of the delta that rounding lost."""
        return self.error / self.delta if self.delta else 0.0


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. ``untied``: head and embedding shared a weight and no longer do
    (`tie_word_embeddings` is now false).
    """

    rows: tuple[MergeRow, ...] = field(repr=False)
    dtype: torch.dtype
    untied: bool

    @property
    def ratio(self) -> float:
        """|stored - exact| / |delta| over all modules together."""
        delta = math.hypot(*(r.delta for r in self.rows))
        return math.hypot(*(r.error for r in self.rows)) / delta if delta else 0.0

    @property
    def warning(self) -> str | None:
        """A sentence for the user when more than 10% of the delta was lost."""
        if self.ratio <= WARN_ERROR_RATIO:
            return None
        worst = max(self.rows, key=lambda r: r.ratio)
        remedy = "merge in float32, or " if self.dtype != torch.float32 else ""
        return (
            f"rounding to {str(self.dtype).removeprefix('torch.')} lost "
            f"{self.ratio:.0%} of the adapter (most at {worst.module}: "
            f"{worst.ratio:.0%}); {remedy}use the adapter unmerged"
        )


@torch.no_grad()
def merge(model: nn.Module, weights: Mapping[str, float] | None = None) -> MergeReport:
    """Fold adapters into the model's weights: ``weights`` {adapter: g}, by default the mix a plain
    `model(x)` uses now.

    Afterwards `model(x)` needs no adapter and gives the merged outputs; using one raises
    ContractError until `unmerge`. The original Parameters stay in memory. Where FSDP2 has sharded
    the model, each rank merges its share, and the report is of that. Raises ConfigError if nothing
    constant is active, or the model is merged already; ModelError if a merged weight is not finite.
    Nothing is changed then.
    """
    bank = get_bank(model)
    mix = _constant_weights(bank, weights)
    _reshard(model)
    untied = separates_tied_head(model, weights)
    if untied and any(is_sharded(layer.weight) for layer in _adapted_layers(bank, mix).values()):
        raise ConfigError(
            "head and embedding share one sharded weight, and an adapter sits on one of the two; "
            "save the adapter and merge it into a model that is not sharded"
        )
    merged, rows = {}, []
    for path, layer in _adapted_layers(bank, mix).items():
        stored, row = _fold_layer(path, layer, mix, layer.weight.dtype)
        # collected first: an infinite weight in a late layer must not leave half a merged model
        merged[path] = stored
        rows.append(row)
    own, made = dict[str, Tensor](), dict[tuple[int, int], Tensor]()
    for name, one in replacements(bank, mix).items():
        base = model.get_parameter(name)
        # both sides of a tied pair that have one thing in its place stay one tensor
        if (id(base), id(one)) not in made:
            made[id(base), id(one)], row = _replace(name, base, one, base.dtype)
            rows.append(row)
        own[name] = made[id(base), id(one)]
    for path, stored in merged.items():
        bank.modules[path].use_merged_weight(nn.Parameter(stored, requires_grad=False))
    # only after every layer was folded: until here an error leaves the model untouched
    bank.displaced = displace(model, own)
    if untied:
        _declare_tied(model, False)
    bank.before_merge = bank.active
    bank.activate(Mix.none())
    return MergeReport(tuple(rows), next(iter(merged.values())).dtype, untied)


def unmerge(model: nn.Module) -> None:
    """Put every original Parameter back (the same object, so a tied head is tied again) and the mix
    that was active.

    Raises ConfigError if the model is not merged.
    """
    bank = get_bank(model)
    if bank.before_merge is None:
        raise ConfigError("this model is not merged; there is nothing to unmerge")
    _reshard(model)
    for layer in bank.modules.values():
        if layer.unmerged_weight is not None:
            layer.restore_weight()
    put_back(bank.displaced)
    bank.displaced = []
    sides = [
        find_linears(model)[p]
        for p in head_and_embedding(model)
        if p is not None and p in find_linears(model)
    ]
    if len(sides) == 2 and sides[0].weight is sides[1].weight:
        _declare_tied(model, True)
    mix, bank.before_merge = bank.before_merge, None
    bank.activate(mix)


@torch.no_grad()
def merged_tensors(
    model: nn.Module,
    weights: Mapping[str, float] | None = None,
    *,
    dtype: torch.dtype | None = None,
    rows: list[MergeRow] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Stream (state-dict name, W + sum g s B A) for the whole model, out of place and one tensor at
    a time.

    A name that shares its Parameter with an earlier one (a tied head) is left out while both stay
    equal, as in Hugging Face files; where `separates_tied_head` says so it comes as a tensor of its
    own. ``dtype`` stores every floating tensor so instead of in its own; ``rows`` receives one
    MergeRow per merged module. Raises what `merge` raises, and ConfigError where a process has shares
    of weights.
    """
    bank = get_bank(model)
    _refuse_shares(model, bank)
    mix = _constant_weights(bank, weights)
    touched, held = dict[int, tuple[str, MergedLayer]](), dict[int, tuple[str, MergedLayer]]()
    for path, layer in _adapted_layers(bank, mix).items():
        if layer.holders:  # no module of the tree: known by its tensor
            held[id(layer.weight)] = (path, layer)
        else:
            touched[id(layer)] = (path, layer)
    own = replacements(bank, mix)
    # tied names share a Parameter, so identity tells what has been sent already
    streamed: set[object] = set()
    # keep_vars: plain state_dict detaches into new tensors, whose identity says nothing
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, leaf = name.rpartition(".")
        stored_dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        # by module, which may have several names
        folded = held.get(id(tensor))
        if folded is None and leaf == "weight":
            folded = touched.get(id(model.get_submodule(owner)))
        if folded is not None:
            stored, row = _fold_layer(*folded, mix, stored_dtype)
            if rows is not None:
                rows.append(row)
            yield name, stored
        elif (one := own.get(name)) is not None:
            if (id(tensor), id(one)) in streamed:
                continue  # the other side of a tied pair that stays tied
            streamed.add((id(tensor), id(one)))
            stored, row = _replace(name, tensor, one, stored_dtype)
            if rows is not None:
                rows.append(row)
            yield name, stored
        elif id(tensor) not in streamed:
            streamed.add(id(tensor))
            yield name, tensor.detach().to(stored_dtype)


@torch.no_grad()
def fold_tensor(model: nn.Module, name: str, weights: Mapping[str, float]) -> Tensor:
    """A copy of one tensor of the model in fp32 by its name in the state dict; a weight that adapters sit at
    is W + sum g s B A of those with ``weights`` {adapter: g}, and of those that count as part of
    the base. Raises what `merged_tensors` raises.
    """
    bank = get_bank(model)
    _refuse_shares(model, bank)
    path, _, leaf = name.rpartition(".")
    gates = {**dict.fromkeys(bank.base_adapters, 1.0), **weights}
    layer = bank.modules.get(path if leaf == "weight" else name)
    _refuse_unfoldable(bank, gates)
    if (one := replacements(bank, gates).get(name)) is not None:
        return _replace(name, model.get_parameter(name), one, torch.float32)[0]
    if layer is None or not any(adapter in layer.slots for adapter in gates):
        tensor: Tensor = getattr(model.get_submodule(path), leaf)
        # a copy even in fp32: experts without a delta would be one tensor under several names
        return tensor.detach().to(torch.float32, copy=True)
    if isinstance(layer, BankLinear) and layer.product is not None:
        raise ConfigError(f"{path} has a custom product, and no adapter can be merged into it")
    assert isinstance(layer, MergedLayer), type(layer)
    return _fold_layer(path, layer, gates, torch.float32)[0]


@torch.no_grad()
def concatenate(model: nn.Module, name: str, weights: Mapping[str, float]) -> Adapter:
    """One adapter, not attached, that computes sum g s B A of those with ``weights`` and, g = 1, of
    those that count as part of the base (`AdapterBank.move_to_base`): their A's below each other
    [sum r, I], their g s B's side by side [O, sum r], scale 1 at every module.

    Exact but for the rounding of g s B to fp32. Raises ConfigError where there is none, or a weight
    is not finite.
    """
    bank = get_bank(model)
    gates = _constant_weights(bank, weights)
    adapters = {**bank.base_adapters, **bank.adapters}
    for each in gates:
        adapters[each].refuse_further("it cannot be concatenated with others, nor weighed")
    parts = {
        path: [
            (gate * slot.scale, slot)
            for adapter_name, gate in gates.items()
            if (slot := adapters[adapter_name].slots.get(path)) is not None
        ]
        for path in bank.modules
    }
    parts = {path: slots for path, slots in parts.items() if slots}
    factors = {
        path: [(factor, *slot.factors()) for factor, slot in slots] for path, slots in parts.items()
    }
    experts = {path: bank.modules[path].num_experts for path in parts}
    ranks = {
        path: sum(a.shape[0] for _, a, _ in each) // experts[path] for path, each in factors.items()
    }
    halves = [join_A([a for _, a, _ in each], experts[path]) for path, each in factors.items()]
    halves += [
        join_B([factor * b for factor, _, b in each], experts[path])
        for path, each in factors.items()
    ]
    values = torch.cat([half.reshape(-1) for half in halves]).float()
    split = sum(half.numel() for half in halves[: len(parts)])
    whole = Adapter(name, unscaled_spec(ranks), values, torch.zeros_like(values), split)
    views = [
        nn.Parameter(view.view(half.shape), requires_grad=False)
        for view, half in zip(values.split([h.numel() for h in halves]), halves, strict=True)
    ]
    for path, a, b in zip(parts, views, views[len(parts) :], strict=False):
        whole.slots[path] = AdapterSlot(path, a, b, 1.0, 0.0)
    return whole


def join_A(parts: Sequence[Tensor], experts: int = 1) -> Tensor:
    """[E sum r, I] of each [E r, I]: the parts below each other, expert by expert."""
    split = [part.view(experts, -1, part.shape[-1]) for part in parts]
    return torch.cat(split, dim=1).flatten(0, 1)


def join_B(parts: Sequence[Tensor], experts: int = 1) -> Tensor:
    """[O, sum r E] of each [O, r E], columns ordered (rank, expert): the parts side by side."""
    split = [part.view(part.shape[0], -1, experts) for part in parts]
    return torch.cat(split, dim=1).flatten(1)


def separates_tied_head(model: nn.Module, weights: Mapping[str, float] | None = None) -> bool:
    """Whether merging separates a head and an embedding that share one Parameter (then write
    `tie_word_embeddings=false`).
    """
    bank = get_bank(model)
    mix = _constant_weights(bank, weights)
    touched, own = _adapted_layers(bank, mix), replacements(bank, mix)
    ends = [path for path in head_and_embedding(model) if path is not None]
    sides = [find_linears(model).get(path) for path in ends]
    shared = (
        len(sides) == 2
        and all(s is not None for s in sides)
        and len({id(s.weight) for s in sides if s is not None}) == 1
    )
    # what both have of an adapter's own they have together
    differ = len({id(own.get(f"{path}.weight")) for path in ends}) > 1
    return shared and (differ or any(s is layer for s in sides for layer in touched.values()))


def _replace(
    name: str, base: Tensor, one: FurtherParameter, dtype: torch.dtype
) -> tuple[Tensor, MergeRow]:
    """(the rounded tensor, what rounding cost) of one that an adapter has of its own."""
    stored, delta, error = replaced_tensor(name, base, one, dtype)
    return stored, MergeRow(name, delta, error)


def _declare_tied(model: nn.Module, tied: bool) -> None:
    """Keep the model's config true about whether head and embedding share a weight."""
    config = getattr(model, "config", None)
    if isinstance(config, dict):
        config["tie_word_embeddings"] = tied
    elif config is not None and hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = tied


def _constant_weights(bank: AdapterBank, weights: Mapping[str, float] | None) -> dict[str, float]:
    """{adapter: g} to fold. Raises ConfigError for a mix that is empty or varies over tokens, or a
    model merged already.
    """
    if bank.before_merge is not None:
        raise ConfigError("this model is merged already; call unmerge(model) first")
    constants: dict[str, float] = {}
    for term in (Mix.constants(weights) if weights is not None else bank.active).terms:
        # one matrix serves every token: only a g that is the same for all of them can go into it
        if term.rows is not None or isinstance(term.gate, Tensor) or term.route is not None:
            raise ConfigError(
                f"the mix of {term.adapter!r} varies over tokens, so it cannot be "
                "merged with one weight; pass weights={name: number}"
            )
        if not math.isfinite(term.gate):
            raise ConfigError(
                f"the weight of adapter {term.adapter!r} is {term.gate}; it must be a finite number"
            )
        constants[bank[term.adapter].name] = constants.get(term.adapter, 0.0) + term.gate
    # g = 0 over a start is the start, which there is something of to merge
    if not constants and weights and not bank.base_adapters:
        raise ConfigError(
            f"the weight of {', '.join(weights)} is 0, so the merged model would "
            "equal the base model; give another weight"
        )
    if not constants and not (weights and bank.base_adapters):
        raise ConfigError(
            f"no adapter to merge; pass weights={{name: 1.0}} with names from {', '.join(bank.names()) or 'none'}"
        )
    # what counts as part of the base is under every mix, and so in every merged weight
    return {**dict.fromkeys(bank.base_adapters, 1.0), **constants}


def _adapted_layers(bank: AdapterBank, mix: Mapping[str, float]) -> dict[str, MergedLayer]:
    """The layers at which an adapter of the mix sits. Raises ConfigError where a base weight is no
    dense one.
    """
    if with_products := [
        p for p, m in bank.modules.items() if isinstance(m, BankLinear) and m.product is not None
    ]:
        what = (
            f"{len(with_products)} linears have a custom product ({with_products[0]}), "
            "and no adapter can be merged into them"
        )
        raise ConfigError(f"{what}; use the adapter unmerged")
    _refuse_unfoldable(bank, mix)
    layers: dict[str, MergedLayer] = {}
    for path, layer in bank.modules.items():
        if any(name in layer.slots for name in mix):
            assert isinstance(layer, MergedLayer), type(layer)
            dims = 3 if isinstance(layer, ExpertMatrices) else 2
            if not isinstance(layer.weight, nn.Parameter) or layer.weight.dim() != dims:
                raise ConfigError(
                    f"{path}.weight is a part of a flat parameter of FullyShardedDataParallel; save "
                    "the adapter and merge it into a model that is not wrapped"
                )
            layers[path] = layer
    return layers


def _refuse_shares(model: nn.Module, bank: AdapterBank) -> None:
    """Raises ConfigError where a process has shares of weights: a stream of whole tensors would be one of
    shares, under the names of the whole."""
    cut = any(is_sharded(p) for p in model.parameters()) or find_wrapper(model, (FSDP1,))
    if cut or any(layer.slices is not None for layer in bank.modules.values()):
        raise ConfigError(
            "each process has shares of this model's weights, and would make merged shares of them; save the "
            "adapter and merge it into a model that is not cut over processes"
        )


def _refuse_unfoldable(bank: AdapterBank, mix: Mapping[str, float]) -> None:
    """Raises ConfigError for an adapter that this mix cannot fold into weights."""
    for name in mix:
        adapter = {**bank.base_adapters, **bank.adapters}[name]
        if adapter.spec.use_dora:
            _refuse_mixed_magnitudes(bank, adapter, mix)
        elif adapter.spec.alora_invocation_tokens or any(
            one.replaces is None and not name.endswith(".lora_B.bias")
            for name, one in adapter.further.items()
        ):
            adapter.refuse_further("it cannot be merged into the base's weights")


def _refuse_mixed_magnitudes(bank: AdapterBank, adapter: Adapter, mix: Mapping[str, float]) -> None:
    """Raises ConfigError for a DoRA that is not merged whole and alone, or into shares of weights."""
    if mix[adapter.name] != 1:
        raise ConfigError(
            f"{adapter.label} is a DoRA, c (W + s B A), which has no weight but 1 "
            f"(asked: {mix[adapter.name]:g}); merge it whole, or train a plain LoRA to weigh or negate it"
        )
    for path in adapter.slots:
        layer = bank.modules[path]
        if beside := [
            n for n in mix if n not in (adapter.name, *bank.base_adapters) and n in layer.slots
        ]:
            raise ConfigError(
                f"{adapter.label} is a DoRA, and {beside[0]!r} is at {path} too: what both together are is "
                "not defined; merge one of them"
            )
        if is_sharded(layer.weight) or layer.slices is not None:
            raise ConfigError(
                f"{adapter.label} is a DoRA, and {path}.weight is cut over processes; save the adapter and "
                "merge it into a model that is not"
            )


def _reshard(model: nn.Module) -> None:
    """Let FSDP2 give back what it has gathered for a forward pass: weights are shares again."""
    if find_wrapper(model, (FSDP2,)):
        for module in model.modules():
            if (reshard := getattr(module, "reshard", None)) is not None:
                reshard()


def _fold_layer(
    path: str, layer: MergedLayer, mix: Mapping[str, float], dtype: torch.dtype
) -> tuple[Tensor, MergeRow]:
    """(the rounded sum, what rounding cost) of one layer; of a sharded weight this rank's share."""
    # fp32 for all adapters together, so that only the final sum is rounded
    delta = torch.zeros(layer.weight.shape, dtype=torch.float32, device=layer.weight.device)
    for name, gate in mix.items():
        if name in layer.slots:
            delta.add_(layer.delta(layer.slots[name]), alpha=gate)
    delta = _share_like(layer.weight, delta)
    scaled = next((s for n in mix if (s := layer.slots.get(n)) and s.magnitude is not None), None)
    if scaled is None:
        # before the next line adds the weight into the same memory
        size = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
        exact = delta.add_(local_share(layer.weight))
    else:
        exact = delta.add_(local_share(layer.weight))
        fold_magnitude(layer, scaled, exact)
        change = exact - local_share(layer.weight)
        size = float(torch.linalg.vector_norm(change, dtype=torch.float64))
    # a copy even in fp32: `exact` is overwritten below
    stored = exact.to(dtype, copy=True)
    if not bool(torch.isfinite(stored).all()):
        remedy = ", or merge in float32" if dtype != torch.float32 else ""
        raise ModelError(
            f"merging makes {path}.weight infinite or NaN in {dtype}; check the adapter{remedy}"
        )
    error = float(torch.linalg.vector_norm(exact.sub_(stored), dtype=torch.float64))
    return stored, MergeRow(path, size, error)


def _share_like(weight: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of a tensor, where ``weight`` has its own of the same shape."""
    if not is_sharded(weight):
        return whole
    # imported here: torch.distributed.tensor is a second of every run that has no use for it
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(weight, DTensor)
    shape, offset = compute_local_shape_and_global_offset(
        weight.shape, weight.device_mesh, weight.placements
    )
    part = whole[tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True))]
    return part.contiguous()
