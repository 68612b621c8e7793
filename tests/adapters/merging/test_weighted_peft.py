"""Merged adapters against PEFT's `add_weighted_adapter`, tensor by tensor, after the same seed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lorry as library
from lorry.adapters.attach import detach
from lorry.adapters.merging.weighted import AdapterMerge, merge_adapters
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.targets.candidates import find_linears
from lorry.config.merge import MERGE_METHODS
from lorry.errors import ConfigError

# of PEFT, about tied weights and transposed ones, which is what is tried here
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
PEFT_METHODS = [name for name in MERGE_METHODS if not name.startswith("core")]
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense_h_to_4h"],
}

Save = Callable[..., list[Path]]


def peft_of(base: nn.Module, folders: list[Path]) -> PeftModel:
    """PEFT with the adapters a0, a1 ... of some directories."""
    model = PeftModel.from_pretrained(base, str(folders[0]), adapter_name="a0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(str(folder), adapter_name=f"a{number}")
    return model.eval()


@pytest.fixture
def tiny(tiny: Any) -> Callable[[str], nn.Module]:
    """Two layers, so that the order of draws shows."""
    return lambda name: tiny(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": 2})


@pytest.fixture
def save(tiny: Any, tmp_path: Path) -> Save:
    """``save(family, {r: 4, ...}, {...})``: PEFT adapters with random values, a directory each."""

    def write(family: str, *configs: dict[str, Any]) -> list[Path]:
        folders = []
        for number, settings in enumerate(configs):
            named = {"target_modules": TARGETS.get(family, ["q_proj", "v_proj", "down_proj"])}
            config = LoraConfig(task_type="CAUSAL_LM", **{**named, **settings})
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = get_peft_model(tiny(family), config)
                draw = torch.Generator().manual_seed(11 + number)
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        if "lora_" in name:
                            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
                folders.append(tmp_path / f"a{number}")
                model.save_pretrained(folders[-1], save_embedding_layers=False)
        return folders

    return write


def peft_tensors(model: PeftModel, name: str) -> dict[str, Tensor]:
    """{`MODULE.lora_A`: ...} of one adapter of PEFT's."""
    found = {}
    for path, module in model.base_model.model.named_modules():
        for side in "AB":
            for store in (f"lora_{side}", f"lora_embedding_{side}"):
                entry = getattr(module, store, {})
                if name in entry:
                    value = entry[name]
                    found[f"{path}.lora_{side}"] = getattr(value, "weight", value).detach()
    return found


def ours_of(model: nn.Module, folders: list[Path]) -> nn.Module:
    """Ours with the adapters a0, a1 ..."""
    for number, folder in enumerate(folders):
        load_adapter(model, folder, f"a{number}")
    return model


def compare(
    theirs: PeftModel, ours: nn.Module, weights: list[float], method: str, **options: Any
) -> AdapterMerge:
    """Merge a0, a1 ... with both, compare every tensor, return ours; it stays attached as "merged"."""
    names = [f"a{number}" for number in range(len(weights))]
    torch.manual_seed(options.get("seed", 0))
    renamed = {"svd_rank": options["rank"]} if "rank" in options else {}
    kept = {k: v for k, v in options.items() if k not in ("seed", "rank")}
    theirs.add_weighted_adapter(
        names, weights, "merged", combination_type=method, **{"density": 0.5, **kept, **renamed}
    )
    before = torch.get_rng_state()
    merged = merge_adapters(
        ours, dict(zip(names, weights, strict=True)), "merged", method=method, **options
    )
    assert torch.equal(torch.get_rng_state(), before)  # the process's generator is not touched
    expected, found = peft_tensors(theirs, "merged"), merged.adapter.tensors()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # equal to the bit but for LAPACK, which may pick another path for another layout
        torch.testing.assert_close(
            found[key], value, rtol=1e-5, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}"
        )
    return merged


def clear(theirs: PeftModel, ours: nn.Module) -> None:
    """Take the merged adapters out again."""
    theirs.delete_adapter("merged")
    detach(ours, "merged")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox"])
