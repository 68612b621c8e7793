"""Fingerprints of a base model: one that says which base this is, and a quick one that says whether its weights moved.

Both leave adapters out (they are no parameters of the model), count a merged layer by the weight it had before, and count a
tied head once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorry.bank.layers import Adaptable

WHOLE_BYTES = 1 << 30  # bases up to this size are hashed byte by byte
PIECE = 4096  # elements of one piece of a sampled tensor
PIECES = 64  # pieces of each tensor of a larger base
QUICK_PIECES = 2
QUICK_PIECE = 1024

# What, besides the weights, decides the function a base computes; the names transformers' configs use for it.
ESSENTIAL = (
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "hidden_act", "activation_function",
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_parameters", "use_parallel_residual", "tie_word_embeddings",
)  # fmt: skip


def base_digest(model: nn.Module) -> str:
    """Which base this is, 64 hex digits of SHA-256: an adapter is bound to it.

    Covers the config's essentials and, per tensor, name, shape and values rounded to bfloat16, so that a base loaded in fp32
    and the same loaded in bf16 are one base. Above 1 GiB (in bf16) 64 evenly spaced runs of 4096 values stand for each tensor.
    """
    tensors = list(base_tensors(model))
    whole = sum(t.numel() for _, t in tensors) * 2 <= WHOLE_BYTES
    config: Mapping[str, Any] = getattr(model, "config", {})
    essentials = {key: config[key] for key in ESSENTIAL if config.get(key) is not None}
    total = hashlib.sha256(json.dumps(essentials, sort_keys=True, default=str).encode())
    for name, tensor in tensors:
        total.update(f"\n{name} {list(tensor.shape)}\n".encode())
        for piece in [tensor.reshape(-1)] if whole else pieces(tensor, PIECE, PIECES):
            total.update(_bytes(piece.to(torch.bfloat16)))
    return total.hexdigest()


def sample_digest(model: nn.Module, *, whole: bool = False) -> str:
    """Whether any base weight moved: SHA-256 over names, dtypes and the exact bits of two runs of 1024 values per tensor, or with
    ``whole`` of every value. Compare only digests of one process and dtype; no change can hide from ``whole``."""
    total = hashlib.sha256()
    for name, tensor in base_tensors(model):
        total.update(f"\n{name} {tensor.dtype}\n".encode())
        for piece in [tensor.reshape(-1)] if whole else pieces(tensor, QUICK_PIECE, QUICK_PIECES):
            total.update(_bytes(piece))
    return total.hexdigest()


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter of the base in order of name, a tied one once, merged layers by what they keep."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, prefix=path):
            kept = module.kept if isinstance(module, Adaptable) and name.endswith(".weight") else None
            found[name] = parameter.detach() if kept is None else kept.detach()
    seen: set[tuple[int, torch.Size]] = set()
    for name in sorted(found):
        tensor = found[name]
        place = (tensor.data_ptr(), tensor.shape)
        if place in seen:
            continue
        seen.add(place)
        yield name, tensor


def pieces(tensor: Tensor, length: int, count: int) -> list[Tensor]:
    """``count`` evenly spaced runs of ``length`` values, the first and the last among them; all of it when it is short."""
    flat = tensor.reshape(-1)
    last = flat.numel() - length
    if last <= 0 or flat.numel() <= length * count:
        return [flat]
    starts = [round(i * last / (count - 1)) for i in range(count)]
    return [flat[s : s + length] for s in starts]


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.contiguous().cpu().view(torch.uint8).numpy())
