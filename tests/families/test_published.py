"""Configs of published models, numbers as their pages give them, turned into geometries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lorry.families import RotaryConfig, find_family, unsupported_fields


def numbers(
    width: int, mlp: int, layers: int, heads: int, vocab: int, context: int, **more: Any
) -> dict[str, Any]:
    """config.json's long names for the numbers every published model has."""
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        **more,
    }


LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
WINDOW = {"sliding_window": 32768, "max_window_layers": 24, "use_sliding_window": False}
PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "SmolLM2 135M": (
        "llama",
        numbers(
            576,
            1536,
            30,
            9,
            49152,
            8192,
            num_key_value_heads=3,
            rope_theta=100000,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        ),
        {
            "head_dim": 64,
            "kv_heads": 3,
            "tied": True,
            "norm_eps": 1e-5,
            "rotary": RotaryConfig(theta=100000.0, dim=64),
        },
    ),
    "Llama 3.1 8B": (
        "llama",
        numbers(
            *(4096, 14336, 32, 32, 128256, 131072),
            num_key_value_heads=8,
            rope_theta=500000.0,
            rms_norm_eps=1e-5,
            rope_scaling={**LLAMA3, "rope_type": "llama3"},
        ),
        {
            "head_dim": 128,
            "rotary": RotaryConfig(theta=500000.0, dim=128, kind="llama3", scaling=LLAMA3),
        },
    ),
    "Mistral 7B v0.3": (
        "mistral",
        numbers(
            4096,
            14336,
            32,
            32,
            32768,
            32768,
            num_key_value_heads=8,
            rope_theta=1000000.0,
            sliding_window=None,
        ),
        {"head_dim": 128, "kv_heads": 8, "rotary": RotaryConfig(theta=1000000.0, dim=128)},
    ),
    "Qwen2.5 0.5B": (
        "qwen2",
        numbers(
            896,
            4864,
            24,
            14,
            151936,
            32768,
            num_key_value_heads=2,
            rope_theta=1000000.0,
            tie_word_embeddings=True,
            **WINDOW,
        ),
        {"head_dim": 64, "tied": True, "biased": frozenset({"q_proj", "k_proj", "v_proj"})},
    ),
    "Qwen3 0.6B": (
        "qwen3",
        numbers(
            1024,
            3072,
            28,
            16,
            151936,
            40960,
            num_key_value_heads=8,
            head_dim=128,
            rope_theta=1000000,
            tie_word_embeddings=True,
        ),
        {"head_dim": 128, "biased": frozenset(), "rotary": RotaryConfig(theta=1000000.0, dim=128)},
    ),
    "GPT-2": (
        "gpt2",
        {},
        {
            "layers": 12,
            "width": 768,
            "mlp_width": 3072,
            "context": 1024,
            "activation": "gelu_new",
            "tied": True,
            "rotary": None,
        },
    ),
    "Pythia 160M": (
        "gpt_neox",
        numbers(
            768,
            3072,
            12,
            12,
            50304,
            2048,
            rotary_pct=0.25,
            rotary_emb_base=10000,
            use_parallel_residual=True,
        ),
        {
            "head_dim": 64,
            "parallel_residual": True,
            "tied": False,
            "rotary": RotaryConfig(theta=10000.0, dim=16),
        },
    ),
}


@pytest.mark.parametrize(("kind", "config", "expected"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_configs(kind: str, config: dict[str, Any], expected: dict[str, Any]) -> None:
    """As the file says it, and as transformers rewrites it: the same geometry, nothing unsupported."""
    family = find_family(kind)
    assert family is not None
    through = CONFIG_MAPPING[kind].from_dict(config).to_dict()
    assert unsupported_fields(family, through, CONFIG_MAPPING[kind]().to_dict()) == []
    geometry = family.geometry(through)
    assert {k: getattr(geometry, k) for k in expected} == expected
    if config:
        assert (
            replace(family.geometry(config), tied=geometry.tied, norm_eps=geometry.norm_eps)
            == geometry
        )
