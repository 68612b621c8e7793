"""One adapter of several in a model's bank, module by module.

    merge_adapters(model, {"law": 1.0, "code": 0.5}, "both", method="core_tsv", rank=16)

A method that PEFT has gives the tensors of PEFT's `add_weighted_adapter`, bit by bit where the same
LAPACK runs, random ones too: what PEFT's making of the new adapter draws from the generator is drawn
here, so that ``seed`` is its `torch.manual_seed(seed)`. Where that writes an adapter that it cannot
load (rank patterns) or that is another one (use_rslora, which it keeps, multiplies by sqrt(r)), the
tensors are the same and the config says what they are.

As in PEFT a module that only some adapters have is merged from those. PEFT's own methods on factors
(`linear`, `ties` ...) are no sum of deltas: products of one adapter's A with another's B are in them.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorry.adapters.adapter import Adapter
from lorry.adapters.attach import attach, get_bank
from lorry.adapters.bank import AdapterBank
from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.embedding import BankEmbedding
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.layers.slot import AdapterSlot
from lorry.adapters.merging.core_space import (
    LowRankMatrix,
    core_bases,
    flatten_spectrum,
    merge_task_singular_vectors,
    truncate,
)
from lorry.adapters.merging.methods import combine
from lorry.adapters.mix import Mix, check_weights
from lorry.adapters.parameters.holders import refuse_adapter_at_parameters
from lorry.adapters.seeds import derive_seed
from lorry.adapters.spec import unscaled_spec
from lorry.adapters.targets.candidates import find_linears
from lorry.config.merge import EXACT_METHOD, MERGE_METHODS, MajoritySign, MergeMethod
from lorry.errors import ConfigError, ModelError, describe_value, suggest_nearest


@dataclass(frozen=True)
class MergedModule:
    """One module of a merged adapter: its rank, how many of the adapters had it, the squared
    Frobenius norm of what was merged, and how much of that its rank left out.
    """

    module: str
    rank: int
    adapters: int
    energy: float
    lost: float


@dataclass(frozen=True)
class AdapterMerge:
    """An adapter made of others, attached. ``method``: the one that ran, which of a single adapter
    is PEFT's `linear`, a copy.
    """

    adapter: Adapter = field(repr=False)
    method: str
    modules: tuple[MergedModule, ...] = field(repr=False)

    @property
    def energy_lost(self) -> float:
        """Share of the squared Frobenius norm, over all modules, that the rank left out; 0 for
        methods that have no such step.
        """
        energy = math.fsum(m.energy for m in self.modules)
        return math.fsum(m.lost for m in self.modules) / energy if energy else 0.0


@dataclass(frozen=True)
class _Recipe:
    """The settings of one merge. ``rank``: None keeps what there is."""

    method: MergeMethod
    density: float
    majority_sign_method: MajoritySign
    rank: int | None
    generator: torch.Generator

    def combine(self, tensors: list[Tensor], weights: list[float]) -> Tensor:
        return combine(
            tensors,
            weights,
            self.method,
            density=self.density,
            majority_sign_method=self.majority_sign_method,
            generator=self.generator,
        )


@torch.no_grad()
def merge_adapters(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str = "merged",
    *,
    method: str = EXACT_METHOD,
    density: float = 0.5,
    majority_sign_method: MajoritySign = "total",
    rank: int | None = None,
    seed: int = 0,
    scale: float = 1.0,
) -> AdapterMerge:
    """Make one more adapter of those with ``weights`` {name: w, below 0 too}, which stay; a plain
    `model(x)` then uses it alone. Its scale is 1 at every module.

    method: a name of `lorry merge --help`. density: share of values that pruning keeps.
    majority_sign_method: "total" or "frequency". rank: of methods with an SVD; None is the largest
    of the adapters (svd), or all that there is (core). seed: which values DARE drops. scale: factor
    of the result. Values go through the CPU, a module at a time. Raises ConfigError for settings
    that do not go together and for a result that is zero at every module, ModelError where it is
    not finite; nothing is attached then.
    """
    bank = get_bank(model)
    check_weights(weights)
    # before any work, though `attach` asks both again
    bank.refuse_name(name)
    if bank.before_merge is not None:
        raise ConfigError("this model is merged; call unmerge(model) before merging its adapters")
    chosen = _checked_method(bank, weights, method, density, majority_sign_method, rank, scale)
    ran = method
    if len(weights) == 1 and chosen.space != "core":
        ran, chosen = "linear", MERGE_METHODS["linear"]
        if rank is not None:
            raise ConfigError(
                f"method={method} of one adapter is a copy of it, as in PEFT, and "
                f"ignores rank={rank}; core_linear uses it"
            )
    for each in weights:
        bank[each].refuse_further(
            "adapters are merged term by term", "merge it into the base instead"
        )
        refuse_adapter_at_parameters(bank[each], bank.modules, "lorry merge of several adapters")
    specs = [bank[each].plain_spec for each in weights]
    # the model's order, which is that in which PEFT draws
    slots_by_path = {
        path: {each: bank[each].slots[path] for each in weights if path in bank[each].slots}
        for path in find_linears(model)
    }
    slots_by_path = {path: slots for path, slots in slots_by_path.items() if slots}
    ranks = [max(spec.r, *spec.rank_pattern.values(), 0) for spec in specs]
    if rank is None and chosen.space == "delta":
        rank = max(ranks)
    generator = torch.Generator().manual_seed(seed)
    if chosen.prune == "random" and chosen.space != "core":
        drawn = rank if rank is not None else max(ranks)
        for path in slots_by_path:
            _draw_new_adapter(bank.modules[path], drawn, specs[0].init_lora_weights, generator)
    recipe = _Recipe(chosen, density, majority_sign_method, rank, generator)
    values, modules, zero = dict[str, Tensor](), list[MergedModule](), True
    for path, slots in slots_by_path.items():
        if chosen.space == "core":
            # ours: a function of names, so that other modules change nothing
            generator.manual_seed(derive_seed("merge", seed, path))
        terms = [(weights[each], slot) for each, slot in slots.items()]
        factors = _merge_module(path, bank.modules[path], terms, recipe, sum(ranks))
        left = factors.left if scale == 1 else scale * factors.left
        # rounded first: what is finite in float64 may not be in float32
        for side, value in (("A", factors.right.float()), ("B", left.float())):
            if not bool(torch.isfinite(value).all()):
                raise ModelError(
                    f"merging makes {path}.lora_{side} infinite or NaN; look at the weights and adapters"
                )
            values[f"{path}.lora_{side}"] = value
        zero = zero and _is_zero(values[f"{path}.lora_A"], values[f"{path}.lora_B"])
        modules.append(
            MergedModule(path, factors.right.shape[0], len(terms), factors.energy, factors.lost)
        )
    if zero:
        pruned = f"density={density:g} drops all of their values, " if chosen.prune else ""
        raise ConfigError(
            f"the merged adapter is zero: {pruned}the adapters cancel each other, "
            "or none has been trained "
            f"({', '.join(f'{weight:g} x {each}' for each, weight in weights.items())})"
        )
    adapter = _attach_values(model, name, values, modules)
    bank.activate(Mix.one(name))
    return AdapterMerge(adapter, ran, tuple(modules))


def _checked_method(
    bank: AdapterBank,
    weights: Mapping[str, float],
    name: str,
    density: float,
    majority_sign_method: str,
    rank: int | None,
    scale: float,
) -> MergeMethod:
    """The method of a name. Raises ConfigError for what is no setting of a merge."""
    if not isinstance(name, str) or name not in MERGE_METHODS:
        raise ConfigError(
            f"method={name!r:.80} is not among "
            f"{', '.join(MERGE_METHODS)}{suggest_nearest(str(name), MERGE_METHODS)}"
        )
    if not weights:
        raise ConfigError(
            f"no adapter to merge; this model has {', '.join(bank.names()) or 'none'}"
        )
    for each, weight in weights.items():
        bank[each]  # for its ConfigError
        if not math.isfinite(weight):
            raise ConfigError(f"the weight of adapter {each!r} is {weight}; give a finite number")
    for what, number in {"density": density, "scale": scale}.items():
        if not isinstance(number, numbers.Real):
            raise ConfigError(f"{what} is {describe_value(number)}; give a number")
    if rank is not None and not isinstance(rank, int):
        raise ConfigError(f"rank is {describe_value(rank)}; give a whole number")
    if not 0 < density <= 1:
        raise ConfigError(f"density is {density}; it must be above 0 and at most 1")
    if majority_sign_method not in ("total", "frequency"):
        raise ConfigError(
            f"majority_sign_method is {majority_sign_method!r:.80}; give total or frequency"
        )
    method = MERGE_METHODS[name]
    if rank is not None and "rank" not in method.settings:
        takers = ", ".join(k for k, each in MERGE_METHODS.items() if "rank" in each.settings)
        raise ConfigError(f"method={name} does not use rank; the methods that do: {takers}")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}; it must be at least 1")
    if not math.isfinite(scale):
        raise ConfigError(f"scale is {scale}; give a finite number")
    if scale == 0 or not any(weights.values()):
        what = "scale is 0" if scale == 0 else "every weight is 0"
        raise ConfigError(f"the merged adapter is zero: {what}")
    if method.spectrum and (idle := [each for each, weight in weights.items() if weight == 0]):
        raise ConfigError(
            f"the weight of adapter {idle[0]!r} is 0; leave the adapter out, since "
            f"method={name} would count it"
        )
    return method


def _draw_new_adapter(
    layer: AdaptableLayer, rank: int, init: bool | str, generator: torch.Generator
) -> None:
    """Draw from the generator what PEFT draws to make a new adapter's initial values at a module:
    each matrix when it is allocated, and the random one again.
    """
    a_shape, b_shape = (rank, layer.in_features), (layer.out_features, rank)
    if isinstance(layer, BankEmbedding):
        drawn = [("normal_", a_shape), ("normal_", b_shape)]
        drawn += [("normal_", b_shape)] if init is not False else []
    else:
        drawn = [("uniform_", a_shape), ("uniform_", b_shape)]
        if init is not False:
            drawn.append(("normal_" if init == "gaussian" else "uniform_", a_shape))
    for name, shape in drawn:
        getattr(torch.empty(shape), name)(generator=generator)


def _merge_module(
    path: str,
    layer: AdaptableLayer,
    terms: list[tuple[float, AdapterSlot]],
    recipe: _Recipe,
    rank_sum: int,
) -> LowRankMatrix:
    """B [out, r] and A [r, in] of one module, fp32, or float64 of the core."""
    if recipe.method.space == "stack":
        return _stack(terms, rank_sum)
    if recipe.method.space == "factors":
        return _merge_factors(path, terms, recipe)
    if recipe.method.space == "delta":
        return _merge_deltas(path, layer, terms, recipe)
    return _merge_cores(path, terms, recipe)


def _factors(slot: AdapterSlot) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] on the CPU, fp32."""
    a, b = slot.factors()
    return a.cpu(), b.cpu()


