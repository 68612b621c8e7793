"""GPT-NeoX (Pythia): q, k, v interleaved by head in one matrix, partial rotary, attention and MLP
side by side.
"""

from __future__ import annotations

from lorry.families.common import METADATA_KEYS, ROTARY_KEYS, read_rotary
from lorry.families.family import (
    ConfigMapping,
    LayerLinears,
    LayerNorms,
    ModelFamily,
    ModelGeometry,
)


def neox_geometry(config: ConfigMapping) -> ModelGeometry:
    """Pythia's config: rotary on a quarter of each head by default, parallel residual unless
    switched off.
    """
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = width // heads
    biased = {
        "dense_h_to_4h",
        "dense_4h_to_h",
        # the MLP's biases are always there; only attention's can be switched off
        *(("query_key_value", "dense") if config.get("attention_bias", True) else ()),
    }
    return ModelGeometry(
        layers=config["num_hidden_layers"],
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        mlp_width=config["intermediate_size"],
        vocab=config["vocab_size"],
        context=config.get("max_position_embeddings", 2048),
        norm_eps=config.get("layer_norm_eps", 1e-5),
        activation=config.get("hidden_act", "gelu"),
        tied=bool(config.get("tie_word_embeddings", False)),
        # transformers' default rotary_pct of GPT-NeoX
        rotary=read_rotary(config, head_dim, default_partial_factor=0.25),
        biased=frozenset(biased),
        parallel_residual=bool(config.get("use_parallel_residual", True)),
    )


NEOX = ModelFamily(
    name="gpt_neox",
    model_types=("gpt_neox",),
    embed="gpt_neox.embed_in",
    positions=None,
    layer="gpt_neox.layers.{i}",
    final_norm="gpt_neox.final_layer_norm",
    head="lm_head",
    # transformers renamed the module; published checkpoints still have the old name
    on_disk={"lm_head": "embed_out"},
    norms=LayerNorms(attn="input_layernorm", mlp="post_attention_layernorm"),
    targets={
        "query_key_value": "attention.query_key_value",
        "dense": "attention.dense",
        "dense_h_to_4h": "mlp.dense_h_to_4h",
        "dense_4h_to_h": "mlp.dense_4h_to_h",
    },
    roles=LayerLinears(
        qkv=("query_key_value",),
        attn_out=("dense",),
        mlp_in=("dense_h_to_4h",),
        mlp_out=("dense_4h_to_h",),
    ),
    norm="layer",
    qkv="heads",
    gated=False,
    geometry=neox_geometry,
    reads=ROTARY_KEYS
    | {
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "layer_norm_eps",
        "hidden_act",
        "tie_word_embeddings",
        "use_parallel_residual",
        "attention_bias",
    },
    ignores=METADATA_KEYS,
)
