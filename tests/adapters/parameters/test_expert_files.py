"""Files of adapters at parameters: PEFT's both ways, and those of the time when each expert had linears
of its own."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.spec import LoraSpec
from lorry.errors import ModelError
from tests.support import expert_models
from tests.support.tiny import one_thread, text_ids  # noqa: F401 - a fixture

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# what people write; PEFT turns some of it into other names before it saves
CONFIGS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "experts": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "down_proj"]},
    "down alone": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
    "up alone, rslora": {
        "target_modules": ["q_proj"],
        "target_parameters": ["gate_up_proj"],
        "use_rslora": True,
    },
    "router": {"target_modules": ["v_proj"], "target_parameters": ["mlp.gate.weight"]},
    "patterns": {
        "target_modules": ["q_proj"],
        "target_parameters": ["k_proj.weight", "mlp.gate.weight", "mlp.experts.down_proj"],
        "rank_pattern": {"k_proj.weight": 5, "gate": 7, "layers.0.mlp.experts.down_proj": 2},
        "alpha_pattern": {"gate.weight": 11},
    },
}


def logits(model: Any) -> Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        return model(input_ids=text_ids()).logits


def settings(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return read


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", expert_models.UNFUSED)
@pytest.mark.filterwarnings("ignore")
def test_peft_to_lorry_to_peft(kind: str, config: str, tmp_path: Path) -> None:
    base = expert_models.model(kind)
    given = peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=7, init_lora_weights=False, **CONFIGS[config]
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), given)
    theirs.save_pretrained(tmp_path / "peft")
    ours = copy.deepcopy(base)
    adapter = load_adapter(ours, tmp_path / "peft")
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-5
    assert (logits(ours) - logits(base)).abs().max() > 1e-2
    save_adapter(ours, tmp_path / "lorry")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lorry")
    assert (logits(again) - logits(theirs)).abs().max() <= 1e-5
    read = copy.deepcopy(base)
    other = load_adapter(read, tmp_path / "lorry")
    assert other.slots.keys() == adapter.slots.keys()
    assert torch.equal(logits(read), logits(ours))


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "gate_proj", "up_proj", "down_proj"]], ids=["all", "names"]
)
@pytest.mark.filterwarnings("ignore")
def test_names_that_linears_have_too_do_not_ask_for_experts(targets: Any, tmp_path: Path) -> None:
    """PEFT 0.21 of a Qwen2-MoE adapts the shared expert alone by these names."""
    base = expert_models.model("qwen2_moe")
    given = peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, init_lora_weights=False, target_modules=targets
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), given)
    theirs.save_pretrained(tmp_path)
    adapter = load_adapter(ours := copy.deepcopy(base), tmp_path)
    assert not any(".experts." in path for path in adapter.slots)
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-5
    assert (logits(ours) - logits(base)).abs().max() > 1e-2
    # of a model without such linears they mean experts, which the file must have
    other = peft.get_peft_model(expert_models.model("granitemoe"), given)
    other.save_pretrained(tmp_path / "other")
    if targets != "all-linear":
        with pytest.raises(ModelError, match=r"names .*experts.down_proj .* without the experts"):
            load_adapter(expert_models.model("granitemoe"), tmp_path / "other")


def test_a_name_of_every_layer_where_it_selects_just_these(tmp_path: Path) -> None:
    model = expert_models.model("qwen2_moe")
    attach(model, LoraSpec(r=2), "all")
    attach(model, LoraSpec(r=2, layers_to_transform=[1]), "one")
    save_adapter(model, tmp_path / "all", "all")
    save_adapter(model, tmp_path / "one", "one")
    # PEFT takes gate_proj and its like in a model of experts for those of single experts
    mine = ["gate_proj", "up_proj", "down_proj"]
    assert settings(tmp_path / "all")["target_parameters"] == [
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
        *(f"mlp.shared_expert.{name}.weight" for name in mine),
    ]
    ones = settings(tmp_path / "one")["target_parameters"]
    assert ones[0] == "model.layers.1.mlp.experts.gate_up_proj"
    # settings that PEFT has not at parameters keep such linears among the modules
    attach(model, LoraSpec(r=2, lora_dropout=0.1, exclude_modules=["experts"]), "dropped")
    save_adapter(model, tmp_path / "dropped", "dropped")
    assert "target_parameters" not in settings(tmp_path / "dropped")
    load_adapter(expert_models.model("qwen2_moe"), tmp_path / "dropped")


def swap(tensors: dict[str, Tensor], experts: int) -> None:
    """Columns of lora_B as (expert, rank)."""
    for name, value in tensors.items():
        if "experts" in name and name.endswith("lora_B.weight"):
            grouped = value.view(value.shape[0], -1, experts)
            tensors[name] = grouped.transpose(1, 2).flatten(1).contiguous()


def swap_nesting(tensors: dict[str, Tensor], experts: int) -> None:
    """The wrappers in the other order."""
    outer = [name for name in tensors if ".experts.lora_" in name]
    for name in outer:
        inner = name.replace(".experts.", ".experts.base_layer.")
        tensors[name], tensors[inner] = tensors[inner], tensors[name]


@pytest.mark.filterwarnings("ignore")
def test_swapped_rank_and_expert_columns_are_another_model(tmp_path: Path) -> None:
    """What the comparison with PEFT would not let pass; of tensors of equal shape only it can tell."""
    base = expert_models.model("mixtral")
    given = peft.LoraConfig(r=3, init_lora_weights=False, target_parameters=["down_proj"])
    given.target_modules = []
    theirs = peft.get_peft_model(copy.deepcopy(base), given)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    swap(tensors, 4)
    save_file(tensors, tmp_path / WEIGHTS)
    load_adapter(base, tmp_path)
    assert (logits(base) - logits(theirs)).abs().max() > 1e-2


# --- files of single experts


def write_single(folder: Path, kind: str, *, rslora: bool = False, **change: Any) -> Any:
    """A file as PEFT wrote it over transformers 4, and the model that it means: W + s B A of every
    linear, by hand. ``change``: of the settings."""
    model = expert_models.model(kind)
    place, ups, down = expert_models.UNFUSED[kind]
    draw, tensors = torch.Generator().manual_seed(4), dict[str, Tensor]()
    scale = 7 / (3**0.5 if rslora else 3)

    def add(name: str, weight: Tensor) -> None:
        a, b = (
            torch.randn(3, weight.shape[1], generator=draw),
            torch.randn(weight.shape[0], 3, generator=draw),
        )
        tensors[f"base_model.model.{name}.lora_A.weight"] = a * 0.3
        tensors[f"base_model.model.{name}.lora_B.weight"] = b * 0.3
        weight += scale * (b * 0.3) @ (a * 0.3)

    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            where = place.format(i)
            add(f"model.layers.{i}.self_attn.q_proj", layer.self_attn.q_proj.weight)
            add(f"{where}.gate", layer.mlp.gate.weight)
            if hasattr(layer.mlp, "shared_expert"):
                for leaf in (*ups, down):
                    shared = layer.mlp.shared_expert.get_submodule(leaf)
                    add(f"{where}.shared_expert.{leaf}", shared.weight)
            experts = layer.mlp.experts
            inner = experts.down_proj.shape[2]
            for e in range(experts.num_experts):
                add(f"{where}.experts.{e}.{ups[0]}", experts.gate_up_proj[e, :inner])
                add(f"{where}.experts.{e}.{ups[1]}", experts.gate_up_proj[e, inner:])
                add(f"{where}.experts.{e}.{down}", experts.down_proj[e])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 3,
        "lora_alpha": 7,
        "use_rslora": rslora,
        "target_modules": ["q_proj", "gate", *ups, down],
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({**config, **change}))
    return model


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", expert_models.UNFUSED)
@pytest.mark.filterwarnings("ignore")
def test_files_of_single_experts_are_what_they_say(kind: str, rslora: bool, tmp_path: Path) -> None:
    """By the formula, not by PEFT: 0.21 leaves those of Qwen2-MoE out, and scales gate and up by
    sqrt(2) too much with rslora."""
    meant = write_single(tmp_path, kind, rslora=rslora)
    base = expert_models.model(kind)
    model = copy.deepcopy(base)
    adapter = load_adapter(model, tmp_path)
    fused = [path for path in adapter.slots if path.endswith("gate_up_proj")]
    assert {adapter.spec.rank(path) for path in fused} == {6}
    assert (logits(model) - logits(meant)).abs().max() <= 2e-5
    assert (logits(model) - logits(base)).abs().max() > 1e-2
    if kind != "qwen2_moe" and not rslora:
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        assert (logits(model) - logits(theirs)).abs().max() <= 2e-5
    save_adapter(model, tmp_path / "now")
    now = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "now")
    assert (logits(now) - logits(meant)).abs().max() <= 2e-5


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if name in key]:
            del tensors[key]

    return change


def shorten(tensors: dict[str, Tensor]) -> None:
    """Another rank at one expert."""
    for key in [key for key in tensors if ".experts.2.w1.lora_A" in key]:
        tensors[key] = tensors[key][:2].clone()


def beyond(tensors: dict[str, Tensor]) -> None:
    key = next(key for key in tensors if ".experts.0.w2.lora_A" in key)
    tensors[key.replace(".0.w2", ".9.w2")] = tensors[key].clone()


DAMAGED: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "an expert": (without(".experts.3.w2."), r"not complete: lora_A of .*experts.3.w2"),
    "a half": (without("lora_B.weight"), r"has no lora_B|not complete"),
    "all of w3": (without(".w3."), r"not complete: lora_A of .*experts.0.w3"),
    "the experts": (without(".experts."), r"names .*experts.* as a target"),
    "a rank": (shorten, r"experts of different ranks"),
    "too many": (beyond, r"not complete"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_of_single_experts_is_refused(damage: str, tmp_path: Path) -> None:
    change, message = DAMAGED[damage]
    write_single(tmp_path, "mixtral")
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    model = expert_models.model("mixtral")
    with pytest.raises(ModelError, match=message):
        load_adapter(model, tmp_path)
    assert not get_bank(model, create=True).adapters


def test_targets_that_the_file_does_not_name_are_refused(tmp_path: Path) -> None:
    write_single(tmp_path, "mixtral", target_modules=["q_proj", "gate", "w1", "w3"])
    with pytest.raises(ModelError, match=r"does not name .*experts.0.w2 as a target"):
        load_adapter(expert_models.model("mixtral"), tmp_path)
    config = settings(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({**config, "target_parameters": "down_proj"}))
    with pytest.raises(ModelError, match="target_parameters is a text"):
        load_adapter(expert_models.model("mixtral"), tmp_path)
    every = {"target_modules": ["q_proj", "gate", "w1", "w2", "w3"]}
    (tmp_path / CONFIG).write_text(json.dumps({**config, **every, "target_parameters": ["mlp.w"]}))
    with pytest.raises(ModelError, match=r"target_parameters names 'mlp.w'"):
        load_adapter(expert_models.model("mixtral"), tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_wrappers_in_the_other_order_do_not_fit(tmp_path: Path) -> None:
    model = expert_models.model("mixtral")
    attach(
        model,
        LoraSpec(r=2, target_modules=(), target_parameters=("experts.down_proj", "gate_up_proj")),
    )
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    swap_nesting(tensors, 4)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match="rank 2 on this model's"):
        load_adapter(expert_models.model("mixtral"), tmp_path)


def test_an_adapter_on_other_experts_is_refused(tmp_path: Path) -> None:
    """The digest of linears alone would not tell: an expert of another fine-tuning."""
    model = expert_models.model("mixtral")
    attach(model, LoraSpec(r=2), "experts")
    attach(model, LoraSpec(r=2, target_modules=["q_proj"]), "attention")
    for name in ("experts", "attention"):
        save_adapter(model, tmp_path / name, name)
    other = expert_models.model("mixtral")
    with torch.no_grad():
        other.model.layers[1].mlp.experts.down_proj.mul_(1.1)
    load_adapter(other, tmp_path / "attention")
    with pytest.raises(ModelError, match="trained on other base weights"):
        load_adapter(other, tmp_path / "experts")
    load_adapter(other, tmp_path / "experts", other_base=True)
    load_adapter(expert_models.model("mixtral"), tmp_path / "experts")