def _stack(terms: list[tuple[float, AdapterSlot]], rank: int) -> LowRankMatrix:
    """The sum itself: A's with weight and scale below each other, B's side by side; zeros up to
    ``rank`` where a module is of some adapters only.
    """
    parts = [_factors(slot) for _, slot in terms]
    # two products, as PEFT: (w s) would round otherwise
    a = torch.cat([a * w * slot.scale for (a, _), (w, slot) in zip(parts, terms, strict=True)])
    b = torch.cat([b for _, b in parts], dim=1)
    missing = rank - a.shape[0]
    a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
    return LowRankMatrix(torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1), a, 0.0, 0.0)


def _merge_factors(
    path: str, terms: list[tuple[float, AdapterSlot]], recipe: _Recipe
) -> LowRankMatrix:
    """A's and B's each merged for themselves. Raises ConfigError for unequal ranks."""
    ranks = [slot.factors()[0].shape[0] for _, slot in terms]
    if len(set(ranks)) > 1:
        raise ConfigError(
            f"{path}: the adapters have the ranks {', '.join(map(str, ranks))}, and "
            "this method combines them value by value; cat, svd and core_linear "
            "take any ranks"
        )
    factors = [w * slot.scale for w, slot in terms]
    halves = [math.sqrt(abs(factor)) for factor in factors]
    # on one side only: twice the sign would be none
    signed = [half if factor >= 0 else -half for half, factor in zip(halves, factors, strict=True)]
    parts = [_factors(slot) for _, slot in terms]
    a = recipe.combine([a for a, _ in parts], signed)
    return LowRankMatrix(recipe.combine([b for _, b in parts], halves), a, 0.0, 0.0)


