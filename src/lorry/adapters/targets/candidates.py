"""What of a model an adapter can sit on, and what it cannot."""

from __future__ import annotations

from torch import nn

from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.embedding import BankEmbedding
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.layers.wrapping import is_linear_or_embedding, wrap_module
from lorry.adapters.parameters.experts import ExpertMatrices, find_expert_layers
from lorry.adapters.parameters.weights import find_foreign_weight
from lorry.families import ModelFamily


def find_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear and embedding an adapter can sit on: {path: module}."""
    return {p: m for p, m in model.named_modules() if p and is_adaptable_linear(m)}


def is_adaptable_linear(module: nn.Module) -> bool:
    """Whether it is a linear or an embedding, of the bank or of its own."""
    return isinstance(module, BankLinear | BankEmbedding) or is_linear_or_embedding(module)


def _holders(model: nn.Module) -> set[int]:
    """The ids of another library's layers that hold the base weight of a bank layer: no places of their
    own."""
    return {
        id(holder)
        for module in model.modules()
        if isinstance(module, AdaptableLayer)
        for holder in module.holders
    }


def find_adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """`find_linears` and, as bank layers, what other modules multiply with: fused experts by the path
    of the tensor, and the weight of a router by the path of its module. In model order."""
    found, holders = dict[str, nn.Module](), _holders(model)
    for path, module in model.named_modules():
        if not path or id(module) in holders:
            continue
        if is_adaptable_linear(module):
            found[path] = module
        elif (weight := find_foreign_weight(module, path)) is not None:
            found[path] = weight
        else:
            found.update(find_expert_layers(module, path))
    return found


def head_and_embedding(model: nn.Module) -> tuple[str | None, str | None]:
    """Paths of the output head and the input embedding, from the family or from transformers'
    accessors.
    """
    family: ModelFamily | None = getattr(model, "family", None)
    if family is not None:
        return family.head, family.embed
    paths = {id(m): p for p, m in model.named_modules()}
    matrices = [
        getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("output", "input")
    ]
    head, embed = (paths.get(id(m)) if m is not None else None for m in matrices)
    return head, embed


def find_unadaptable(model: nn.Module) -> tuple[list[str], list[str]]:
    """(tensors that hold all experts of a layer at once, other matrices and larger tensors outside
    linear and embedding layers: convolutions, mixing weights): no adapter can sit on them."""
    adaptable = {
        path if isinstance(layer, ExpertMatrices) else f"{path}.weight"
        for path, layer in find_adaptable(model).items()
    }
    experts: list[str] = []
    others: list[str] = []
    holders = _holders(model)
    for path, module in model.named_modules():
        if (
            id(module) in holders
            or isinstance(module, (AdaptableLayer, nn.Embedding))
            or wrap_module(module, path) is not None
        ):
            continue
        names = [
            name
            for name, parameter in module.named_parameters(recurse=False, prefix=path)
            # the biases of fused experts are a matrix, and as little a target as any bias
            if parameter.dim() >= 2 and name not in adaptable and not name.endswith("bias")
        ]
        fused = "expert" in f"{path}.{type(module).__name__}".lower()
        (experts if fused else others).extend(names)
    return experts, others
