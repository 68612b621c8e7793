"""Tiny models of the families that Megatron takes, and PEFT adapters on them, as their own libraries write
them. No megatron here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES: dict[str, Any] = {
    "vocab_size": 27,  # odd: Megatron pads it
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "tie_word_embeddings": False},
    "llama-deep": {**SIZES, "tie_word_embeddings": False, "num_hidden_layers": 4},
    # k as wide as q
    "llama-mha": {**SIZES, "tie_word_embeddings": False, "num_key_value_heads": 4},
    "qwen2": {**SIZES, "tie_word_embeddings": True},
    "qwen3": {**SIZES, "tie_word_embeddings": False, "head_dim": 16},
}
# fused: one A for q, k and v, one for gate and up, as its export has them
TIED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ADAPTERS: dict[str, dict[str, Any]] = {
    "canonical": {"rank_pattern": {"down_proj": 2, "k_proj": 1}, "alpha_pattern": {"v_proj": 5}},
    "fused": {"use_rslora": True},
    "few": {"target_modules": ["v_proj", "up_proj", "o_proj"], "layers_to_transform": [1]},
}


def make_model(name: str, folder: Path) -> None:
    torch.manual_seed(3)
    config = CONFIG_MAPPING[name.partition("-")[0]](**MODELS[name])
    model = AutoModelForCausalLM.from_config(config)
    for path, parameter in model.named_parameters():
        parameter.data.normal_(mean=float("norm" in path), std=0.2)
    model.save_pretrained(folder / name)
    for kind, settings in ADAPTERS.items():
        given = {"target_modules": "all-linear", **settings}
        peft = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder / name),
            LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **given),
        )
        values = {n: p for n, p in peft.named_parameters() if "lora_" in n}
        for path, parameter in values.items():
            parameter.data.normal_(std=0.1)
            first = next((group[0] for group in TIED_INPUTS if path.split(".")[-4] in group), None)
            if kind == "fused" and "lora_A" in path and first:
                parameter.data.copy_(values[path.replace(path.split(".")[-4], first)].data)
        peft.save_pretrained(folder / f"{name}-{kind}")
