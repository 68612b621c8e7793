"""Every tensor of a checkpoint exactly once, all of them used, all finite, and the file that
transformers would read.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorry.adapters.attach import attach
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.spec import LoraSpec
from lorry.errors import ModelError
from lorry.models.loading.load import load_model
from lorry.models.loading.tensor_files import is_finite
from tests.support import tiny
from tests.support.tiny import close, edit_config, one_thread, opened, rewrite  # noqa: F401 - one_thread is a fixture

UP = "model.layers.1.mlp.up_proj.weight"
native = pytest.mark.parametrize("native", [True, False], ids=["native", "hf"])


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny.directory(tiny.trained("llama"), tmp_path / "llama")


def with_value(
    name: str, value: float, dtype: torch.dtype = torch.float32
) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {n: t.to(dtype) for n, t in tensors.items()}
        tensors[name].view(-1)[-1] = value
        return tensors

    return change


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 7, 64, 1003])
def test_one_value_that_is_not_finite_shows(dtype: torch.dtype, size: int) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in {0, size // 2, size - 1}:
            tensor = torch.linspace(-2, 2, size).to(dtype)
            assert is_finite(tensor)
            tensor[place] = value
            assert not is_finite(tensor)
    assert is_finite(torch.empty(0, dtype=dtype))
    assert is_finite(torch.tensor(3))


# --- finite


@native
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite(
    native: bool, value: float, stored: torch.dtype, llama: Path
) -> None:
    rewrite(llama, with_value(UP, value, stored))
    with pytest.raises(
        ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"
    ):
        opened(llama, native=native)


def test_values_too_large_for_the_number_format(llama: Path) -> None:
    rewrite(llama, with_value(UP, 1e6))
    opened(llama, dtype="float32")
    with pytest.raises(
        ModelError,
        match=r"up_proj\.weight holds values too large for float16; open it with dtype=float32",
    ):
        opened(llama, dtype="float16")


def test_float32_is_no_remedy_for_float32(llama: Path) -> None:
    rewrite(llama, with_value(UP, 1e300, torch.float64))
    with pytest.raises(ModelError, match=r"up_proj\.weight holds values too large for float32$"):
        opened(llama, dtype="float32")


def test_what_transformers_read_into_float16_may_have_been_whole(llama: Path) -> None:
    rewrite(llama, with_value(UP, 1e6))
    with pytest.raises(
        ModelError,
        match=r"holds NaN or infinity in float16; load it with dtype=float32 to see whether the file does too",
    ):
        opened(llama, dtype="float16", native=False)


@native
def test_a_buffer_that_is_not_used_may_not_be_damaged(native: bool, llama: Path) -> None:
    """Recomputed, so the model would be right; but what else in such a file is? An infinite mask is
    as it should be.
    """
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(llama, lambda t: {**t, name: torch.tensor([1.0, float("inf")])})
    opened(llama, native=native)
    rewrite(llama, lambda t: {**t, name: torch.tensor([1.0, float("nan")])})
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.rotary_emb\.inv_freq holds NaN"):
        opened(llama, native=native)


@native
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_codes_in_the_place_of_weights(native: bool, stored: torch.dtype, llama: Path) -> None:
    rewrite(llama, lambda t: {**t, UP: t[UP].to(stored)})
    with pytest.raises(
        ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is stored as (I8|F8_E4M3)"
    ):
        opened(llama, native=native)


# --- once


def shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write ``tensors`` as two shards and an index into ``folder``."""
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[:9],
        "model-00002-of-00002.safetensors": names[9:],
    }
    for file, held in parts.items():
        save_file({n: tensors[n] for n in held}, folder / file, metadata={"format": "pt"})
    where = {n: file for file, held in parts.items() for n in held}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )


@native
def test_a_single_file_beside_an_index_of_others_is_refused(native: bool, llama: Path) -> None:
    """transformers reads model.safetensors, we read the index: one of the two is stale, and nobody
    can know which.
    """
    shards(llama, {n: t * 2 for n, t in load_file(llama / "model.safetensors").items()})
    with pytest.raises(
        ModelError, match=r"two checkpoints: model\.safetensors, and .*index\.json with model-00001"
    ):
        opened(llama, native=native)
    (llama / "model.safetensors").unlink()
    sharded = opened(llama, native=native)
    theirs = tiny.trained("llama").state_dict()
    assert all(torch.equal(t, theirs[n] * 2) for n, t in sharded.state_dict().items())


def test_an_index_left_behind_is_called_so(llama: Path) -> None:
    """Its shards are gone: transformers would not even look at it."""
    where = dict.fromkeys(
        load_file(llama / "model.safetensors"), "model-00001-of-00001.safetensors"
    )
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ModelError, match="two checkpoints"):
        opened(llama)


