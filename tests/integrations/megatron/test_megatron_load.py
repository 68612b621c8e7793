"""An adapter that does not fit is refused before a value is written, on one rank."""

from __future__ import annotations

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

from lorry.adapters.spec import LoraSpec
from lorry.errors import ConfigError, ModelError
from lorry.integrations.megatron import attach_lora, get_lora_parameters, load_lora, save_lora
from tests.support.megatron_gradients import Case, build

pytestmark = [
    pytest.mark.usefixtures("alone"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # what Megatron says of absent packages
]


def model_of(models: Path) -> nn.Module:
    return build(Case(str(models / "llama"), "", dtype="float32"))[0]


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (LoraSpec(r=3, lora_alpha=6), "rank and scale at .*k_proj"),
        (LoraSpec(r=3, target_modules=("q_proj",)), "has an adapter on"),
        (LoraSpec(r=3, lora_alpha=7, rank_pattern={"down_proj": 2, "k_proj": 1}), "rank and scale"),
    ],
)
def test_an_adapter_unlike_the_models_is_refused(models: Path, spec: LoraSpec, words: str) -> None:
    model = attach_lora(model_of(models), spec)
    before = values(model)
    with pytest.raises(ModelError, match=words):
        load_lora(model, models / "llama-canonical")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_several_a_do_not_become_one(models: Path) -> None:
    folder, model = models / "llama-canonical", model_of(models)
    before = values(model)
    with pytest.raises(ModelError, match="different lora_A"):
        load_lora(model, folder, mode="fused")
    assert values(model).keys() == before.keys()


def test_what_was_fused_may_train_apart(models: Path, tmp_path: Path) -> None:
    model = model_of(models)
    load_lora(model, models / "llama-fused", mode="canonical")
    save_lora(model, tmp_path / "apart")
    got, true = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path / "apart", models / "llama-fused")
    )
    assert all(torch.equal(got[name], true[name]) for name in true)
    fused = model_of(models)
    load_lora(fused, models / "llama-fused", mode="fused")
    # one A of 32 inputs in place of three, and of two
    saved = sum(p.numel() for p in get_lora_parameters(model))
    assert saved - sum(p.numel() for p in get_lora_parameters(fused)) == 2 * 3 * 32 * (2 + 1)


def lacking(tensors: dict[str, Any]) -> None:
    del tensors[next(iter(tensors))]


def unknown(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.zeros(3, 32)


def not_finite(tensors: dict[str, Any]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("damage", "words"),
    [(lacking, "incomplete"), (unknown, "does not have"), (not_finite, "not finite")],
)
def test_a_damaged_file_leaves_the_model_without_adapters(
    models: Path, tmp_path: Path, damage: Any, words: str
) -> None:
    folder = shutil.copytree(models / "llama-canonical", tmp_path / "damaged")
    tensors = load_file(folder / "adapter_model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    model = model_of(models)
    before = values(model)
    with pytest.raises(ModelError, match=words):
        load_lora(model, folder)
    assert values(model).keys() == before.keys()


def test_a_model_without_adapters_has_none_to_save(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="apply_lora_to_megatron_model"):
        save_lora(model_of(models), tmp_path / "none")
    assert not (tmp_path / "none").exists()
