"""Configs of well-known models by name, so that they can be planned without a download. Numbers as
their pages publish them.
"""

from __future__ import annotations

from typing import Any


def _llama_config(
    width: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, context: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
        **more,
    }


def _qwen3_config(
    width: int, mlp: int, layers: int, heads: int, *, tied: bool, **more: Any
) -> dict[str, Any]:
    kind = {"model_type": "qwen3", "head_dim": 128, "tie_word_embeddings": tied}
    return {**_llama_config(width, mlp, layers, heads, 8, 151936, 40960), **kind, **more}


def _neox_config(width: int, mlp: int, layers: int, heads: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }


MIXTRAL_CONFIG = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN3_MOE_CONFIG = {
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
}

KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m": _llama_config(576, 1536, 30, 9, 3, 49152, 8192, tie_word_embeddings=True),
    "smollm2-360m": _llama_config(960, 2560, 32, 15, 5, 49152, 8192, tie_word_embeddings=True),
    "smollm2-1.7b": _llama_config(2048, 8192, 24, 32, 32, 49152, 8192, tie_word_embeddings=True),
    "llama-3-8b": _llama_config(4096, 14336, 32, 32, 8, 128256, 131072),
    "llama-3-70b": _llama_config(8192, 28672, 80, 64, 8, 128256, 131072),
    "llama-3-405b": _llama_config(16384, 53248, 126, 128, 8, 128256, 131072),
    "qwen3-0.6b": _qwen3_config(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3_config(2048, 6144, 28, 16, tied=True),
    "qwen3-8b": _qwen3_config(4096, 12288, 36, 32, tied=False),
    "mixtral-8x7b": _llama_config(4096, 14336, 32, 32, 8, 32000, 32768, **MIXTRAL_CONFIG),
    "qwen3-30b-a3b": _qwen3_config(
        2048, 6144, 48, 32, tied=False, moe_intermediate_size=768, **QWEN3_MOE_CONFIG
    ),
    "qwen3-235b-a22b": _qwen3_config(
        4096, 12288, 94, 64, tied=False, moe_intermediate_size=1536, **QWEN3_MOE_CONFIG
    ),
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
    "pythia-160m": _neox_config(768, 3072, 12, 12, 50304),
}
# Lorry's embedded default has the published model's shape.
KNOWN_CONFIGS["smollm2-135m-instruct"] = KNOWN_CONFIGS["smollm2-135m"]
