"""`lora_bias`: a bias b [O] beside every lora_B, y = W x + s (B A x + b), scaled and weighed as the product
is (PEFT's name and formula). It begins at zero, and dropout leaves it alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.layers.slot import AdapterSlot
from lorry.adapters.spec import LoraSpec
from lorry.adapters.variants.parameters import FurtherStart, zeros
from lorry.errors import ConfigError


def lora_biases(
    model: nn.Module, name: str, spec: LoraSpec, targets: Mapping[str, AdaptableLayer]
) -> dict[str, FurtherStart]:
    """{`MODULE.lora_B.bias`: its start}. Raises ConfigError for an embedding, or a layer that another
    library multiplies."""
    if not spec.lora_bias:
        return {}
    starts = dict[str, FurtherStart]()
    for path, layer in targets.items():
        slices = layer.slices
        if not isinstance(layer, BankLinear) or (slices is not None and slices.sums_ranks):
            raise ConfigError(
                f"{path}: lora_bias is for linear layers of ours or of transformers; leave this one out of "
                "target_modules, or lora_bias away"
            )
        rows = None if slices is None else slices.rows
        size = layer.out_features
        starts[f"{path}.lora_B.bias"] = FurtherStart(
            (size,),
            zeros(size),
            path,
            _use,
            # as an optimizer's groups have it: biases do not decay
            decays=False,
            cut=None if rows is None else (0, rows),
        )
    return starts


def _use(bias: nn.Parameter, slot: AdapterSlot | None) -> None:
    assert slot is not None
    slot.bias = bias
