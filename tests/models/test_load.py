"""Loading: every tensor accounted for, what the decoder cannot compute handed on with the reason,
names found or explained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorry.adapters.attach import attach
from lorry.adapters.merge import merge, unmerge
from lorry.adapters.spec import LoraSpec
from lorry.errors import ConfigError, ModelError
from lorry.models.decoder.model import Decoder
from lorry.models.hf.model import HfModel
from lorry.models.loading import sources
from lorry.models.loading.digest import sample_digest
from lorry.models.loading.load import load_model, pick_device, pick_dtype
from tests.support import tiny
from tests.support.tiny import close, edit_config, logits, one_thread, opened, rewrite  # noqa: F401 - one_thread is a fixture


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny.directory(tiny.trained("llama"), tmp_path / "llama")


# --- what is read


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_native_and_forced_models_agree_and_have_the_same_names(name: str, tmp_path: Path) -> None:
    path = tiny.directory(tiny.trained(name), tmp_path)
    native, forced = opened(path), opened(path, native=False)
    assert isinstance(native, Decoder)
    assert isinstance(forced, HfModel)
    assert set(native.state_dict()) == set(forced.state_dict())
    assert (logits(native) - logits(forced)).abs().max() <= 1e-4
    assert (
        logits(native) - tiny.trained(name)(input_ids=tiny.text_ids()).logits
    ).abs().max() <= 1e-4
    assert not any(p.requires_grad for p in native.parameters())


def test_shards_and_their_index(tmp_path: Path) -> None:
    tiny.trained("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert close(opened(tmp_path), tiny.trained("llama"))


def test_hub_gpt2_names_and_buffers(tmp_path: Path) -> None:
    """The hub's GPT-2 has no `transformer.` prefix and stores the causal mask; the mask is dropped,
    nothing else is.
    """
    path = tiny.directory(tiny.trained("gpt2"), tmp_path)

    def old(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        bare = {n.removeprefix("transformer."): t for n, t in tensors.items()}
        return {
            **bare,
            "h.0.attn.bias": torch.ones(1, 1, 64, 64),
            "h.1.attn.masked_bias": torch.tensor(-1e4),
        }

    for native in (True, False):
        assert (
            logits(opened(rewrite(path, old), native=native)) - logits(tiny.trained("gpt2"))
        ).abs().max() <= 1e-5


@pytest.mark.parametrize("spelling", ["embed_out.weight", "lm_head.weight"])
def test_neox_heads_and_buffers_in_either_spelling(spelling: str, tmp_path: Path) -> None:
    path = tiny.directory(tiny.trained("gpt_neox parallel"), tmp_path)

    def old(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        head = next(n for n in tensors if n in ("embed_out.weight", "lm_head.weight"))
        buffers = {
            f"gpt_neox.layers.0.attention.{n}": torch.ones(2)
            for n in ("bias", "masked_bias", "rotary_emb.inv_freq")
        }
        return {
            **{n: t for n, t in tensors.items() if n != head},
            spelling: tensors[head],
            **buffers,
        }

    assert (
        logits(opened(rewrite(path, old))) - logits(tiny.trained("gpt_neox parallel"))
    ).abs().max() <= 1e-4


def test_a_tied_head_may_be_absent_or_equal_but_not_different(tmp_path: Path) -> None:
    path, head = tiny.directory(tiny.trained("llama tied"), tmp_path), "lm_head.weight"
    expected = logits(tiny.trained("llama tied"))
    absent = opened(path)
    assert isinstance(absent, Decoder)
    assert absent.head.weight is absent.embed.weight
    assert (logits(absent) - expected).abs().max() <= 1e-5
    rewrite(path, lambda t: {**t, head: t["model.embed_tokens.weight"].clone()})
    assert (logits(opened(path)) - expected).abs().max() <= 1e-5
    rewrite(path, lambda t: {**t, head: t[head] + 1})
    with pytest.raises(ModelError, match=r"tie_word_embeddings=true.*differ"):
        opened(path)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_types_are_converted(stored: torch.dtype, llama: Path) -> None:
    exact = load_file(llama / "model.safetensors")
    rewrite(llama, lambda tensors: {n: t.to(stored) for n, t in tensors.items()})
    for wanted in (torch.float32, torch.bfloat16):
        state = opened(llama, dtype=wanted).state_dict()
        assert all(torch.equal(state[n], t.to(stored).to(wanted)) for n, t in exact.items())


def test_loading_leaves_the_file_alone(llama: Path) -> None:
    """Tensors may be mapped from the file; writing to them must not reach it."""
    before = (llama / "model.safetensors").read_bytes()
    model = opened(llama)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert (llama / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("mistral", {"sliding_window": 8}, "sliding_window=8"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            "sliding_window=8",
        ),
        ("llama", {"hidden_act": "relu2"}, "no activation 'relu2'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type='dynamic'",
        ),
    ],
)
def test_what_the_decoder_does_not_compute_goes_to_transformers_with_the_reason(
    name: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    inner = tiny.fresh(name, **changes)
    notes: list[str] = []
    loaded = load_model(tiny.directory(inner, tmp_path), dtype="float32", add_note=notes.append)
    assert isinstance(loaded.model, HfModel)
    assert loaded.source["family"] is None
    assert reason in loaded.source["why"]
    assert any(reason in note for note in notes)
    assert (logits(loaded.model) - inner(input_ids=tiny.text_ids()).logits).abs().max() <= 1e-5


def test_dtype_and_device(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.delenv("LORRY_DTYPE", raising=False)
    # whatever this processor is: tests/test_processor.py
    monkeypatch.setattr("lorry.models.loading.load.may_use_bfloat16", lambda: True)
    assert pick_dtype("bf16", cpu) == torch.bfloat16
    assert pick_dtype(torch.float16, cpu) == torch.float16
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda fast=fast: {"avx2": True, "amx_bf16": fast}
        )
        assert opened(llama, dtype="auto").dtype == expected
        # one kind of machine runs what the other would
        for told in (torch.float32, torch.bfloat16):
            monkeypatch.setenv("LORRY_DTYPE", str(told).removeprefix("torch."))
            assert opened(llama, dtype="auto").dtype == told
            assert opened(llama, dtype="float32").dtype == torch.float32
        monkeypatch.delenv("LORRY_DTYPE")
    monkeypatch.setenv("LORRY_DTYPE", "half")
    with pytest.raises(
        ConfigError, match="LORRY_DTYPE='half' in the environment; give float32 or bfloat16"
    ):
        pick_dtype("auto", cpu)
    with pytest.raises(ConfigError, match="choose auto"):
        pick_dtype("float8", cpu)
    with pytest.raises(ConfigError, match="device='cudda'"):
        pick_device("cudda")
    assert load_model(llama, dtype="float32", add_note=print).tokenizer is None


def test_the_bases_own_dropout_is_off_and_said_to_be(tmp_path: Path) -> None:
    notes: list[str] = []
    path = edit_config(tiny.directory(tiny.fresh("gpt2"), tmp_path), resid_pdrop=0.1)
    for native in (True, False):
        model = opened(path, native=native, add_note=notes.append).train()
        assert torch.equal(logits(model), logits(model))
    assert sum("resid_pdrop=0.1" in note for note in notes) == 2


# --- names


def test_a_misspelt_path_and_an_unknown_id(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama.parent)
    for typed, hint in (
        ("./lama", "llama"),
        ("lama", "llama"),
        ("smollm2-135m-instrukt", "smollm2-135m-instruct"),
    ):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
        with pytest.raises(ModelError, match=f"did you mean '{hint}'|did you mean './{hint}'"):
            opened(typed)
    (llama.parent / "newrun-x7").mkdir()  # as a new run's own directory: nothing to open
    with pytest.raises(ModelError, match="no model at") as told:
        opened("./newrun-x8")
    assert "did you mean" not in str(told.value)
    with pytest.raises(ModelError, match="give the directory"):
        opened(llama / "config.json")
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        opened(llama.parent)


def offline(name: str, **options: Any) -> str:
    from huggingface_hub.errors import LocalEntryNotFoundError

    raise LocalEntryNotFoundError("Cannot find the requested files in the disk cache.")


def test_a_hub_id_is_downloaded_without_pickles_or_code(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    loaded = load_model("someone/tiny-llama", revision="v1", dtype="float32", add_note=print)
    assert close(loaded.model, tiny.trained("llama"))
    assert loaded.source["kind"] == "hub"
    name, options = asked[0]
    assert (name, options["revision"]) == ("someone/tiny-llama", "v1")
    assert not any(p.endswith((".bin", ".py", ".pt", "*")) for p in options["allow_patterns"])
    load_model("someone/tiny-llama", trust_remote_code=True, add_note=print)
    assert "*.py" in asked[1][1]["allow_patterns"]


def test_an_unreachable_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        ModelError, match=r"'someone/x' at revision 'v2'.*no such directory.*smollm2-135m-instruct"
    ):
        opened("someone/x", revision="v2")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        opened("someone/x")


# --- adapters name their base


def adapter(path: Path, recorded: str | None, **facts: Any) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": recorded}))
    if facts:
        (path / "lorry_adapter.json").write_text(json.dumps(facts))
    return path


def test_an_adapter_or_run_opens_its_base(llama: Path, tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", str(llama))
    loaded = load_model(one, dtype="float32", add_note=print)
    assert loaded.source["adapter"] == str(one)
    assert loaded.source["path"] == str(llama)
    run = tmp_path / "run"
    adapter(run / "a", "/gone", base={"name": "x/gone", "path": str(llama)})
    adapter(run / "b", str(llama))
    assert load_model(run, dtype="float32", add_note=print).source["adapter"] == str(run)
    adapter(run / "c", str(one))
    with pytest.raises(ModelError, match="its adapters were trained on different base models"):
        opened(run)
    with pytest.raises(ModelError, match="is an adapter"):
        opened(adapter(tmp_path / "nested", str(one)))
    with pytest.raises(ModelError, match="base_model_name_or_path"):
        opened(adapter(tmp_path / "nameless", None))
    with pytest.raises(ModelError, match=r"lost is an adapter.*'/gone/base'"):
        opened(adapter(tmp_path / "lost", "/gone/base"))


def test_an_adapter_of_the_embedded_model_finds_it_on_another_machine(tmp_path: Path) -> None:
    path = adapter(
        tmp_path / "x", "/home/someone/.cache/lorry/models/smollm2-135m-instruct-0123456789ab"
    )
    assert sources._base_of_adapter(path) == "smollm2-135m-instruct"


# --- the digest


def test_the_digest_sees_base_weights_and_nothing_else(llama: Path) -> None:
    model = opened(llama)
    before, whole = sample_digest(model), sample_digest(model, whole=True)
    attach(model, LoraSpec(r=2, init_lora_weights=False))
    assert (sample_digest(model), sample_digest(model, whole=True)) == (before, whole)
    assert (sample_digest(opened(llama)), sample_digest(opened(llama, native=False))) == (
        before,
        before,
    )
    merge(model)
    # the base of a merged model is what it keeps aside
    assert sample_digest(model, whole=True) == whole
    unmerge(model)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").view(torch.int32)[3, 5] ^= (
            1  # the smallest change there is
        )
    assert sample_digest(model, whole=True) != whole
    assert sample_digest(model) != before  # in a model this small every value is sampled


def test_transformers_reads_the_same_directory(llama: Path) -> None:
    """The oracle itself: what we load is what transformers loads."""
    theirs = AutoModelForCausalLM.from_pretrained(llama)
    assert close(opened(llama), theirs)
