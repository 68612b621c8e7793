"""A router of the layers: a linear per layer that reads the layer's own normed input and gates the
experts of that half, token by token (docs/experts.md).

    z = W n / temperature, p = softmax(z) in fp32, g = the top_k of p, divided by their sum

which is what Mixtral and Qwen's MoE classes compute before their experts. T tokens, D width, K
experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.attach import get_bank
from lorry.adapters.mix import Half, Mix
from lorry.errors import ConfigError

ROUTER_NAME = "router"  # what batches, metrics and checkpoints call it
HALVES: dict[str, tuple[Half, ...]] = {"mlp": ("mlp",), "attn": ("attn",), "both": ("attn", "mlp")}


@dataclass(frozen=True)
class RoutingRule:
    """How logits become gates. ``input``: whose normed input is read, and whose terms are gated:
    mlp, attn or both, each by its own matrix; ``top_k``: experts a token has; ``normalize``: their
    gates sum to 1; ``straight_through``: of one expert, gate 1 with the gradient of its
    probability. Raises ConfigError for what cannot train.
    """

    input: str = "mlp"
    top_k: int = 2
    normalize: bool = True
    temperature: float = 1.0
    straight_through: bool = False

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
        kept, chosen = p.topk(self.top_k, -1)
        if self.straight_through:
            kept = 1 + kept - kept.detach()
        elif self.normalize:
            kept = kept / kept.sum(-1, keepdim=True)
        return torch.zeros_like(p).scatter(-1, chosen, kept)


class TokenRouter:
    """A `ParameterSet`, a `LayerRouter` and a `MixtureRouter`: ``adapters``, the experts, as columns of its gates;
    values, grads [P] fp32, a matrix [K, D] for each layer and half.
    """

    name, kind, label, drops = ROUTER_NAME, "router", "the router", False
    router_kind = "token"

    def __init__(
        self,
        adapters: Sequence[str],
        rule: RoutingRule,
        *,
        layers: int,
        width: int,
        device: torch.device | str = "cpu",
    ) -> None:
        rule.check(len(adapters))
        self.adapters: Sequence[str] = tuple(adapters)
        self.halves: Sequence[Half] = HALVES[rule.input]
        self.rule = rule
        self.sites = [(layer, half) for layer in range(layers) for half in self.halves]
        self.shape = (len(self.adapters), width)
        size = len(self.sites) * len(self.adapters) * width
        self.values = torch.zeros(size, dtype=torch.float32, device=device)
        self.grads = torch.zeros_like(self.values)
        # Parameters over views of `values`: a step on the buffer is a step on each of them
        views = self.split_like(self.values).values()
        self.weights = dict(zip(self.sites, (nn.Parameter(v) for v in views), strict=True))
        self.bind_grads()

    # --- in a layer

    def parameters(self, layer: int) -> list[Tensor]:
        """The matrices of a layer."""
        return [self.weights[layer, half] for half in self.halves]

    def logits(self, layer: int, half: Half, x: Tensor) -> Tensor:
        """x [T,D] -> z [T,K] fp32: in half precision experts of nearly equal weight would change
        places."""
        return F.linear(x.float(), self.weights[layer, half]) / self.rule.temperature

    def gates(self, logits: Tensor) -> Tensor:
        """z [T,K] -> g [T,K]."""
        return self.rule.gates(logits)

    def mix(self) -> Mix:
        """Every expert, gated by the router."""
        return Mix.layer_routed(self)

    # --- in a directory

    def settings(self) -> Mapping[str, Any]:
        """The rule."""
        return vars(self.rule)

    def tensors(self) -> Mapping[str, Tensor]:
        """Its matrices, by name."""
        return self.split_like(self.values)

    # --- as what trains

    @property
    def start_digest(self) -> None:
        """None: the base stays as it is."""

    def num_parameters(self) -> int:
        """How many numbers train."""
        return self.values.numel()

    def split_like(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut any [P] tensor (values, moments) into [K, D] views by name."""
        parts = flat.split(self.shape[0] * self.shape[1])
        return {
            f"layers.{layer}.{half}.weight": part.view(self.shape)
            for (layer, half), part in zip(self.sites, parts, strict=True)
        }

    def ranges(self) -> list[tuple[slice, bool, bool]]:
        """The whole buffer, which decays."""
        return [(slice(0, self.values.numel()), False, True)]

    def targets(self) -> list[str]:
        """Its matrices, by name."""
        return list(self.split_like(self.values))

    def masters(self) -> Mapping[str, Tensor]:
        """The parameters, by name."""
        return dict(zip(self.targets(), self.weights.values(), strict=True))

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """None: the base is frozen."""
        return {}

    def wanting_gradients(self) -> set[str]:
        """The matrices that train."""
        return {name for name, param in self.masters().items() if param.requires_grad}

    def bind_grads(self) -> None:
        """Point every matrix's .grad into the flat buffer."""
        for param, view in zip(
            self.weights.values(), self.split_like(self.grads).values(), strict=True
        ):
            param.grad = view

    def touch(self) -> None:
        """Nothing: it computes with the masters themselves."""

    def norm(self) -> float:
        """Euclidean norm of the whole gradient (inf or nan if any entry is)."""
        return float(torch.linalg.vector_norm(self.grads))

    def zero_grad_names(self) -> list[str]:
        """The matrices whose gradient is exactly zero."""
        return [name for name, grad in self.split_like(self.grads).items() if not grad.any()]


def refuse_other_half(model: nn.Module, experts: Sequence[str], rule: RoutingRule) -> None:
    """Raise ConfigError for an expert that has an adapter where this router has no gate: in the
    other half of a layer, at the head, at the embedding.
    """
    family = getattr(model, "family", None)
    if family is None or not hasattr(model, "blocks"):
        raise ConfigError(
            "a layer router needs Lorry's own decoder (Llama, SmolLM, Mistral, "
            "Qwen2, Qwen3, GPT-2, GPT-NeoX); this model runs in transformers: use "
            "router.kind=uniform or fixed"
        )
    roles = {"attn": ("qkv", "attn_out"), "mlp": ("mlp_in", "mlp_out")}
    gated = {
        family.targets[target].rpartition(".")[2]
        for half in HALVES[rule.input]
        for role in roles[half]
        for target in getattr(family.roles, role)
    }
    for name in experts:
        odd = [m for m in get_bank(model)[name].slots if m.rpartition(".")[2] not in gated]
        if odd:
            raise ConfigError(
                f"expert {name!r} has an adapter at {odd[0]} ({len(odd)} such modules), which router.input={rule.input} "
                f"does not gate; train it with target_modules=[{','.join(sorted(gated))}]"
                + ("" if rule.input == "both" else ", or give router.input=both")
            )


def attach_router(model: nn.Module, experts: Sequence[str], rule: RoutingRule) -> TokenRouter:
    """A router over adapters of the model, all zeros. Raises ConfigError."""
    refuse_other_half(model, experts, rule)
    geometry: Any = model.geometry
    device = next(model.parameters()).device
    router = TokenRouter(experts, rule, layers=geometry.layers, width=geometry.width, device=device)
    bank = get_bank(model)
    if ROUTER_NAME in bank.adapters:
        raise ConfigError(f"an expert cannot be called {ROUTER_NAME!r}, which is the router's name")
    bank.routers[ROUTER_NAME] = router
    return router
