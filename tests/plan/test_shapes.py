"""Parameter counts against transformers' models built from the same config on the meta device;
adapters against the engine's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lorry.adapters.attach import attach
from lorry.adapters.spec import lora_spec_of
from lorry.config.schema.lora import LoraConfig
from lorry.errors import ConfigError, ModelError
from lorry.families import find_family
from lorry.models.decoder.model import Decoder
from lorry.plan.adapters import largest_rank, plan_adapter
from lorry.plan.known import KNOWN_CONFIGS
from lorry.plan.shapes import read_model_shape
from tests.support.tiny import FOREIGN, VARIANTS

# Billions of parameters as the model's page or its name says them.
PUBLISHED = {
    "smollm2-135m": 0.1345,
    "smollm2-360m": 0.3618,
    "smollm2-1.7b": 1.711,
    "llama-3-8b": 8.030,
    "llama-3-70b": 70.55,
    "llama-3-405b": 405.9,
    "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.72,
    "qwen3-8b": 8.19,
    "mixtral-8x7b": 46.70,
    "qwen3-30b-a3b": 30.53,
    "gpt2": 0.1244,
    "pythia-160m": 0.1623,
}


def parameters(config: dict[str, Any]) -> int:
    """What transformers makes of a config."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        )
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_well_known_models_have_the_published_size(name: str) -> None:
    assert read_model_shape(KNOWN_CONFIGS[name]).parameters / 1e9 == pytest.approx(
        PUBLISHED[name], rel=0.005
    )


@pytest.mark.parametrize(
    "name", ["smollm2-135m", "qwen3-0.6b", "gpt2", "pythia-160m", "mixtral-8x7b", "qwen3-30b-a3b"]
)
def test_well_known_models_against_transformers(name: str) -> None:
    assert read_model_shape(KNOWN_CONFIGS[name]).parameters == parameters(KNOWN_CONFIGS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_against_transformers(name: str) -> None:
    shape = read_model_shape(VARIANTS[name])
    assert shape.parameters == parameters(VARIANTS[name])
    assert shape.native
    assert not shape.estimate


def test_experts_that_a_token_visits() -> None:
    """Qwen3-30B-A3B: its name says that 3 billion parameters are active."""
    shape = read_model_shape(KNOWN_CONFIGS["qwen3-30b-a3b"])
    assert (shape.active_body + shape.head_size + shape.embedding) / 1e9 == pytest.approx(
        3.35, rel=0.01
    )


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"target_modules": "all-linear", "layers_to_transform": [1]},
        {"target_modules": ["lm_head", "embed"]},
        {"target_modules": r".*\.1\..*(proj|dense|c_fc)"},
        {"use_dora": True},
        {"lora_B_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed", "lm_head"], "ensure_weight_tying": True},
        {"trainable_token_indices": [3, 5, 6]},
    ],
    ids=str,
)
def test_adapters_have_the_engines_size(name: str, lora: dict[str, Any]) -> None:
    family = find_family(VARIANTS[name]["model_type"])
    assert family is not None
    config = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, **VARIANTS[name]}
    model = Decoder(family, config)
    described = LoraConfig.model_validate({"r": 4, **lora})
    if name == "llama tied" and "lm_head" in lora.get("target_modules", ""):
        described = described.model_copy(update={"target_modules": ["embed"]})
    adapter = attach(model, lora_spec_of(described))
    planned = plan_adapter(read_model_shape(VARIANTS[name]), described, 4)
    assert planned.parameters == adapter.values.numel()
    assert {s.path for s in planned.matrices} == set(adapter.slots)


def test_ranks_by_pattern_and_what_is_left_out() -> None:
    lora = LoraConfig.model_validate(
        {"r": 4, "rank_pattern": {"q_proj": 16}, "exclude_modules": ["down_proj", "up_proj"]}
    )
    matrices = plan_adapter(read_model_shape(VARIANTS["llama"]), lora, 4).matrices
    assert {s.rank for s in matrices if s.path.endswith("q_proj")} == {16}
    assert {s.rank for s in matrices if not s.path.endswith("q_proj")} == {4}
    assert not [s for s in matrices if s.path.endswith(("down_proj", "up_proj"))]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"target_modules": ["q_prj"]},
            r"lora.target_modules names 'q_prj', which matches no layer .did you mean 'q_proj'\?",
        ),
        ({"target_modules": "nothing.*"}, "lora.target_modules='nothing.*' matches no layer"),
        (
            {"layers_to_transform": [2]},
            "lora.layers_to_transform names layer 2; this model has layers 0 to 1",
        ),
        ({"exclude_modules": ".*"}, "leave no layer"),
    ],
)
def test_names_that_match_nothing(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_adapter(read_model_shape(VARIANTS["llama"]), LoraConfig.model_validate(lora), 4)


def test_the_largest_rank_is_no_wider_than_any_matrix() -> None:
    """SmolLM2's keys are 192 wide: a rank of 256 would add nothing there."""
    assert largest_rank(read_model_shape(KNOWN_CONFIGS["smollm2-135m"]), LoraConfig()) == 192
    assert largest_rank(read_model_shape(KNOWN_CONFIGS["llama-3-8b"]), LoraConfig()) == 256


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere"])
def test_other_architectures_are_estimates_that_say_so(kind: str) -> None:
    shape = read_model_shape(FOREIGN[kind])
    assert not shape.native
    assert shape.estimate
    assert kind in shape.why
    assert shape.parameters == pytest.approx(parameters(FOREIGN[kind]), rel=0.25)


def test_a_window_shorter_than_the_context_is_not_native() -> None:
    shape = read_model_shape({**VARIANTS["mistral"], "sliding_window": 8})
    assert "sliding_window=8" in shape.why


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no model_type"),
        (
            {"model_type": "bloom", "n_layer": 2},
            r"no num_attention_heads; this architecture \(bloom\) cannot be planned",
        ),
        ({**VARIANTS["llama"], "hidden_size": "wide"}, "unusable numbers"),
        (
            {**VARIANTS["llama"], "num_hidden_layers": 0},
            "layers is 0; a whole number of at least 1",
        ),
        ({**VARIANTS["llama"], "vocab_size": True}, "vocab is True"),
    ],
)
def test_configs_that_cannot_be_planned(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_model_shape(config)
