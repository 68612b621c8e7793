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
import torch.nn.functional as F
from torch import Tensor, nn

from lorry.adapters.attach import find_linears, head_and_embedding
from lorry.adapters.bank import wrap_module
from lorry.adapters.layers import AdaptableLayer, BankLinear

# The 16 levels of NF4: quantiles of a normal distribution, scaled to [-1, 1], one of them 0
# (Dettmers et al. 2023, arXiv 2305.14314, appendix E)
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
NF4_BLOCK = 64  # consecutive weights that share a scale; QLoRA's and bitsandbytes'
INT8_MOST = 127


def nf4(weight: Tensor) -> Tensor:
    """[out, in] as NF4 restores it: blocks along the flattened matrix, each scaled by its largest
    absolute value; the last one may be shorter.
    """
    flat = weight.detach().float().reshape(-1)
    # zeros change no block's largest absolute value
    blocks = F.pad(flat, (0, -flat.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS, device=flat.device)
    # a block of zeros has no scale; it stays one
    shares = blocks / scales.where(scales > 0, 1.0)
    nearest = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2)
    restored = (levels[nearest] * scales).reshape(-1)[: flat.numel()]
    return restored.view(weight.shape).to(weight.dtype)


def int8(weight: Tensor) -> Tensor:
    """[out, in] as int8 restores it: a scale for each output, its largest absolute value over 127."""
    scales = weight.detach().float().abs().amax(1, keepdim=True) / INT8_MOST
    whole = (weight.detach().float() / scales.where(scales > 0, 1.0)).round()
    return (whole * scales).to(weight.dtype)


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
