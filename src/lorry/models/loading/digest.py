"""A fingerprint of the base's weights, to see that training left every bit of them alone.

Adapters are left out (they are no parameters of the model) unless whoever asks gives the frozen ones:
those that a run is trained over are as much a part of what it must not move. A merged layer counts by
the weight it had before, a tied head once. Which base an adapter belongs to is another question,
answered by `adapters.peft.base_digest.base_digest`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.parameters.holders import unmerged_parameter
from lorry.models.layer_weights import WHOLE_WEIGHTS, LayerWeights

# Two runs of a tensor: an optimizer that touched it moved nearly all of its values.
PIECE_COUNT = 2
PIECE_VALUES = 1024


def sample_digest(
    model: nn.Module,
    *,
    whole: bool = False,
    trained: Collection[Tensor] = (),
    frozen: Mapping[str, Tensor] = MappingProxyType({}),
) -> str:
    """Whether any base weight moved: SHA-256 over names, dtypes and the exact bits of two runs of
    1024 values per tensor, or with ``whole`` of every value; "" if there is none to look at.
    ``trained``: parameters that are meant to move; ``frozen``: what else is not, {name: tensor}.
    Compare only digests of one process and dtype; no change can hide from ``whole``.
    """
    total, seen = hashlib.sha256(), False
    weights: LayerWeights = getattr(model, "layer_weights", WHOLE_WEIGHTS)
    # the caller has tensors, not the names they have here
    moving = {_memory(tensor, weights) for tensor in trained}
    base = (
        (n, tensor) for n, tensor, owner in _owners(model) if _memory(owner, weights) not in moving
    )
    for name, tensor in (*base, *frozen.items()):
        seen = True
        # separators: neither name nor values can be mistaken for the other
        total.update(f"\n{name} {tensor.dtype}\n".encode())
        runs = [(0, tensor.numel())] if whole else sample_runs(tensor.numel())
        for start, stop in runs:
            total.update(_as_bytes(weights.values_from(tensor, start, stop)))
    return total.hexdigest() if seen else ""


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter of the base in order of name, a tied one once, merged
    layers by their unmerged weight.
    """
    yield from ((name, tensor) for name, tensor, _ in _owners(model))


def _owners(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """`base_tensors`, and the parameter or unmerged weight that each is."""
    weights: LayerWeights = getattr(model, "layer_weights", WHOLE_WEIGHTS)
    tensors = dict[str, tuple[Tensor, Tensor]]()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, prefix=path):
            unmerged = (
                module.unmerged_weight
                if isinstance(module, AdaptableLayer) and name.endswith(".weight")
                else unmerged_parameter(module, name.rpartition(".")[2])
            )
            owner = parameter if unmerged is None else unmerged
            tensors[name] = (owner.detach(), owner)
    seen: set[tuple[int, torch.Size]] = set()
    for name in sorted(tensors):
        tensor, owner = tensors[name]
        # address and shape: an empty tensor shares address 0 with others, as an empty share does
        memory = (_memory(owner, weights), tensor.shape)
        if memory in seen:
            continue
        seen.add(memory)
        yield name, tensor, owner


def _memory(tensor: Tensor, weights: LayerWeights) -> int:
    """What tells a tensor from others: its address, or of a share, which may be empty, the object."""
    return id(tensor) if weights.sharded else tensor.data_ptr()


def sample_runs(size: int) -> list[tuple[int, int]]:
    """(start, stop) of PIECE_COUNT evenly spaced runs of PIECE_VALUES among ``size`` values, the first
    and the last among them; all of them when they are few.
    """
    last = size - PIECE_VALUES
    if size <= PIECE_VALUES * PIECE_COUNT:
        return [(0, size)]
    starts = (round(i * last / (PIECE_COUNT - 1)) for i in range(PIECE_COUNT))
    return [(start, start + PIECE_VALUES) for start in starts]


def _as_bytes(values: Tensor) -> memoryview:
    # bytes: numpy has no bf16
    return values.contiguous().cpu().view(torch.uint8).numpy().data
