"""Configs between versions: transformers 5's infinities are read, and what we write means the same
to older readers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lorry.models.loading.config_json import add_legacy_rope_fields, decode_tagged_floats
from lorry.models.loading.load import load_model
from lorry.models.loading.store import save_model
from tests.support import tiny
from tests.support.ggufs import write_gguf
from tests.support.tiny import close, edit_config, one_thread  # noqa: F401 - one_thread is a fixture


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 500.0, **more}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
LAYERED = {
    "full_attention": rope("linear", factor=8.0),
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
SCALED: dict[str, dict[str, Any]] = {
    "llama": {**tiny.LLAMA, "rope_parameters": rope("default")},
    "llama linear": {**tiny.LLAMA, "rope_parameters": rope("linear", factor=2.0)},
    "llama dynamic": {**tiny.LLAMA, "rope_parameters": rope("dynamic", factor=2.0)},
    "llama llama3": {**tiny.LLAMA, "rope_parameters": tiny.LLAMA3},
    "qwen3 yarn": {**tiny.LLAMA, "model_type": "qwen3", "head_dim": 16, "rope_parameters": YARN},
    "gpt_neox": {**tiny.NEOX, "rope_parameters": rope("default", partial_rotary_factor=0.25)},
    "phi": {**tiny.FOREIGN["phi"], "rope_parameters": rope("default", partial_rotary_factor=0.25)},
    "gemma3_text": {**tiny.FOREIGN["gemma3_text"], "rope_parameters": LAYERED},
    "olmo3": {
        **tiny.SMALL,
        "model_type": "olmo3",
        "sliding_window": 8,
        "rope_parameters": {"full_attention": YARN, "sliding_attention": rope("default")},
    },
}


def saved(config: dict[str, Any], folder: Path) -> tuple[Any, dict[str, Any]]:
    """transformers' model and the config.json that we write for it; what is written is opened again
    by us and by transformers.
    """
    model = tiny.random_model(config)
    save_model(
        load_model(tiny.directory(model, folder / "in"), dtype="float32", add_note=print).model,
        folder / "out",
    )
    assert close(load_model(folder / "out", dtype="float32", add_note=print).model, model)
    assert close(AutoModelForCausalLM.from_pretrained(folder / "out"), model)
    return model, json.loads((folder / "out" / "config.json").read_text())


def older_frequencies(
    config: dict[str, Any], head: int, theta_name: str, share_name: str
) -> Tensor:
    """[dim / 2] as transformers 4 computes them from a config, written down from its
    modeling_rope_utils.py.
    """
    theta, dim = config.get(theta_name, 10000.0), int(head * config.get(share_name, 1.0))
    plain = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    scaling = config.get("rope_scaling")
    if scaling is None:
        return plain
    kind = scaling.get("rope_type", scaling.get("type"))
    assert kind == scaling["type"]  # mlx-lm, and transformers before 4.43, look for this one
    if kind == "linear":
        return plain / scaling["factor"]
    if kind == "llama3":
        context, wavelengths = scaling["original_max_position_embeddings"], 2 * math.pi / plain
        smooth = (context / wavelengths - scaling["low_freq_factor"]) / (
            scaling["high_freq_factor"] - scaling["low_freq_factor"]
        )
        return plain * ((1 - smooth.clamp(0, 1)) / scaling["factor"] + smooth.clamp(0, 1))
    assert kind == "dynamic"  # up to max_position_embeddings
    return plain


@pytest.mark.parametrize(
    "name", ["llama", "llama linear", "llama dynamic", "llama llama3", "gpt_neox", "phi"]
)
def test_an_older_reader_finds_the_same_rotary_frequencies(name: str, tmp_path: Path) -> None:
    model, config = saved(SCALED[name], tmp_path)
    names = (
        ("rotary_emb_base", "rotary_pct")
        if name == "gpt_neox"
        else ("rope_theta", "partial_rotary_factor")
    )
    theirs = dict(model.named_buffers())[
        next(n for n, _ in model.named_buffers() if n.endswith("rotary_emb.inv_freq"))
    ]
    assert torch.allclose(older_frequencies(config, 8, *names).float(), theirs, rtol=1e-6)
    without = {k: v for k, v in config.items() if k not in (*names, "rope_scaling")}
    found = older_frequencies(without, 8, *names)  # what it would make of rope_parameters alone
    assert found.shape != theirs.shape or not torch.allclose(found.float(), theirs, rtol=1e-2)


def test_what_the_older_fields_are(tmp_path: Path) -> None:
    found = {
        name: saved(config, tmp_path / name.replace(" ", "-"))[1] for name, config in SCALED.items()
    }
    older = {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_type": "yarn",
        "type": "yarn",
    }
    assert (found["llama"]["rope_theta"], found["llama"]["rope_scaling"]) == (500.0, None)
    assert (found["qwen3 yarn"]["rope_theta"], found["qwen3 yarn"]["rope_scaling"]) == (
        500.0,
        older,
    )
    assert (found["olmo3"]["rope_theta"], found["olmo3"]["rope_scaling"]) == (500.0, older)
    gemma = found["gemma3_text"]
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (500.0, 50.0)
    assert gemma["rope_scaling"] == {"factor": 8.0, "rope_type": "linear", "type": "linear"}
    assert all(config["rope_parameters"] for config in found.values())


def test_an_older_reader_finds_the_experts(tmp_path: Path) -> None:
    _, config = saved(tiny.FOREIGN["qwen3_moe"], tmp_path)
    assert config["num_experts"] == config["num_local_experts"] == 4


def test_phi3_s_long_rope_has_the_three_fields_that_older_readers_allow() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = {**tiny.SMALL, "model_type": "phi3", "original_max_position_embeddings": 32}
    older = add_legacy_rope_fields(
        {
            **config,
            "rope_parameters": rope("longrope", original_max_position_embeddings=32, **factors),
        }
    )
    assert older["rope_scaling"] == {"type": "longrope", **factors}


def test_settings_that_would_be_read_as_others_are_not_written() -> None:
    """An architecture whose layers differ in a way that one rope_scaling cannot say."""
    config = {**tiny.SMALL, "model_type": "gemma4_text", "rope_parameters": LAYERED}
    assert add_legacy_rope_fields(config) == config


def test_a_converted_gguf_file_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_HOME", str(tmp_path / "home"))
    loaded = load_model(
        write_gguf(tmp_path / "a.gguf", theta=500.0), dtype="float32", add_note=print
    )
    config = json.loads((Path(loaded.source["path"]) / "config.json").read_text())
    assert (config["rope_theta"], config["rope_parameters"]["rope_theta"]) == (500.0, 500.0)


# --- infinities


def test_an_infinity_as_transformers_writes_it(tmp_path: Path) -> None:
    """Mamba2's time_step_limit; saved by us, it is opened again, and written as older readers know
    it.
    """
    model = tiny.random_model(tiny.MAMBA2)
    text = (tiny.directory(model, tmp_path / "in") / "config.json").read_text()
    if "__float__" not in text:  # the default, which this transformers leaves out
        edit_config(tmp_path / "in", time_step_limit=[0.0, {"__float__": "Infinity"}])
    _, config = saved(tiny.MAMBA2, tmp_path / "again")
    assert config["time_step_limit"] == [0.0, math.inf]
    for spelling in ({"__float__": "Infinity"}, math.inf):
        path = edit_config(tmp_path / "in", time_step_limit=[0.0, spelling])
        loaded = load_model(path, dtype="float32", add_note=print).model
        assert loaded.config["time_step_limit"][1] == math.inf
        assert close(loaded, model)


@settings(max_examples=50)
@given(
    st.recursive(
        st.floats() | st.text() | st.integers(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_whatever_transformers_encodes_is_decoded(value: Any) -> None:
    encoded = json.loads(json.dumps(PreTrainedConfig._encode_special_floats(value)))
    assert repr(decode_tagged_floats(encoded)) == repr(value)


def test_what_only_looks_like_a_tagged_float_stays() -> None:
    for value in (
        {"__float__": "12"},
        {"__float__": 3},
        {"__float__": "NaN", "more": 1},
        [{"x": None}],
    ):
        assert decode_tagged_floats(value) == value
