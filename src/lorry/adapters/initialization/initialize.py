"""Giving an adapter its first values by `LoraSpec.init_lora_weights`, where these are made from the base
or from rows.

The model begins as its base: what the first A and B add is taken off, by frozen copies of them
(`Adapter.use_initial`), not by writing another base. Saved, the adapter is plain LoRA of twice the
rank over the base as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from lorry.adapters.adapter import Adapter
from lorry.adapters.bank import AdapterBank
from lorry.adapters.initialization import factors
from lorry.adapters.initialization.ranks import redistribute_ranks
from lorry.adapters.initialization.recording import RunModel, record_gradients, record_inputs
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.spec import LoraSpec
from lorry.config.adapter.initialization import Initialization, find_initialization
from lorry.errors import ConfigError, ModelError

OriginalWeight = Callable[[str], Tensor]  # of a linear's path: [O,I] before it was packed


def require_sources(
    spec: LoraSpec, run_model: RunModel | None, original: OriginalWeight | None
) -> None:
    """Raise ConfigError where an initialisation lacks what it is made from, before anything is
    attached."""
    way = find_initialization(spec.init_lora_weights)
    if way is not None and way.reads_rows and run_model is None:
        does = (
            "the model's forward and the loss's backward"
            if way.reads == "gradients"
            else "model(rows)"
        )
        raise ConfigError(
            f"init_lora_weights={way.name} is made from rows; give run_model=, a function that runs "
            f"{does} on some of yours"
        )
    if way is not None and way.reads == "rounding" and original is None:
        raise ConfigError(
            f"init_lora_weights={way.name} is made from what packing rounded off; give original=, a "
            "function from a layer's path to its weight [out, in] before it was packed"
        )


def initialize_adapter(
    bank: AdapterBank,
    name: str,
    *,
    seed: int,
    run_model: RunModel | None = None,
    original: OriginalWeight | None = None,
) -> Adapter:
    """Fill an adapter that was just added; with EVA it may come back at other ranks and modules. Other
    adapters that are active while ``run_model`` runs are part of what it sees. Nothing is done for a
    random start. Raises ConfigError where the model, the ranks or the sources do not allow it, and
    ModelError where a factor is not finite.
    """
    adapter = bank[name]
    way = find_initialization(adapter.spec.init_lora_weights)
    if way is None:
        return adapter
    require_sources(adapter.spec, run_model, original)
    layers = _check_layers(bank, adapter, way)
    if way.name == "eva":
        assert run_model is not None
        return _initialize_eva(bank, adapter, layers, run_model, seed)
    sources = _Sources(layers, seed)
    if way.reads == "inputs and weight":
        assert run_model is not None
        sources.moments = record_inputs(layers, run_model, normed=True)
    elif way.reads == "gradients":
        assert run_model is not None
        with _without_gradients(bank):
            sources.gradients = record_gradients(layers, run_model)
    sources.original = original
    with torch.no_grad():
        for path, slot in adapter.slots.items():
            a, b = sources.factors(way, path, adapter.spec)
            for side, values in (("A", a), ("B", b)):
                if not bool(torch.isfinite(values).all()):
                    raise ModelError(
                        f"init_lora_weights={way.name}: {path}.lora_{side} is not finite; look at the "
                        "base's weights and the rows"
                    )
            slot.A.copy_(a)
            slot.B.copy_(b)
    if way.takes_off:
        adapter.use_initial(adapter.values.clone())
    adapter.touch()
    return adapter


@contextmanager
def _without_gradients(bank: AdapterBank) -> Iterator[None]:
    """Let backward passes leave every adapter's gradient as it is."""
    training = [p for p in bank.parameters() if p.requires_grad]
    for param in training:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in training:
            param.requires_grad_(True)


class _Sources:
    """What the factors of linears are made from."""

    def __init__(self, layers: Mapping[str, BankLinear], seed: int) -> None:
        self.layers, self.seed = layers, seed
        self.moments: Mapping[str, factors.InputMoments] = {}
        self.gradients: dict[str, Tensor] = {}
        self.original: OriginalWeight | None = None

    def factors(self, way: Initialization, path: str, spec: LoraSpec) -> factors.Factors:
        """The first A and B of a linear."""
        layer, rank, scale = self.layers[path], spec.rank(path), spec.scale(path)
        seed = factors.module_seed(self.seed, path)
        if way.name == "orthogonal":
            return factors.orthogonal(layer.out_features, layer.in_features, rank, seed)
        if way.name == "lora_ga":
            # popped: together they are as large as the base
            return factors.lora_ga(self.gradients.pop(path), rank, seed)
        weight = layer.base_matrix()
        if way.name == "loftq":
            assert self.original is not None
            whole = self.original(path).to(weight.device, torch.float32)
            if whole.shape != weight.shape:
                raise ConfigError(
                    f"{path}: the weight before packing is {tuple(whole.shape)}, packed it is "
                    f"{tuple(weight.shape)}"
                )
            return factors.loftq(whole, weight, rank, scale)
        if way.name == "corda":
            return factors.corda(weight, self.moments[path], rank, scale)
        if way.name == "mica":
            return factors.mica(weight, rank)
        if way.name == "olora":
            return factors.olora(weight, rank)
        if way.name == "milora":
            return factors.milora(weight, rank, scale)
        if way.niter is not None:
            return factors.pissa_niter(weight, rank, scale, way.niter, seed)
        return factors.pissa(weight, rank, scale)