def test_every_method_gives_peft_s_tensors(family: str, tiny: Any, save: Save) -> None:
    folders = save(family, {"r": 4, "lora_alpha": 6}, {"r": 4, "lora_alpha": 4}, {"r": 4})
    theirs, ours = peft_of(tiny(family), folders), ours_of(tiny(family), folders)
    for method in PEFT_METHODS:
        merged = compare(theirs, ours, [0.7, -0.4, 1.3], method, seed=5)
        assert merged.method == method
        clear(theirs, ours)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gpt_neox"])
def test_embeddings_heads_patterns_and_rslora(
    family: str, tiny: Any, save: Save, ids: Tensor, logits: Any
) -> None:
    embedding = {"gpt2": "wte", "gpt_neox": "embed_in"}.get(family, "embed_tokens")
    common = TARGETS.get(family, ["q_proj", "down_proj"])[:2]
    folders = save(
        family,
        # what the first is decides what PEFT draws, and gaussian draws otherwise
        {
            "r": 3,
            "target_modules": [*common, embedding, "lm_head"],
            "init_lora_weights": "gaussian",
            "alpha_pattern": {common[0]: 7},
        },
        {"r": 3, "target_modules": [*common, embedding], "lora_alpha": 5},
        # a target that no other has, and none of the embedding's
        {"r": 3, "target_modules": TARGETS.get(family, ["q_proj", "v_proj"]), "lora_alpha": 2},
    )
    theirs, ours = peft_of(tiny(family), folders), ours_of(tiny(family), folders)
    for method in PEFT_METHODS:
        options = {"majority_sign_method": "frequency", "density": 0.3, "seed": 1}
        compare(theirs, ours, [1.0, 1.0, -0.5], method, **options)
        theirs.set_adapter("merged")
        expected = logits(theirs, ids)
        torch.testing.assert_close(
            logits(ours, ids), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )
        clear(theirs, ours)


def test_unequal_ranks(tiny: Any, save: Save) -> None:
    folders = save(
        "llama",
        {"r": 2, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 3}},
        {"r": 4, "lora_alpha": 6},
    )
    theirs, ours = peft_of(tiny("llama"), folders), ours_of(tiny("llama"), folders)
    for method in PEFT_METHODS:
        if method == "cat" or method.endswith("svd"):
            for options in ({}, {"rank": 3}) if method != "cat" else ({},):
                compare(theirs, ours, [1.0, 0.5], method, **options)
                clear(theirs, ours)
        else:
            with pytest.raises(ConfigError, match=r"have the ranks 5, 4"):
                merge_adapters(ours, {"a0": 1.0, "a1": 0.5}, method=method)


def test_modules_of_the_native_decoder_stand_in_peft_s_order(
    family: str, tiny: Any, tmp_path: Path
) -> None:
    """Draws follow it."""
    model = tiny(family)
    model.save_pretrained(tmp_path)
    native, _ = library.load(tmp_path, dtype="float32")
    assert native.family is not None
    assert list(find_linears(native)) == list(find_linears(model))


def test_one_adapter_is_a_copy_whatever_the_method(tiny: Any, save: Save) -> None:
    folders = save("llama", {"r": 4, "lora_alpha": 6})
    theirs, ours = peft_of(tiny("llama"), folders), ours_of(tiny("llama"), folders)
    assert compare(theirs, ours, [-0.7], "ties_svd").method == "linear"


def test_our_config_says_what_peft_s_does_not(
    tiny: Any, save: Save, ids: Tensor, logits: Any, tmp_path: Path
) -> None:
    """PEFT keeps use_rslora of the first adapter, so that its merged adapter is sqrt(r) times too
    large, and drops the rank pattern, so that it cannot load what it saved. The tensors are the
    same; what we write computes the sum."""
    settings = {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "lora_alpha": 3}
    folders = save("llama", settings, {**settings, "lora_alpha": 5})
    theirs, ours = peft_of(tiny("llama"), folders), ours_of(tiny("llama"), folders)
    compare(theirs, ours, [0.5, 0.5], "linear")
    layer = theirs.base_model.model.model.layers[0].self_attn.v_proj
    assert layer.scaling["merged"] == 2  # sqrt(4), though A and B hold the scales already
    save_adapter(ours, tmp_path / "merged", "merged")
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["use_rslora"] is False
    reloaded = PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "merged")).eval()
    torch.testing.assert_close(logits(reloaded, ids), logits(ours, ids), rtol=1e-4, atol=1e-4)