def _merge_deltas(
    path: str, layer: AdaptableLayer, terms: list[tuple[float, AdapterSlot]], recipe: _Recipe
) -> LowRankMatrix:
    """The SVD of the merged deltas. They are made whole, [out, in] of one module at a time: what is
    pruned value by value is no longer of low rank.
    """
    # in the layout of the base's weight, in which PEFT draws masks and breaks ties
    transposed = isinstance(layer, BankEmbedding) or (
        isinstance(layer, BankLinear) and layer.transposed
    )
    deltas = []
    for _, slot in terms:
        a, b = _factors(slot)
        product = b @ a
        deltas.append((product.T if transposed else product) * slot.scale)
    merged = recipe.combine(deltas, [w for w, _ in terms])
    _check_finite(path, merged)
    return truncate(merged.T if transposed else merged, recipe.rank)


def _merge_cores(
    path: str, terms: list[tuple[float, AdapterSlot]], recipe: _Recipe
) -> LowRankMatrix:
    """The same in core space, where any ranks meet in one small shape."""
    # float64: it is small, and a sum of ranks squared costs nothing
    parts = [tuple(f.double() for f in _factors(slot)) for _, slot in terms]
    u, v = core_bases([a for a, _ in parts], [b for _, b in parts])
    cores = [
        slot.scale * (u.mT @ b) @ (a @ v.mT) for (a, b), (_, slot) in zip(parts, terms, strict=True)
    ]
    weights = [w for w, _ in terms]
    # what float32 rounded off the factors: a copy of it in another direction is no task's
    noise = [
        torch.finfo(torch.float32).eps * abs(w * slot.scale) * float(a.norm() * b.norm())
        for (a, b), (w, slot) in zip(parts, terms, strict=True)
    ]
    if recipe.method.spectrum == "tsv":
        # by the ranks, not by the core: whether two directions are one is a matter of rounding there
        ranks, (a, b) = sum(a.shape[0] for a, _ in parts), parts[0]
        share = max(min(ranks, a.shape[1], b.shape[0]) // len(terms), 1)
        merged = merge_task_singular_vectors(
            [w * core for w, core in zip(weights, cores, strict=True)], noise, share
        )
    else:
        merged = recipe.combine(cores, weights)
    _check_finite(path, merged)
    if recipe.method.spectrum == "iso":
        merged = flatten_spectrum(merged, math.fsum(noise))
    small = truncate(merged, recipe.rank)
    return small._replace(left=u @ small.left, right=small.right @ v)


def _check_finite(path: str, merged: Tensor) -> None:
    """Raise ModelError where an SVD would raise its own."""
    if not bool(torch.isfinite(merged).all()):
        raise ModelError(
            f"merging makes the delta of {path} infinite or NaN; look at the weights and adapters"
        )


def _is_zero(a: Tensor, b: Tensor) -> bool:
    """Whether B [out, r] A [r, in] is 0 but for float32's rounding of its r outer products."""
    a, b = a.double(), b.double()
    outer = a.norm(dim=1) * b.norm(dim=0)
    # by the small Gram matrices: the product itself is [out, in]
    square = float(((b.mT @ b) * (a @ a.mT)).sum())
    return square <= (torch.finfo(torch.float32).eps * float(outer.sum())) ** 2


def _attach_values(
    model: nn.Module, name: str, values: Mapping[str, Tensor], modules: list[MergedModule]
) -> Adapter:
    """Attach an adapter of the values {`MODULE.lora_A`: ...}, alpha = r at every module."""
    ranks = {each.module: each.rank for each in modules}
    adapter = attach(model, unscaled_spec(ranks), name, modules=list(ranks))
    for key, view in adapter.tensors().items():
        view.copy_(values[key])
    # written under the masters, which no compute copy can know
    adapter.touch()
    return adapter
