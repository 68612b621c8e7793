"""Checkpoints that do not fit, are damaged or mean harm: one clear ModelError each, and nothing of
theirs is ever executed.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import dynamic_module_utils

from lorry.errors import ModelError
from lorry.models.hf.model import HfModel
from tests.support import tiny
from tests.support.tiny import close, edit_config, one_thread, opened, rewrite  # noqa: F401 - one_thread is a fixture


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny.directory(tiny.trained("llama"), tmp_path / "llama")


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {n: v for n, v in t.items() if n != "model.norm.weight"},
            r"1 .*missing.*model\.norm\.weight",
        ),
        (
            lambda t: {**t, "model.extra.weight": torch.ones(2)},
            r"1 .*unknown.*model\.extra\.weight",
        ),
        (lambda t: {**t, "model.norm.weight": torch.ones(7)}, r"model\.norm\.weight"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_tensors_that_do_not_fit(native: bool, change: Any, message: str, llama: Path) -> None:
    with pytest.raises(ModelError, match=message):
        opened(rewrite(llama, change), native=native)


def test_packed_tensors_are_refused(llama: Path) -> None:
    rewrite(llama, lambda t: {**t, "model.norm.weight": t["model.norm.weight"].to(torch.int8)})
    with pytest.raises(ModelError, match="stored as I8"):
        opened(llama)
    with pytest.raises(ModelError, match="packed by 'hqq' cannot be read"):
        opened(edit_config(llama, quantization_config={"quant_method": "hqq", "bits": 4}))


def test_pickles_are_never_opened(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*pickle.*save_pretrained"):
        opened(llama)
    (llama / "pytorch_model.bin").rename(llama / "small.gguf")
    with pytest.raises(ModelError, match=r"GGUF.*small\.gguf"):
        opened(llama)


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..",
        "x.bin",
        "a\\b.safetensors",
    ],
)
@pytest.mark.parametrize("native", [True, False])
def test_an_index_cannot_point_outside_its_directory(shard: str, native: bool, llama: Path) -> None:
    (llama / "model.safetensors").rename(llama.parent / "secret.safetensors")
    (llama / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": shard}})
    )
    with pytest.raises(ModelError, match="not the plain name"):
        opened(llama, native=native)


def test_an_index_that_lies(llama: Path) -> None:
    names = list(load_file(llama / "model.safetensors"))
    (llama / "model.safetensors").rename(llama / "a.safetensors")
    index = llama / "model.safetensors.index.json"
    for weight_map, message in (
        (
            {**dict.fromkeys(names, "a.safetensors"), "ghost": "a.safetensors"},
            "'ghost', which its shard does not hold",
        ),
        (dict.fromkeys(names[1:], "a.safetensors"), "places in 'no file'"),
        (dict.fromkeys(names, "b.safetensors"), r"b\.safetensors is missing"),
        ({}, "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelError, match=message):
            opened(llama)


def test_truncated_weights(llama: Path) -> None:
    file = llama / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="not a complete safetensors file"):
            opened(llama)
    file.write_bytes(struct.pack("<Q", 2**62) + whole[8:])
    with pytest.raises(ModelError, match="not a complete safetensors file"):
        opened(llama)


# --- configs


CANARY = "from pathlib import Path\nPath({!r}).write_text('executed')\n"


def hostile(path: Path, **changes: Any) -> Path:
    """A checkpoint with Python beside it that leaves a trace when anybody imports it."""
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (path / f"{name}.py").write_text(CANARY.format(str(path.parent / "canary")))
    pointers = {
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModelForCausalLM": "modeling_evil.EvilModel",
        "AutoTokenizer": ["tokenization_evil.EvilTokenizer", None],
    }
    return edit_config(path, auto_map=pointers, trust_remote_code=True, **changes)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"_attn_implementation": "stranger/kernel"},
        {
            "_attn_implementation_internal": "stranger/kernel",
            "experts_implementation": "stranger/kernel",
        },
        {"attn_implementation": {"": "stranger/kernel"}},
        {
            "task_specific_params": {
                "auto_map": {"AutoConfig": "modeling_evil.X"},
                "_attn_implementation": "stranger/kernel",
            }
        },
    ],
    ids=lambda c: next(iter(c), "auto_map"),
)
def test_a_config_does_not_choose_code(native: bool, changes: dict[str, Any], llama: Path) -> None:
    notes: list[str] = []
    path = hostile(llama, **changes)
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": "x.Y"}})
    )
    model = opened(path, native=native, add_note=notes.append)
    assert close(model, tiny.trained("llama"))
    assert not (llama.parent / "canary").exists()
    assert any("auto_map" in note for note in notes)
    assert all(
        any(key in note for note in notes) for key in changes if key != "task_specific_params"
    )
    if isinstance(model, HfModel):
        assert model.inner.config._attn_implementation in ("sdpa", "eager")


def test_an_architecture_that_needs_code_is_refused_unless_trusted(llama: Path) -> None:
    path = hostile(llama, model_type="evil")
    with pytest.raises(ModelError, match=r"'evil' needs Python code.*trust_remote_code=true"):
        opened(path)
    assert not (llama.parent / "canary").exists()


def test_trusted_code_runs_and_is_said_to(
    llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    (llama / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    pointers = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnModel",
    }
    edit_config(llama, model_type="own", architectures=["OwnModel"], auto_map=pointers)
    notes: list[str] = []
    model = opened(llama, trust_remote_code=True, add_note=notes.append)
    assert isinstance(model, HfModel)
    assert type(model.inner).__name__ == "OwnModel"
    assert close(model, tiny.trained("llama"))
    assert any("runs in this process" in note for note in notes)


def test_a_tokenizer_that_needs_code_is_refused(llama: Path) -> None:
    path = hostile(llama)
    (path / "tokenizer.json").write_text("{}")
    pointers = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]}
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "EvilTokenizer", "auto_map": pointers})
    )
    with pytest.raises(ModelError, match="tokenizer"):
        opened(path)
    assert not (llama.parent / "canary").exists()


@pytest.mark.parametrize("text", ["{", "{}", '{"added_tokens": [], "model": 5}', "[]"])
def test_a_broken_tokenizer_is_one_clear_error(text: str, llama: Path) -> None:
    (llama / "tokenizer.json").write_text(text)
    (llama / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError, match="tokenizer"):
        opened(llama)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"model_type": "llama",\n', r"config\.json:\d: not JSON"),
        ("[1]", "expected a JSON object"),
        ("{}", "no model_type"),
        ('{"model_type": "lama"}', "did you mean 'llama'"),
        ('{"model_type": "qwen3", "num_hidden_layers": 1000000000}', "1000000000 layers"),
        ('{"model_type": "llama", "num_hidden_layers": "many"}', "'many' layers"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "config"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "refuses this config"),
        ('{"model_type": "t5"}', "not a causal"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_unusable_configs(text: str, message: str, llama: Path) -> None:
    (llama / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        opened(llama)
