"""Layers of a bank in the place of foreign linears and embeddings."""

from __future__ import annotations

from torch import nn

from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.embedding import BankEmbedding
from lorry.adapters.layers.linear import BankLinear


def is_linear_or_embedding(module: nn.Module) -> bool:
    """Whether `wrap_module` knows a foreign module. Only the exact classes count: a subclass computes
    something else. Its weight is not looked at: FSDP1 leaves a view in a parameter's place."""
    return type(module) in (nn.Linear, nn.Embedding) or type(module).__name__ == "Conv1D"


def wrap_module(module: nn.Module, path: str) -> AdaptableLayer | None:
    """The bank layer that takes a foreign module's place and shares its parameters, or None if it
    is no linear or embedding.
    """
    if not is_linear_or_embedding(module):
        return None
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    if isinstance(module, nn.Embedding):
        return BankEmbedding(weight, path=path)
    return BankLinear(
        weight,
        bias if isinstance(bias, nn.Parameter) else None,
        transposed=type(module).__name__ == "Conv1D",
        path=path,
    )
