"""A Megatron model's weights with its adapters in them, beside the model: for an export, or for sending
a policy to an engine that knows no adapters. The model itself is never written to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lorry.integrations.megatron.attach import get_adapter, list_chunks
from lorry.integrations.megatron.linear import SIDES, LoraParallelLinear


def merged_named_parameters(chunk: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of every base parameter of a chunk, this rank's part: W + s B A, computed in fp32 and
    rounded once, where an adapter is on it; else the parameter itself. Adapters' parameters are left
    out.

    No rank needs another one: a part of W gets its part of the sum. One matrix at a time is beside the
    model while the caller has not asked for the next.
    """
    (chunk,) = list_chunks(chunk)
    get_adapter(chunk)  # refuses a chunk without adapters
    for name, _ in chunk.named_parameters():
        if ".lora_" not in name:
            yield name, merged_parameter(chunk, name)


def merged_parameter(chunk: nn.Module, name: str) -> Tensor:
    """One base parameter with its adapter in it, if there is one on it."""
    path, _, leaf = name.rpartition(".")
    module = chunk.get_submodule(path)
    if isinstance(module, LoraParallelLinear) and leaf == "weight":
        return merged_weight(module)
    return chunk.get_parameter(name).detach()


@torch.no_grad()
def merged_weight(linear: LoraParallelLinear, values: Mapping[str, Tensor] | None = None) -> Tensor:
    """This rank's part of W + s B A [out, in], in W's dtype, new memory on the linear's device.
    ``values``: copies of the linear's parameters by their names (`weight`, `lora_A_q` ...), from
    wherever they are kept; by default the parameters themselves."""
    lora = linear.lora
    device = linear.get_parameter("weight").device

    def value(name: str) -> Tensor:
        return linear.get_parameter(name) if values is None else values[name]

    weight = value("weight")
    exact = torch.promote_types(weight.dtype, torch.float32)
    merged = weight.to(device, exact, copy=True)
    # by projection: views of the merged rows, into which each term is added
    rows = merged.unflatten(0, (lora.order.groups, sum(lora.order.sizes)))
    parts = dict(zip(lora.place.targets, rows.split(lora.order.sizes, 1), strict=True))
    for term in lora.terms:
        a, b = (value(term.parameter(side)).to(device, exact) for side in SIDES)
        delta = term.scale * (b @ a)
        if len(term.targets) == 1:
            part = parts[term.targets[0]]
            part.add_(delta.view(part.shape))
        else:
            merged.add_(delta)
    return merged.to(weight.dtype)
