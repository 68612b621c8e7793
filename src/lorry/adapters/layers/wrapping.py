"""Layers of a bank in the place of foreign linears and embeddings."""

from __future__ import annotations

from torch import nn

from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.embedding import BankEmbedding
from lorry.adapters.layers.linear import BankLinear

# of transformers, by name: to ask for the classes would import them. A linear [in, out]; Falcon's linear, which
# is one that spells out x W^T + b; embeddings times a constant, `embed_scale` (Gemma's, BART's)
CONV1D, FALCON, SCALED = "Conv1D", "FalconLinear", "ScaledWordEmbedding"


def is_linear_or_embedding(module: nn.Module) -> bool:
    """Whether `wrap_module` knows a foreign module. Only these classes count: another subclass computes
    something else. Its weight is not looked at: FSDP1 leaves a view in a parameter's place."""
    kind = type(module)
    if isinstance(module, nn.Embedding):
        # with a max_norm it changes its weight as it runs
        return module.max_norm is None and (kind is nn.Embedding or _only_scales(module))
    return kind is nn.Linear or kind.__name__ in (CONV1D, FALCON)


def _only_scales(module: nn.Embedding) -> bool:
    """Whether it is rows times a constant and no more: T5Gemma 2's has a parameter beside them, which takes a row's
    place."""
    named = type(module).__name__.endswith(SCALED) and hasattr(module, "embed_scale")
    return named and not module._parameters.keys() - {"weight"}


def wrap_module(module: nn.Module, path: str) -> AdaptableLayer | None:
    """The bank layer that takes a foreign module's place and shares its parameters, or None if it
    is no linear or embedding.
    """
    if not is_linear_or_embedding(module):
        return None
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    if isinstance(module, nn.Embedding):
        return BankEmbedding(weight, path=path, embed_scale=getattr(module, "embed_scale", None))
    return BankLinear(
        weight,
        bias if isinstance(bias, nn.Parameter) else None,
        transposed=type(module).__name__ == CONV1D,
        path=path,
    )
