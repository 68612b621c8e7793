"""PHATGOOSE's router: a vector for each expert and linear, trained on that expert's data alone, so
that experts never have to meet (arXiv 2402.05859; docs/experts.md).

    while it trains   y = W x + sigmoid(v_e . x) D_e x, expert e frozen, on e's own rows
    afterwards        z_e = norm(v_e) . norm(x) / sqrt(I), g = softmax of the top_k of z

norm: less the mean, divided by the standard deviation, as a LayerNorm without weights. T tokens,
I in, K experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.attach import get_bank
from lorry.adapters.bank import AdapterBank
from lorry.adapters.mix import Half, Mix, MixTerm
from lorry.adapters.router import (
    ROUTER_NAME,
    RouterParameters,
    refuse_router_name,
    refuse_unweighable,
)
from lorry.adapters.routing.linear_router import (
    check_choice,
    refuse_outside_layers,
    softmax_of_largest,
)
from lorry.adapters.targets.candidates import find_linears
from lorry.errors import ContractError


class GateVectors(RouterParameters):
    """A `ParameterSet`, a `LinearRouter` and a `MixtureRouter`: for each linear that an expert is on,
    a matrix [K, I] whose rows are the experts' vectors, zero where an expert is not on it.
    ``layers``: the linears of each layer that have one.
    """

    router_kind = "phatgoose"

    def __init__(
        self,
        bank: AdapterBank,
        adapters: Sequence[str],
        layers: Sequence[Sequence[str]],
        *,
        top_k: int = 2,
        temperature: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        check_choice(top_k, temperature, len(adapters))
        self.adapters: Sequence[str] = tuple(adapters)
        self.halves: Sequence[Half] = ("attn", "mlp")
        self.top_k, self.temperature, self.layers = top_k, temperature, layers
        shapes = {
            f"{path}.weight": (len(adapters), bank.modules[path].whole_features()[1])
            for paths in layers
            for path in paths
        }
        super().__init__(shapes, device)
        self.present = {
            path: torch.tensor([name in bank.modules[path].slots for name in adapters])
            for paths in layers
            for path in paths
        }
        # one object: a pass asks one router, whichever experts its sequences are of
        self.training_gates = SigmoidGates(self)

    def parameters(self, layer: int) -> list[Tensor]:
        """The matrices of a layer."""
        return [self.params[f"{path}.weight"] for path in self.layers[layer]]

    def rows_of(self, linears: Sequence[str], x: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors [linears * K, I], and who is on which linear, [linears, K]."""
        none = x.new_zeros(len(self.adapters), x.shape[-1], dtype=torch.float32)
        rows = [self.params.get(f"{path}.weight", none) for path in linears]
        nobody = torch.zeros(len(self.adapters), dtype=torch.bool)
        present = torch.stack([self.present.get(path, nobody) for path in linears])
        return torch.cat(rows), present.to(x.device)

    def linear_gates(self, linears: Sequence[str], x: Tensor) -> Tensor:
        """x [T,I] -> [T, linears * K] fp32; zeros at a linear that no expert is on."""
        (rows, present), width = self.rows_of(linears, x), x.shape[-1]
        # no weights and torch's epsilon: a vector that never trained gives 0, and not NaN
        alike = F.linear(F.layer_norm(x.float(), (width,)), F.layer_norm(rows, (width,)))
        scores = (alike / math.sqrt(width)).view(x.shape[0], *present.shape)
        has_expert = present.any(1)
        absent = ~present & has_expert[:, None]
        gates = softmax_of_largest(
            scores.masked_fill(absent, float("-inf")), self.top_k, self.temperature
        )
        return (gates * has_expert[:, None]).flatten(1)

    def mix(self) -> Mix:
        """Every expert, gated linear by linear."""
        return Mix.layer_routed(self)

    def training_mix(self, role: str) -> Mix:
        """What rows of an expert's own domain train its vectors under: it alone, times the sigmoid.
        Raises ContractError for rows of nobody's."""
        if role not in self.adapters:
            raise ContractError(
                f"a sequence of role {role!r} trains no expert's vectors; the experts are "
                f"{', '.join(self.adapters)}"
            )
        route = self.adapters.index(role)
        return Mix((MixTerm(role, route=route),), self.training_gates)

    def settings(self) -> Mapping[str, Any]:
        """How scores become gates."""
        return {"top_k": self.top_k, "temperature": self.temperature}


class SigmoidGates:
    """The `LinearRouter` of the training of `GateVectors`: each expert's gate by its own vector."""

    def __init__(self, vectors: GateVectors) -> None:
        self.vectors = vectors
        self.adapters, self.halves = vectors.adapters, vectors.halves

    def parameters(self, layer: int) -> list[Tensor]:
        """The matrices of a layer."""
        return self.vectors.parameters(layer)

    def linear_gates(self, linears: Sequence[str], x: Tensor) -> Tensor:
        """x [T,I] -> [T, linears * K] fp32."""
        rows, _ = self.vectors.rows_of(linears, x)
        return F.linear(x.float(), rows).sigmoid()


def attach_gate_vectors(
    model: nn.Module, experts: Sequence[str], *, top_k: int = 2, temperature: float = 1.0
) -> GateVectors:
    """A router over adapters of the model, all zeros. Raises ConfigError."""
    refuse_outside_layers(model, experts)
    bank = get_bank(model)
    refuse_router_name(bank)
    refuse_unweighable(bank, experts)
    on = {path for name in experts for path in bank[name].slots}
    blocks: Any = getattr(model, "blocks", None)
    if blocks is None:  # a model of transformers: each linear asks for itself, in no layer
        layers = [[path for path in find_linears(model) if path in on]]
    else:
        layers = [
            [li.path for group in block.linears for li in group.linears if li.path in on]
            for block in blocks
        ]
    device = next(model.parameters()).device
    router = GateVectors(bank, experts, layers, top_k=top_k, temperature=temperature, device=device)
    bank.routers[ROUTER_NAME] = router
    return router
