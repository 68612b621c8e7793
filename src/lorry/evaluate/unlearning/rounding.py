"""Weights rounded to int8 and to NF4 and back, in plain torch: what a quantized copy of a model
computes with.

    restored = nf4(weight)      # of the same shape and dtype, 16 levels a block of 64

Unlearning moves weights by little, and rounding can undo it (Zhang et al. 2024, arXiv 2410.16454).
bitsandbytes is not needed, nor a GPU: products are of the restored weights, so what a kernel for
4-bit products adds by its own rounding is not measured. int8 is that of weights alone;
LLM.int8() rounds activations as well.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.layers.wrapping import wrap_module
from lorry.adapters.quantization.packed import Quantization, pack
from lorry.adapters.targets.candidates import find_linears, head_and_embedding

# scales of blocks whole: what the published suites round with
FORMATS = {"nf4": Quantization("nf4", double=False), "int8": Quantization("int8")}


def nf4(weight: Tensor) -> Tensor:
    """[out, in] as NF4 restores it: blocks of 64 along the flattened matrix, each scaled by its largest
    absolute value; the last one may be shorter.
    """
    return pack(weight, FORMATS["nf4"]).open(weight.dtype)


def int8(weight: Tensor) -> Tensor:
    """[out, in] as int8 restores it: a scale for each output, its largest absolute value over 127."""
    return pack(weight, FORMATS["int8"]).open(weight.dtype)


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {"int8": int8, "nf4": nf4}


@torch.no_grad()
def round_linears(
    model: nn.Module, rounding: Callable[[Tensor], Tensor], weights: dict[str, Tensor]
) -> None:
    """Give every linear but the output head the rounding of its weight in ``weights`` (`linear_weights`);
    embeddings and the head stay as they are, as bitsandbytes leaves them in transformers.
    """
    layers = find_linears(model)
    for path, weight in weights.items():
        linear = _as_linear(layers[path], path)
        assert linear is not None
        # [out, in] whatever the layout, or a row's scale would be a column's
        matrix = weight.t() if linear.transposed else weight
        rounded = rounding(matrix)
        stored = rounded.t().contiguous() if linear.transposed else rounded
        # a new Parameter: what shares the old one keeps its values
        layers[path].weight = nn.Parameter(stored, requires_grad=False)


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """{path: weight as it is now} of every linear but the output head."""
    unrounded = set(head_and_embedding(model))
    return {
        path: layer.get_parameter("weight").detach()
        for path, layer in find_linears(model).items()
        if path not in unrounded and _as_linear(layer, path) is not None
    }


def _as_linear(layer: nn.Module, path: str) -> BankLinear | None:
    """The layer as a linear of the bank, whose layout it knows; None for an embedding."""
    wrapped = layer if isinstance(layer, AdaptableLayer) else wrap_module(layer, path)
    return wrapped if isinstance(wrapped, BankLinear) else None
