"""Llama and its relatives: Llama, SmolLM, Mistral (one family), Qwen2 (biased q, k, v) and Qwen3
(normalised q and k).
"""

from __future__ import annotations

from dataclasses import replace

from lorry.families.common import (
    METADATA_KEYS,
    ROTARY_KEYS,
    UnsupportedConfigError,
    is_full_attention,
    is_wide_window,
    read_rotary,
)
from lorry.families.family import (
    ConfigMapping,
    LayerLinears,
    LayerNorms,
    ModelFamily,
    ModelGeometry,
)

# Order counts: q, k, v are stacked and split in it.
ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")


def llama_geometry(config: ConfigMapping) -> ModelGeometry:
    """Llama's and Mistral's config; biases only where `attention_bias` or `mlp_bias` ask for them.

    Raises UnsupportedConfigError for a partial rotary factor: transformers reads it under some scaling
    rules and not under others.
    """
    heads = config["num_attention_heads"]
    # null means "derive it", as an absent key does
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rotary = read_rotary(config, head_dim)
    if rotary.dim != head_dim:
        raise UnsupportedConfigError(f"partial_rotary_factor={rotary.dim / head_dim}")
    biased = {
        *(ATTENTION_TARGETS if config.get("attention_bias") else ()),
        *(MLP_TARGETS if config.get("mlp_bias") else ()),
    }
    return ModelGeometry(
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=heads,
        # absent in Llama 1 and 2 configs: every head has keys and values of its own
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        mlp_width=config["intermediate_size"],
        vocab=config["vocab_size"],
        context=config.get("max_position_embeddings", 2048),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=config.get("hidden_act", "silu"),
        tied=bool(config.get("tie_word_embeddings", False)),
        rotary=rotary,
        biased=frozenset(biased),
    )


def qwen2_geometry(config: ConfigMapping) -> ModelGeometry:
    """Qwen2: q, k and v always carry a bias, nothing else does."""
    return replace(llama_geometry(config), biased=frozenset(LLAMA.roles.qkv))


def qwen3_geometry(config: ConfigMapping) -> ModelGeometry:
    """Qwen3: heads of 128 unless the config says otherwise."""
    # 128 is the default of transformers' Qwen3Config, which is not width / heads there
    return llama_geometry({"head_dim": 128, **config})


CONFIG_KEYS = ROTARY_KEYS | {
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "tie_word_embeddings",
    "head_dim",
    "attention_bias",
    "mlp_bias",
}

LLAMA = ModelFamily(
    name="llama",
    model_types=("llama", "mistral", "smollm"),
    embed="model.embed_tokens",
    positions=None,
    layer="model.layers.{i}",
    final_norm="model.norm",
    head="lm_head",
    norms=LayerNorms(attn="input_layernorm", mlp="post_attention_layernorm"),
    targets={
        **{t: f"self_attn.{t}" for t in ATTENTION_TARGETS},
        **{t: f"mlp.{t}" for t in MLP_TARGETS},
    },
    roles=LayerLinears(
        qkv=("q_proj", "k_proj", "v_proj"),
        attn_out=("o_proj",),
        mlp_in=("gate_proj", "up_proj"),
        mlp_out=("down_proj",),
    ),
    norm="rms",
    qkv="separate",
    gated=True,
    geometry=llama_geometry,
    reads=CONFIG_KEYS,
    ignores={**METADATA_KEYS, "sliding_window": is_wide_window, "layer_types": is_full_attention},
)

QWEN2 = replace(
    LLAMA,
    name="qwen2",
    model_types=("qwen2",),
    geometry=qwen2_geometry,
    # not read here: its biases are fixed, so a config that sets these keys is not understood and
    # falls back
    reads=CONFIG_KEYS - {"attention_bias", "mlp_bias"},
    ignores={
        **METADATA_KEYS,
        "sliding_window": is_wide_window,
        "use_sliding_window": lambda on, config: (
            # the switch is off in published files whose window is shorter than the context
            not on or is_wide_window(config.get("sliding_window"), config)
        ),
        "max_window_layers": lambda _, config: not config.get("use_sliding_window"),
        "layer_types": is_full_attention,
    },
)

QWEN3 = replace(
    QWEN2,
    name="qwen3",
    model_types=("qwen3",),
    norms=LLAMA.norms._replace(q="self_attn.q_norm", k="self_attn.k_norm"),
    geometry=qwen3_geometry,
    reads=CONFIG_KEYS - {"mlp_bias"},
)
