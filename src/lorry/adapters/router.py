"""A router of the layers: a linear per layer, or a small MLP, that reads the layer's own normed input
and gates the experts of that half, token by token (docs/experts.md).

    z = W n / temperature, p = softmax(z) in fp32, g = the top_k of p, divided by their sum

which is what Mixtral and Qwen's MoE classes compute before their experts; with hidden layers
n -> relu(V n + b) for each goes before W. T tokens, D width, F features (D, or the last hidden
layer's width), K experts.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.attach import get_bank
from lorry.adapters.bank import AdapterBank
from lorry.adapters.flat_buffer import euclidean_norm
from lorry.adapters.mix import Half, Level, Mix
from lorry.adapters.seeds import derive_seed
from lorry.adapters.targets.candidates import find_adaptable
from lorry.adapters.tensor_parallel.whole import WholeOnEachRank
from lorry.errors import ConfigError
from lorry.families import ModelFamily

ROUTER_NAME = "router"  # what batches, metrics and checkpoints call it
HALVES: dict[str, tuple[Half, ...]] = {"mlp": ("mlp",), "attn": ("attn",), "both": ("attn", "mlp")}


@dataclass(frozen=True)
class RoutingRule:
    """How logits become gates. ``input``: whose normed input is read, and whose terms are gated:
    mlp, attn or both, each by its own matrix; ``top_k``: experts a token has; ``normalize``: their
    gates sum to 1; ``straight_through``: of one expert, gate 1 with the gradient of its
    probability; ``level``: delta or expert (`adapters.mix.LayerRouter`). Raises ConfigError for what
    cannot train.
    """

    input: str = "mlp"
    top_k: int = 2
    normalize: bool = True
    temperature: float = 1.0
    straight_through: bool = False
    level: Level = "delta"

    def check(self, experts: int) -> None:
        """Raises ConfigError for a rule that ``experts`` experts cannot follow."""
        if self.input not in HALVES:
            raise ConfigError(f"router.input={self.input}: give mlp, attn or both")
        if not 1 <= self.top_k <= experts:
            raise ConfigError(
                f"router.top_k={self.top_k}: a token may have 1 to {experts} of {experts} experts"
            )
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"router.temperature={self.temperature:g}: give a number above 0")
        if self.level not in ("delta", "expert"):
            raise ConfigError(f"router.level={self.level}: give delta or expert")
        if self.level == "expert" and self.input == "attn":
            raise ConfigError(
                "router.level=expert mixes MLPs, and router.input=attn gates none; give input=mlp or both"
            )
        if self.level == "expert" and not (
            self.normalize or self.straight_through or self.top_k == experts
        ):
            # the base MLP is in each of them, and not beside: with gates of sum 0.4 it is at 0.4
            raise ConfigError(
                "router.level=expert with normalize=false would shrink every MLP by the sum of its gates; "
                "give normalize=true, or level=delta"
            )
        if self.straight_through and self.top_k != 1:
            raise ConfigError("router.straight_through is for top_k=1 alone; leave it out")
        if self.top_k == 1 and self.normalize and not self.straight_through:
            raise ConfigError(
                "router.top_k=1 with normalize=true makes every gate 1 whatever "
                "the logits are, so no gradient reaches it; give "
                "straight_through=true, or normalize=false"
            )

    def gates(self, logits: Tensor) -> Tensor:
        """[T,K] fp32 -> [T,K] fp32, 0 for the experts that a token does not have."""
        p = logits.softmax(-1)
        if self.top_k == p.shape[-1]:
            return p  # sums to 1 as it is
        largest, chosen = p.topk(self.top_k, -1)
        if self.straight_through:
            largest = 1 + largest - largest.detach()
        elif self.normalize:
            largest = largest / largest.sum(-1, keepdim=True)
        return torch.zeros_like(p).scatter(-1, chosen, largest)


class RouterParameters(WholeOnEachRank):
    """What of a router trains, a `ParameterSet`: ``shapes`` of its tensors by name, matrices first;
    values, grads [P] fp32; ``params``, the same memory as values, by name.
    """

    name, kind, label, drops = ROUTER_NAME, "router", "the router", False
    router_kind = ""
    adapters: Sequence[str]

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], device: torch.device | str = "cpu"
    ) -> None:
        self.shapes = dict(shapes)
        size = sum(math.prod(shape) for shape in self.shapes.values())
        self.values = torch.zeros(size, dtype=torch.float32, device=device)
        self.grads = torch.zeros_like(self.values)
        # Parameters over views of `values`: a step on the buffer is a step on each of them
        self.params = {n: nn.Parameter(v) for n, v in self.split_like(self.values).items()}
        self.bind_grads()

    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """Those of router.json that are the kind's own."""

    @abstractmethod
    def mix(self) -> Mix:
        """Every expert, gated by the router."""

    def training_mix(self, role: str) -> Mix:
        """What a sequence of a role (its expert's name) trains the router under."""
        return self.mix()

    def tensors(self) -> Mapping[str, Tensor]:
        """Its matrices and biases, by name: those of router.safetensors."""
        return self.split_like(self.values)

    @property
    def start_digest(self) -> None:
        """None: the base stays as it is."""
        return None

    def num_parameters(self) -> int:
        """How many numbers train."""
        return self.values.numel()

    def split_like(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut any [P] tensor (values, moments) into views by name."""
        parts = flat.split([math.prod(shape) for shape in self.shapes.values()])
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def ranges(self) -> list[tuple[slice, bool, bool]]:
        """The matrices, which decay, and the biases behind them, which do not."""
        decaying = sum(math.prod(s) for s in self.shapes.values() if len(s) > 1)
        size = self.values.numel()
        parts = [(slice(0, decaying), False, True), (slice(decaying, size), False, False)]
        return parts if decaying < size else parts[:1]

    def targets(self) -> list[str]:
        """Its tensors, by name."""
        return list(self.shapes)

    def masters(self) -> Mapping[str, Tensor]:
        """The parameters, by name."""
        return dict(self.params)

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """None: the base is frozen."""
        return {}

    def wanting_gradients(self) -> set[str]:
        """Those that train."""
        return {name for name, param in self.masters().items() if param.requires_grad}

    def bind_grads(self) -> None:
        """Point every parameter's .grad into the flat buffer."""
        for name, view in self.split_like(self.grads).items():
            self.params[name].grad = view

    def touch(self) -> None:
        """Nothing: it computes with the masters themselves."""
        return

    def held_still(self) -> AbstractContextManager[None]:
        """Nothing: it computes with the masters themselves."""
        return nullcontext()

    def norm(self) -> float:
        """Euclidean norm of the whole gradient (inf or nan if any entry is)."""
        return euclidean_norm(self.grads)

    def zero_grad_names(self) -> list[str]:
        """The tensors whose gradient is exactly zero."""
        return [name for name, grad in self.split_like(self.grads).items() if not grad.any()]


class TokenRouter(RouterParameters):
    """A `ParameterSet`, a `LayerRouter` and a `MixtureRouter`: ``adapters``, the experts, as columns
    of its gates. For each layer and half ``weights`` has a matrix [K, F], and
    ``hidden_layers`` a list of (weight [F, D], bias [F]), empty without ``hidden``, their widths.
    """

    router_kind = "token"

    def __init__(
        self,
        adapters: Sequence[str],
        rule: RoutingRule,
        *,
        layers: int,
        width: int,
        hidden: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        rule.check(len(adapters))
        if any(size < 1 for size in hidden):
            raise ConfigError(f"router.hidden={list(hidden)}: widths are 1 or more")
        self.adapters: Sequence[str] = tuple(adapters)
        self.halves: Sequence[Half] = HALVES[rule.input]
        self.rule, self.hidden = rule, tuple(hidden)
        self.sites = [(layer, half) for layer in range(layers) for half in self.halves]
        super().__init__(self._shapes((width, *self.hidden)), device)
        self.weights = {site: self.params[f"{_at(site)}.weight"] for site in self.sites}
        self.hidden_layers = {
            site: [
                tuple(self.params[f"{_at(site)}.hidden.{i}.{part}"] for part in ("weight", "bias"))
                for i in range(len(self.hidden))
            ]
            for site in self.sites
        }

    def _shapes(self, widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Of the tensors, in the buffer's order: matrices, then biases, which do not decay."""
        pairs = list(enumerate(pairwise(widths)))
        matrices: dict[str, tuple[int, ...]] = {}
        for site in self.sites:
            matrices |= {
                f"{_at(site)}.hidden.{i}.weight": (fan_out, fan_in)
                for i, (fan_in, fan_out) in pairs
            }
            matrices[f"{_at(site)}.weight"] = (len(self.adapters), widths[-1])
        biases = {
            f"{_at(site)}.hidden.{i}.bias": (fan_out,)
            for site in self.sites
            for i, (_, fan_out) in pairs
        }
        return {**matrices, **biases}

    @torch.no_grad()
    def init_hidden(self, seed: int) -> None:
        """Draw the hidden layers from (seed, tensor's name), uniform in 1/sqrt(fan-in) as nn.Linear
        has them. The last matrix stays."""
        for site, layers in self.hidden_layers.items():
            for i, (weight, bias) in enumerate(layers):
                generator = torch.Generator().manual_seed(
                    derive_seed("router", seed, f"{_at(site)}.hidden.{i}")
                )
                bound = 1 / math.sqrt(weight.shape[1])
                for param in (weight, bias):
                    drawn = torch.rand(param.shape, generator=generator)
                    param.copy_((2 * drawn - 1) * bound)

    def parameters(self, layer: int) -> list[Tensor]:
        """What of it a layer asks."""
        return [
            param
            for half in self.halves
            for pair in (*self.hidden_layers[layer, half], (self.weights[layer, half],))
            for param in pair
        ]

    def features(self, layer: int, half: Half, x: Tensor) -> Tensor:
        """x [T,D] -> what the last matrix reads, [T,F] fp32: x itself, or the last hidden layer."""
        x = x.float()
        for weight, bias in self.hidden_layers[layer, half]:
            x = F.linear(x, weight, bias).relu()
        return x

    @property
    def level(self) -> Level:
        """What the MLP's gates multiply."""
        return self.rule.level

    def logits(self, layer: int, half: Half, x: Tensor) -> Tensor:
        """x [T,D] -> z [T,K] fp32: in half precision experts of nearly equal weight would change
        places."""
        z = F.linear(self.features(layer, half, x), self.weights[layer, half])
        return z / self.rule.temperature

    def gates(self, logits: Tensor) -> Tensor:
        """z [T,K] -> g [T,K]."""
        return self.rule.gates(logits)

    def mix(self) -> Mix:
        """Every expert, gated by the router."""
        return Mix.layer_routed(self)

    def settings(self) -> Mapping[str, Any]:
        """The rule, and the hidden layers if there are any."""
        return {**vars(self.rule), **({"hidden": list(self.hidden)} if self.hidden else {})}


def _at(site: tuple[int, Half]) -> str:
    layer, half = site
    return f"layers.{layer}.{half}"


def _half_targets(family: ModelFamily, half: Half) -> list[str]:
    """The family's names of the linears of half a layer."""
    roles = {"attn": ("qkv", "attn_out"), "mlp": ("mlp_in", "mlp_out")}
    return [target for role in roles[half] for target in getattr(family.roles, role)]


def site_modules(model: nn.Module, site: tuple[int, Half]) -> list[str]:
    """The module paths of the linears whose terms a layer's half gates. Raises ConfigError for a
    model without such halves."""
    if hasattr(model, "blocks"):
        family: Any = model.family
        return [family.path(target, site[0]) for target in _half_targets(family, site[1])]
    within = f"{_foreign_halves(model)[0][site]}."
    return [path for path in find_adaptable(model) if path.startswith(within)]


def layers_and_width(model: nn.Module) -> tuple[int, int]:
    """How many layers have halves that a router gates, and the width of what they read. Raises
    ConfigError for a model without such halves."""
    geometry: Any = getattr(model, "geometry", None)
    if geometry is not None:
        return geometry.layers, geometry.width
    halves, width = _foreign_halves(model)
    return 1 + max(layer for layer, _ in halves), width


def _foreign_halves(model: nn.Module) -> tuple[dict[tuple[int, Half], str], int]:
    """The halves of a model that runs through transformers (`HfModel.router_halves`), and the width of
    what they read. Raises ConfigError where there are none."""
    halves, width = getattr(model, "router_halves", ({}, 0))
    if not halves:
        raise ConfigError(
            "router.kind=token reads what attention and MLP of each layer read, and this model, which runs through "
            "transformers, has no two such modules in every layer: use router.kind=sequence, prototype, uniform or fixed"
        )
    return halves, width


def refuse_other_half(model: nn.Module, experts: Sequence[str], rule: RoutingRule) -> None:
    """Raise ConfigError for an expert that has an adapter where this router has no gate: in the
    other half of a layer, at the head, at the embedding; and for a model that the rule cannot be
    followed in.
    """
    layers, _ = layers_and_width(model)
    if rule.level == "expert" and not hasattr(model, "blocks"):
        raise ConfigError(
            "router.level=expert computes whole MLPs in Lorry's own decoder, and this model runs through transformers: "
            "give router.level=delta"
        )
    within, in_layers = (
        {path for n in range(layers) for half in halves for path in site_modules(model, (n, half))}
        for halves in (HALVES[rule.input], HALVES["both"])
    )
    gated = {path.rpartition(".")[2] for path in within}
    for name in experts:
        odd = [path for path in get_bank(model)[name].slots if path not in within]
        if odd:
            raise ConfigError(
                f"expert {name!r} has an adapter at {odd[0]} ({len(odd)} such modules), which router.input={rule.input} "
                f"does not gate; train it with target_modules=[{','.join(sorted(gated))}]"
                + (", or give router.input=both" if in_layers.issuperset(odd) else "")
            )


def attach_router(
    model: nn.Module, experts: Sequence[str], rule: RoutingRule, hidden: Sequence[int] = ()
) -> TokenRouter:
    """A router over adapters of the model, all zeros. Raises ConfigError."""
    refuse_other_half(model, experts, rule)
    layers, width = layers_and_width(model)
    device = next(model.parameters()).device
    router = TokenRouter(experts, rule, layers=layers, width=width, hidden=hidden, device=device)
    bank = get_bank(model)
    refuse_router_name(bank)
    refuse_unweighable(bank, experts)
    bank.routers[ROUTER_NAME] = router
    return router


def refuse_unweighable(bank: AdapterBank, experts: Sequence[str]) -> None:
    """Raise ConfigError for an expert that is more than low-rank terms, which gates multiply."""
    for name in experts:
        bank[name].refuse_further("no router can weigh it; train the expert as a plain LoRA")


def refuse_router_name(bank: AdapterBank) -> None:
    """Raise ConfigError for an expert of the router's name."""
    if ROUTER_NAME in bank.adapters:
        raise ConfigError(f"an expert cannot be called {ROUTER_NAME!r}, which is the router's name")
