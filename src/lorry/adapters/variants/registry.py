"""The variants that give an adapter parameters beside its A's and B's, in the order in which these lie in
its buffer: one line each."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.spec import LoraSpec
from lorry.adapters.variants.adalora import adalora_starts
from lorry.adapters.variants.dora import magnitudes
from lorry.adapters.variants.lora_bias import lora_biases
from lorry.adapters.variants.parameters import FurtherStart, Variant
from lorry.adapters.variants.starts import biases, saved_modules, token_rows

VARIANTS: tuple[Variant, ...] = (
    magnitudes,
    lora_biases,
    adalora_starts,
    biases,
    token_rows,
    saved_modules,
)


def further_starts(
    model: nn.Module, name: str, spec: LoraSpec, targets: Mapping[str, AdaptableLayer]
) -> dict[str, FurtherStart]:
    """{canonical name: start} of all that the adapter ``name`` of this spec has beside the A's and B's of
    its targets. Raises ConfigError for what the model cannot have."""
    starts = dict[str, FurtherStart]()
    for variant in VARIANTS:
        starts |= variant(model, name, spec, targets)
    return starts
