"""A Hugging Face checkpoint in Megatron's GPTModel computes what transformers computes, or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip(
    "megatron.core", reason="megatron-core is an extra: pip install 'lorry[megatron]'"
)

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from lorry.errors import ModelError
from lorry.integrations.megatron import load_hf_weights
from tests.support.megatron_gradients import LENGTH, Case, batch, build

pytestmark = [
    pytest.mark.usefixtures("alone"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # what Megatron says of absent packages
]


def logits(model: nn.Module) -> torch.Tensor:
    tokens = batch(27)
    mask = torch.triu(torch.ones(1, 1, LENGTH, LENGTH), 1).bool()
    result: torch.Tensor = model(tokens, torch.arange(LENGTH).expand(tokens.shape), mask)
    return result[..., :27]


@pytest.mark.parametrize("te", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_logits_are_transformers(models: Path, name: str, te: bool) -> None:
    (model,) = build(Case(str(models / name), "", te=te, dtype="float32"))
    load_hf_weights(model, models / name)
    true = AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            logits(model), true(input_ids=batch(27)).logits, rtol=1e-4, atol=1e-5
        )


def test_norms_stored_less_one(models: Path) -> None:
    (model,) = build(Case(str(models / "llama"), "", dtype="float32"))
    model.config.layernorm_zero_centered_gamma = True
    load_hf_weights(model, models / "llama")
    stored = load_file(models / "llama" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(model.get_parameter("decoder.final_layernorm.weight"), stored - 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layernorm_epsilon": 1e-3}, "layernorm_epsilon"),
        ({"num_query_groups": 4}, "num_query_groups of the Megatron model is 4"),
        ({"activation_func": torch.nn.functional.gelu}, "activation_func"),
        ({"rotary_interleaved": True}, "rotary_interleaved"),
    ],
)
def test_another_model_is_refused_by_its_setting(
    models: Path, change: dict[str, Any], words: str
) -> None:
    (model,) = build(Case(str(models / "llama"), "", dtype="float32"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(ModelError, match=words):
        load_hf_weights(model, models / "llama")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_another_rotary_base_is_refused(models: Path, tmp_path: Path) -> None:
    other = shutil.copytree(models / "llama", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5000.0
    (other / "config.json").write_text(json.dumps(config))
    (model,) = build(Case(str(models / "llama"), "", dtype="float32"))
    with pytest.raises(ModelError, match="rotary_base 5000"):
        load_hf_weights(model, other)


def test_a_bias_that_only_one_side_has_is_refused(models: Path) -> None:
    case = Case(str(models / "qwen2"), "", dtype="float32")
    (without,) = build(case)
    for layer in without.get_submodule("decoder.layers"):
        layer.get_submodule("self_attention.linear_qkv").bias = None  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"q_proj.bias|k_proj.bias"):
        load_hf_weights(without, models / "qwen2")


def test_a_checkpoint_that_lacks_a_tensor_or_ties_two_is_refused(
    models: Path, tmp_path: Path
) -> None:
    (model,) = build(Case(str(models / "qwen2"), "", dtype="float32"))
    lacking = shutil.copytree(models / "qwen2", tmp_path / "lacking")
    tensors = load_file(lacking / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="up_proj"):
        load_hf_weights(model, lacking)
    untied = shutil.copytree(models / "qwen2", tmp_path / "untied")
    tensors = load_file(untied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, untied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        load_hf_weights(model, untied)


def test_another_architecture_is_refused(models: Path, tmp_path: Path) -> None:
    other = shutil.copytree(models / "llama", tmp_path / "gpt2")
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (model,) = build(Case(str(models / "llama"), "", dtype="float32"))
    with pytest.raises(ModelError, match="gpt2 cannot be loaded"):
        load_hf_weights(model, other)