def _check_layers(
    bank: AdapterBank, adapter: Adapter, way: Initialization
) -> dict[str, BankLinear]:
    """The adapter's linears. Raises ConfigError for a layer that the initialisation is not of."""
    layers, written = dict[str, BankLinear](), f"init_lora_weights={way.name}"
    if way.name == "eva" and adapter.further:
        raise ConfigError(
            f"{written} makes an adapter of other ranks, and {adapter.label} has "
            f"{next(iter(adapter.further))} besides; leave one of the two out"
        )
    for path in adapter.slots:
        if beside := [name for name, one in adapter.further.items() if one.module == path]:
            raise ConfigError(
                f"{written} is for A and B alone, and {adapter.label} has {beside[0]} too; leave one of "
                "the two out"
            )
        layer = bank.modules[path]
        if not isinstance(layer, BankLinear):
            raise ConfigError(
                f"{written} is for linear layers, and {path} is none; leave it out of the targets, or use "
                "init_lora_weights=true"
            )
        if way.name != "orthogonal" and layer.slices is not None:
            raise ConfigError(
                f"{written} reads whole matrices, of which each process has a part here; train on one "
                "process or with backend=ddp or fsdp, or use init_lora_weights=true"
            )
        if layer.weight.device.type == "meta":
            raise ConfigError(f"{written} reads {path}.weight, which has no values yet")
        if way.reads == "rounding" and layer.product is None:
            raise ConfigError(
                f"{written} is for a packed base, and {path} is whole; give model.quantize=nf4, or use "
                "init_lora_weights=pissa"
            )
        # of lora_ga A and B have other directions
        rank, needed = adapter.spec.rank(path), 2 if way.name == "lora_ga" else 1
        # EVA's directions are of inputs alone
        sides = (
            (layer.in_features,) if way.name == "eva" else (layer.out_features, layer.in_features)
        )
        smaller = min(sides)
        if way.reads != "nothing" and needed * rank > smaller:
            twice = ", of which it needs twice as many directions" if needed == 2 else ""
            raise ConfigError(
                f"{written} with r={rank}{twice}: {path} is [{layer.out_features}, {layer.in_features}] "
                f"and has {smaller}; give r={smaller // needed} or less, there by rank_pattern"
            )
        layers[path] = layer
    return layers


def _initialize_eva(
    bank: AdapterBank,
    adapter: Adapter,
    layers: Mapping[str, BankLinear],
    run_model: RunModel,
    seed: int,
) -> Adapter:
    """A: the directions in which a linear's inputs vary most, B zero (arXiv 2410.07170). The rank of a
    module is how many of its directions are among those of all modules that explain most."""
    spec = adapter.spec
    asked = {path: spec.rank(path) for path in layers}
    moments = record_inputs(layers, run_model)
    for path, own in moments.items():
        if own.tokens <= asked[path]:
            raise ConfigError(
                f"init_lora_weights=eva with r={asked[path]} saw {own.tokens} tokens at {path}; give more "
                "rows (init_rows), or a smaller r"
            )
    directions = dict[int, tuple[Tensor, Tensor]]()
    for own in moments.values():
        if id(own) not in directions:
            values, vectors = torch.linalg.eigh(own.covariance())
            shares = values.flip(0).clamp_min(0) / values.clamp_min(0).sum()
            # more than the most that any of its readers may get is never asked for
            directions[id(own)] = shares, vectors.flip(1).t()
    ranks = redistribute_ranks(
        asked, {path: directions[id(own)][0] for path, own in moments.items()}, spec.rho
    )
    chosen = {path: rank for path, rank in ranks.items() if rank}
    if chosen != asked:
        adapter = bank.replace(adapter.name, spec_of_ranks(spec, chosen), list(chosen), seed=seed)
    with torch.no_grad():
        for path, slot in adapter.slots.items():
            slot.A.copy_(directions[id(moments[path])][1][: chosen[path]])
            slot.B.zero_()
    adapter.touch()
    return adapter


def spec_of_ranks(spec: LoraSpec, ranks: Mapping[str, int]) -> LoraSpec:
    """The spec with these ranks at these modules, each of the scale that it had."""
    plain = replace(spec, rank_pattern={}, alpha_pattern={})
    divisors = {path: rank**0.5 if spec.use_rslora else rank for path, rank in ranks.items()}
    alphas = {path: spec.scale(path) * divisor for path, divisor in divisors.items()}
    return replace(
        spec,
        # by whole paths alone: files sort their patterns, and the first that matches counts
        rank_pattern={path: rank for path, rank in ranks.items() if rank != spec.r},
        alpha_pattern={p: alpha for p, alpha in alphas.items() if alpha != plain.alpha(p)},
    ).at_modules(ranks)
