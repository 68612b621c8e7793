"""A mixture of experts whose weights train, its routers aside; of transformers' own classes."""

from __future__ import annotations

import pytest
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from lorry.adapters.base_weights import make_weights_trainable
from lorry.errors import ConfigError
from lorry.models.hf.model import HfModel

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def test_every_other_weight_trains() -> None:
    mixtral = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2))
    qwen = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SIZES,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=8,
        )
    )
    for model, gates in ((mixtral, {"gate"}), (qwen, {"gate", "shared_expert_gate"})):
        wrapped = HfModel(model)
        everything = {name for name, _ in wrapped.named_parameters()}
        routers = {f"model.layers.{n}.mlp.{gate}.weight" for n in (0, 1) for gate in gates}
        assert routers < everything
        trained = make_weights_trainable(wrapped, "all-but-router")
        assert set(trained.targets()) == everything - routers
        frozen = {name for name, p in wrapped.named_parameters() if not p.requires_grad}
        assert frozen == routers


def test_a_dense_model_has_no_router() -> None:
    model = HfModel(LlamaForCausalLM(LlamaConfig(**SIZES)))
    with pytest.raises(ConfigError, match="this model has no router; give all"):
        make_weights_trainable(model, "all-but-router")
