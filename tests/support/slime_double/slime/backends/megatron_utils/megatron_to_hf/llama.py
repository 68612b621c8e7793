"""Llama's names, which are those of its kin, by Transformer Engine's naming."""

from __future__ import annotations

import re
from argparse import Namespace

from torch import Tensor

WHOLE = {
    "module.module.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "module.module.output_layer.weight": "lm_head.weight",
    "module.module.decoder.final_layernorm.weight": "model.norm.weight",
}
IN_LAYER = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
}


def split_qkv(args: Namespace, param: Tensor) -> list[Tensor]:
    """q, k, v of rows that lie by KV group."""
    head = args.kv_channels or args.hidden_size // args.num_attention_heads
    queries = args.num_attention_heads // args.num_query_groups * head
    rows = param.view(args.num_query_groups, queries + 2 * head, *param.shape[1:])
    parts = rows.split([queries, head, head], 1)
    return [part.reshape(-1, *param.shape[1:]) for part in parts]


def convert_llama_to_hf(args: Namespace, name: str, param: Tensor) -> list[tuple[str, Tensor]]:
    if name in WHOLE:
        return [(WHOLE[name], param)]
    match = re.match(r"module\.module\.decoder\.layers\.(\d+)\.(.+)", name)
    if match:
        prefix, rest = f"model.layers.{match[1]}.", match[2]
        if rest in IN_LAYER:
            return [(prefix + IN_LAYER[rest], param)]
        if rest == "self_attention.linear_qkv.weight":
            parts = zip("qkv", split_qkv(args, param), strict=True)
            return [(f"{prefix}self_attn.{p}_proj.weight", part) for p, part in parts]
        if rest == "mlp.linear_fc1.weight":
            gate, up = param.chunk(2)
            return [(f"{prefix}mlp.gate_proj.weight", gate), (f"{prefix}mlp.up_proj.weight", up)]
    raise ValueError(f"Unknown parameter name: {name}")
