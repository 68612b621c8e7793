"""Llama, Qwen2 and Qwen3: the tensor of one of Megatron's names, by Transformer Engine's naming."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .common import merge_qkv, strip_mcore_wrappers

WHOLE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}
IN_LAYER = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}


def qwen_hf_tensor(name: str, reader: Mapping[str, Tensor], config: Any) -> Tensor:
    name = strip_mcore_wrappers(name)
    if name in WHOLE:
        return reader[WHOLE[name]]
    if name == "output_layer.weight":
        tied = config.tie_word_embeddings or "lm_head.weight" not in reader
        return reader["model.embed_tokens.weight" if tied else "lm_head.weight"]
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match:
        prefix, rest = f"model.layers.{match[1]}.", match[2]
        if rest in IN_LAYER:
            return reader[prefix + IN_LAYER[rest]]
        if fused := re.fullmatch(r"self_attention\.linear_qkv\.(weight|bias)", rest):
            q, k, v = (reader[f"{prefix}self_attn.{p}_proj.{fused[1]}"] for p in "qkv")
            return merge_qkv(q, k, v, config)
        if rest == "mlp.linear_fc1.weight":
            return torch.cat([reader[f"{prefix}mlp.{p}_proj.weight"] for p in ("gate", "up")])
    raise KeyError(f"Unsupported Qwen/Llama Megatron parameter {name!r}")
