"""A TransformerConfig of the command line's values."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields

import torch
from megatron.core.transformer import TransformerConfig
from torch.nn import functional

# what is fused needs a GPU
UNFUSED = (
    "masked_softmax_fusion",
    "bias_dropout_fusion",
    "bias_activation_fusion",
    "apply_rope_fusion",
    "gradient_accumulation_fusion",
    "persist_layer_norm",
)


def core_transformer_config_from_args(args: Namespace) -> TransformerConfig:
    own = {
        f.name: getattr(args, f.name) for f in fields(TransformerConfig) if hasattr(args, f.name)
    }
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    own |= {
        "layernorm_epsilon": args.norm_epsilon,
        "num_moe_experts": args.num_experts,
        "gated_linear_unit": args.swiglu,
        "activation_func": functional.silu if args.swiglu else functional.gelu,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "kv_channels": args.kv_channels or args.hidden_size // args.num_attention_heads,
        "perform_initialization": False,
        "variable_seq_lengths": False,
        **dict.fromkeys(UNFUSED, False),
    }
    return TransformerConfig(**own)
