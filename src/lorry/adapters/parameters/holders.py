"""What other rooms ask about modules that hold a tensor with adapters of its own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lorry.adapters.adapter import Adapter
from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.parameters.experts import ExpertMatrices, expert_layers
from lorry.adapters.parameters.weights import WEIGHT, ForeignWeight, foreign_weight_of
from lorry.errors import ConfigError


def unmerged_parameter(holder: nn.Module, leaf: str) -> nn.Parameter | None:
    """What a merge has put aside for a tensor of a module; None where it has not."""
    weight = foreign_weight_of(holder) if leaf == WEIGHT else None
    layer = expert_layers(holder).get(leaf) if weight is None else weight
    return None if layer is None else layer.unmerged_weight


def refuse_adapter_at_parameters(
    adapter: Adapter, modules: Mapping[str, AdaptableLayer], what: str
) -> None:
    """Raise ConfigError for an adapter on fused experts or on a router, where ``what`` knows linears
    alone."""
    for path in at_parameters(adapter, modules):
        raise ConfigError(
            f"adapter {adapter.name!r} is on {path}, and {what} takes adapters on linears and "
            "embeddings alone"
        )


def at_parameters(adapter: Adapter, modules: Mapping[str, AdaptableLayer]) -> list[str]:
    """The fused experts and routers that an adapter is on."""
    return [p for p in adapter.slots if isinstance(modules[p], ExpertMatrices | ForeignWeight)]
