"""DoRA (`LoraSpec.use_dora`): a magnitude at every module, which begins as the norms of the rows of
W + s B A, so that the model begins as it was. `magnitude` is what layers compute with it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.layers.slot import AdapterSlot
from lorry.adapters.spec import LoraSpec
from lorry.adapters.variants.magnitude import weight_norm
from lorry.adapters.variants.parameters import FurtherStart

SUFFIX = "lora_magnitude_vector"  # PEFT's, without .weight


def magnitudes(
    model: nn.Module, name: str, spec: LoraSpec, targets: Mapping[str, AdaptableLayer]
) -> dict[str, FurtherStart]:
    """{`MODULE.lora_magnitude_vector`: its start} of a DoRA adapter. Raises ConfigError for a layer whose
    matrix is not at hand."""
    if not spec.use_dora:
        return {}
    starts = dict[str, FurtherStart]()
    for path, layer in targets.items():
        layer.check_matrix()
        rows = None if layer.slices is None else layer.slices.rows
        size = layer.out_features
        starts[f"{path}.{SUFFIX}"] = FurtherStart(
            (size,),
            partial(_norm, layer),
            path,
            _use,
            cut=None if rows is None else (0, rows),
        )
    return starts


def _norm(layer: AdaptableLayer, slot: AdapterSlot | None) -> Tensor:
    assert slot is not None
    return weight_norm(layer, slot)


def _use(magnitude: nn.Parameter, slot: AdapterSlot | None) -> None:
    assert slot is not None
    slot.magnitude = magnitude


def fold_magnitude(layer: AdaptableLayer, slot: AdapterSlot, exact: Tensor) -> None:
    """(W + s B A) -> c (W + s B A), in place, in the layout of the stored weight, fp32."""
    assert slot.magnitude is not None
    # rows of W: those of a linear as it is stored, the columns of a Conv1D or of a table
    dim = 1 if isinstance(layer, BankLinear) and not layer.transposed else 0
    norm = torch.linalg.vector_norm(exact, dim=dim)
    factor = torch.where(norm > 0, slot.magnitude.detach() / norm, 0.0)
    exact.mul_(factor.unsqueeze(dim))
