"""Qwen2's and Qwen3's: Llama's with biases of q, k and v, and with norms of q and k."""

from __future__ import annotations

import re
from argparse import Namespace

from torch import Tensor

from .llama import convert_llama_to_hf, split_qkv


def convert_qwen2_to_hf(args: Namespace, name: str, param: Tensor) -> list[tuple[str, Tensor]]:
    match = re.match(r"module\.module\.decoder\.layers\.(\d+)\.self_attention\.(.+)", name)
    if match:
        prefix, rest = f"model.layers.{match[1]}.self_attn.", match[2]
        if rest == "linear_qkv.bias":
            parts = zip("qkv", split_qkv(args, param), strict=True)
            return [(f"{prefix}{p}_proj.bias", part) for p, part in parts]
        if rest in ("q_layernorm.weight", "k_layernorm.weight"):
            return [(f"{prefix}{rest[0]}_norm.weight", param)]
    return convert_llama_to_hf(args, name, param)
