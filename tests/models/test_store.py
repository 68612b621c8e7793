"""Saving: transformers loads what is written with the same logits, and a failed save leaves
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorry.adapters.attach import attach
from lorry.adapters.merge import merged_tensors, separates_tied_head
from lorry.adapters.spec import LoraSpec
from lorry.errors import ConfigError, ModelError
from lorry.models.loading.load import load_model
from lorry.models.loading.store import save_model
from lorry.notes import ignore_note
from tests.support import tiny
from tests.support.tiny import close, logits, one_thread  # noqa: F401 - one_thread is a fixture

LEAVES = {
    "llama tied": ("q_proj", "up_proj"),
    "gpt2": ("c_attn", "c_proj"),
    "gpt_neox parallel": ("query_key_value", "dense_4h_to_h"),
}


def theirs(path: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def opened(name: str, tmp_path: Path, **options: Any) -> Any:
    path = tiny.directory(tiny.trained(name), tmp_path / "base")
    return load_model(path, **{"dtype": "float32", "add_note": ignore_note, **options}).model


@pytest.mark.parametrize("native", [True, False], ids=["native", "hf"])
@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_transformers_loads_what_we_save(name: str, native: bool, tmp_path: Path) -> None:
    model = opened(name, tmp_path, native=native)
    save_model(model, tmp_path / "out")
    again = theirs(tmp_path / "out")
    assert close(again, model)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    ours = load_model(tmp_path / "out", dtype="float32", add_note=print, native=native).model
    assert close(ours, model)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["architectures"] == [type(again).__name__]
    assert (
        json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 27
    )


@pytest.mark.parametrize("native", [True, False], ids=["native", "hf"])
def test_shards_of_a_bounded_size(native: bool, tmp_path: Path) -> None:
    model = opened("llama", tmp_path, native=native)
    save_model(model, tmp_path / "out", max_shard_bytes=20_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(p.stat().st_size < 22_000 for p in shards)
    assert close(theirs(tmp_path / "out"), model)


def test_a_stream_is_never_held_whole(tmp_path: Path) -> None:
    """Tensors are taken from the stream only as the shard before them is on disk."""
    model, out = opened("llama", tmp_path), tmp_path / "out"
    written: list[int] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in model.state_dict().items():
            written.append(sum(p.stat().st_size for p in tmp_path.glob("out.tmp*/shard-*")))
            yield name, tensor * 2

    save_model(model, out, tensors=stream(), max_shard_bytes=20_000, dtype=torch.bfloat16)
    given = [t.numel() * 2 for t in model.state_dict().values()]
    assert all(sum(given[:i]) - on_disk <= 20_000 for i, on_disk in enumerate(written))
    again = load_model(out, dtype="float32", add_note=print).model
    assert all(
        torch.equal(again.state_dict()[n], (t * 2).bfloat16().float())
        for n, t in model.state_dict().items()
    )
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("native", [True, False], ids=["native", "hf"])
def test_a_head_set_apart_from_a_tied_embedding(native: bool, tmp_path: Path) -> None:
    """What a merge of a tied head writes: its own tensor, and a config that says so."""
    model = opened("llama tied", tmp_path, native=native)
    head = model.state_dict()["lm_head.weight"] + 1
    tensors = {**model.state_dict(), "lm_head.weight": head}
    save_model(
        model,
        tmp_path / "out",
        tensors=tensors.items(),
        config_overrides={"tie_word_embeddings": False},
    )
    again = theirs(tmp_path / "out")
    assert torch.equal(again.lm_head.weight, head)
    assert torch.equal(
        again.model.embed_tokens.weight, model.state_dict()["model.embed_tokens.weight"]
    )
    assert torch.equal(
        load_model(tmp_path / "out", dtype="float32", add_note=print).model.state_dict()[
            "lm_head.weight"
        ],
        head,
    )


@pytest.mark.parametrize("native", [True, False], ids=["native", "hf"])
@pytest.mark.parametrize("name", ["llama tied", "gpt2", "gpt_neox parallel"])
def test_a_merged_stream_is_the_adapted_model(name: str, native: bool, tmp_path: Path) -> None:
    """Adapters on every linear and on the head, folded in as they are written; transformers then
    says what we said before.
    """
    model = opened(name, tmp_path, native=native)
    attach(model, LoraSpec(r=2, target_modules=("lm_head", *LEAVES[name]), init_lora_weights=False))
    overrides = {"tie_word_embeddings": False} if separates_tied_head(model) else {}
    assert bool(overrides) == (name != "gpt_neox parallel")
    save_model(model, tmp_path / "out", tensors=merged_tensors(model), config_overrides=overrides)
    assert (logits(model) - logits(tiny.trained(name))).abs().max() > 0.1
    for merged in (
        theirs(tmp_path / "out"),
        load_model(tmp_path / "out", dtype="float32", add_note=print).model,
    ):
        assert (logits(merged) - logits(model)).abs().max() <= 1e-4


@pytest.mark.parametrize("native", [True, False], ids=["native", "hf"])
def test_a_failed_save_leaves_nothing(native: bool, tmp_path: Path) -> None:
    model, out = opened("llama", tmp_path, native=native), tmp_path / "out"
    state = list(model.state_dict().items())
    for tensors, message in (
        (state[1:], "1 tensors were not given"),
        ([*state, ("model.more", torch.ones(1))], "'model.more' is not a tensor"),
        ([*state, state[0]], "given twice"),
    ):
        with pytest.raises(ModelError, match=message):
            save_model(model, out, tensors=iter(tensors))
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    with pytest.raises(ConfigError, match="not empty"):
        save_model(model, tmp_path / "base")


@pytest.mark.parametrize("native", [True, False], ids=["native", "hf"])
def test_generation_config_and_dtype_go_along(native: bool, tmp_path: Path) -> None:
    path = tiny.directory(tiny.trained("qwen2"), tmp_path / "base")
    (path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [3, 27], "temperature": 0.6, "do_sample": True})
    )
    model = load_model(path, dtype="float32", add_note=print, native=native).model
    save_model(model, tmp_path / "out", dtype=torch.bfloat16)
    said = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (said["eos_token_id"], said["temperature"]) == ([3, 27], 0.6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    again = theirs(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert all(
        torch.equal(t, model.state_dict()[n].bfloat16()) for n, t in again.state_dict().items()
    )
    save_model(model, tmp_path / "other", generation_config={"eos_token_id": 5})
    assert json.loads((tmp_path / "other" / "generation_config.json").read_text()) == {
        "eos_token_id": 5
    }


def test_permissions_are_those_of_any_file(tmp_path: Path) -> None:
    save_model(opened("llama", tmp_path), tmp_path / "out")
    (tmp_path / "plain").touch()
    assert {p.stat().st_mode for p in (tmp_path / "out").iterdir()} == {
        (tmp_path / "plain").stat().st_mode
    }
