"""GPT-2: learned positions, layer norm with bias, fused c_attn, and weights stored input-major
(transformers' Conv1D).
"""

from __future__ import annotations

from lorry.families.common import METADATA_KEYS
from lorry.families.family import (
    ConfigMapping,
    LayerLinears,
    LayerNorms,
    ModelFamily,
    ModelGeometry,
)


def gpt2_geometry(config: ConfigMapping) -> ModelGeometry:
    """GPT-2's own key names; every linear and norm has a bias; the head is tied."""
    width, heads = config["n_embd"], config["n_head"]
    return ModelGeometry(
        layers=config["n_layer"],
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        # null in published configs: four times the width
        mlp_width=config.get("n_inner") or 4 * width,
        vocab=config["vocab_size"],
        context=config["n_positions"],
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=config.get("activation_function", "gelu_new"),
        tied=bool(config.get("tie_word_embeddings", True)),
        # positions are learned vectors, added once to the embeddings
        rotary=None,
        # looked up when called: GPT2 is defined below
        biased=frozenset(GPT2.targets),
    )


GPT2 = ModelFamily(
    name="gpt2",
    model_types=("gpt2",),
    embed="transformer.wte",
    positions="transformer.wpe",
    layer="transformer.h.{i}",
    final_norm="transformer.ln_f",
    head="lm_head",
    norms=LayerNorms(attn="ln_1", mlp="ln_2"),
    targets={
        "c_attn": "attn.c_attn",
        "c_proj": "attn.c_proj",
        "c_fc": "mlp.c_fc",
        # two linears are called c_proj; this one needs a name of its own to be a target
        "mlp_c_proj": "mlp.c_proj",
    },
    roles=LayerLinears(
        qkv=("c_attn",), attn_out=("c_proj",), mlp_in=("c_fc",), mlp_out=("mlp_c_proj",)
    ),
    norm="layer",
    qkv="thirds",
    gated=False,
    # transformers' Conv1D keeps [in, out]
    transposed=True,
    geometry=gpt2_geometry,
    reads=frozenset(
        {
            "n_embd",
            "n_head",
            "n_layer",
            "n_inner",
            "vocab_size",
            "n_positions",
            "layer_norm_epsilon",
            "activation_function",
        }
    ),
    ignores=METADATA_KEYS,
)