def test_an_index_of_the_single_file_is_that_file(llama: Path) -> None:
    where = dict.fromkeys(load_file(llama / "model.safetensors"), "model.safetensors")
    (llama / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    assert close(opened(llama), tiny.trained("llama"))


@native
def test_a_config_does_not_name_the_weights(native: bool, llama: Path) -> None:
    """transformers reads the file that `transformers_weights` names; we would read
    model.safetensors.
    """
    shutil.copy(llama / "model.safetensors", llama / "other.safetensors")
    with pytest.raises(ModelError, match=r"transformers_weights='other\.safetensors'"):
        opened(edit_config(llama, transformers_weights="other.safetensors"), native=native)
    assert close(
        opened(edit_config(llama, transformers_weights="model.safetensors"), native=native),
        tiny.trained("llama"),
    )


@native
def test_one_tensor_under_two_names(native: bool, llama: Path) -> None:
    rewrite(llama, lambda t: {**t, UP.removeprefix("model."): t[UP] + 1})
    with pytest.raises(ModelError, match=r"both .*layers\.1\.mlp\.up_proj\.weight.* are "):
        opened(llama, native=native)


@native
def test_one_tensor_in_two_shards(native: bool, llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    shards(llama, tensors)
    second = load_file(llama / "model-00002-of-00002.safetensors")
    first = sorted(tensors)[0]
    save_file({**second, first: tensors[first] + 1}, llama / "model-00002-of-00002.safetensors")
    with pytest.raises(
        ModelError,
        match=rf"holds '{first}', which model\.safetensors\.index\.json places in 'model-00001",
    ):
        opened(llama, native=native)


def header_twice(file: Path, name: str, **changes: Any) -> None:
    """Put a second entry of ``name`` behind the first one: same bytes, another shape."""
    whole = file.read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    entry = {**json.loads(whole[8 : 8 + size])[name], **changes}
    header = (
        whole[8 : 8 + size].rstrip()[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}".encode()
    )
    header += b" " * (-len(header) % 8)
    file.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + size :])


@native
def test_one_name_twice_in_a_header(native: bool, llama: Path) -> None:
    header_twice(llama / "model.safetensors", UP)
    with pytest.raises(
        ModelError, match=r"its header holds 'model\.layers\.1\.mlp\.up_proj\.weight' twice"
    ):
        opened(llama, native=native)


def test_one_name_twice_in_an_adapter_s_header(llama: Path, tmp_path: Path) -> None:
    model = opened(llama)
    attach(model, LoraSpec(r=2, target_modules=("q_proj",), init_lora_weights=False))
    save_adapter(model, tmp_path / "adapter")
    name = next(
        n for n in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "lora_B" in n
    )
    header_twice(tmp_path / "adapter" / "adapter_model.safetensors", name)
    with pytest.raises(ModelError, match=r"its header holds 'base_model.*lora_B.*' twice"):
        load_adapter(opened(llama), tmp_path / "adapter")


# --- through transformers alone: what its loader only warns of, or does not even see


def test_a_tied_head_that_differs_is_refused_as_well(tmp_path: Path) -> None:
    path = tiny.directory(tiny.trained("llama tied"), tmp_path)
    rewrite(path, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1})
    with pytest.raises(ModelError, match=r"tie_word_embeddings=true.*differ"):
        opened(path, native=False)


def test_a_gap_among_experts(tmp_path: Path) -> None:
    """Expert 1 missing and one too many at the end: stacked in order, every shape is right and
    every expert behind wrong.
    """
    path = tiny.directory(tiny.random_model(tiny.FOREIGN["qwen3_moe"]), tmp_path)

    def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n.replace("experts.1.", "experts.4."): t for n, t in tensors.items()}

    rewrite(path, moved)
    with pytest.raises(
        ModelError, match=r"experts\.1\.\w+\.weight is missing, and .*experts\.\*\..* goes up to 4"
    ):
        opened(path)


def test_a_missing_expert(tmp_path: Path) -> None:
    path = tiny.directory(tiny.random_model(tiny.FOREIGN["qwen3_moe"]), tmp_path)
    rewrite(
        path,
        lambda t: {
            n: v for n, v in t.items() if n != "model.layers.0.mlp.experts.3.down_proj.weight"
        },
    )
    with pytest.raises(ModelError, match=r"misshapen.*layers\.0\.mlp\.experts\.down_proj"):
        opened(path)


def test_what_transformers_leaves_out_by_design_is_said(tmp_path: Path) -> None:
    """Its DeepSeek-V3 class drops `model.layers.61` (a multi-token prediction head) without a word."""
    config = {
        **tiny.SMALL,
        "model_type": "deepseek_v3",
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    }
    path = tiny.directory(tiny.random_model(config), tmp_path)
    rewrite(path, lambda t: {**t, "model.layers.61.eh_proj.weight": torch.ones(32, 64)})
    notes: list[str] = []
    load_model(path, dtype="float32", add_note=notes.append)
    assert any(
        "1 tensors are not part of DeepseekV3ForCausalLM and were ignored (model.layers.61.eh_proj.weight)"
        in n
        for n in notes
    )


@pytest.mark.parametrize("name", tiny.FOREIGN)
def test_whole_checkpoints_of_other_architectures_pass(name: str, tmp_path: Path) -> None:
    model = tiny.random_model(tiny.FOREIGN[name])
    assert close(opened(tiny.directory(model, tmp_path)), model)
