"""Proofs at load time, each made to fail on purpose; the truth is transformers' own forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorry.adapters.mix import AdapterContext
from lorry.errors import ModelError
from lorry.families import find_family
from lorry.models import proofs
from lorry.models.causal_lm import HiddenStates, PackedInput
from lorry.models.decoder.cache import KVCache, RowKVCache
from lorry.models.decoder.decode import DecodeRunner
from lorry.models.decoder.model import Decoder
from lorry.models.hf.model import HfModel
from lorry.models.loading.describe import describe_model
from lorry.models.loading.load import load_model
from tests.support import tiny
from tests.support.threads import Meeting, ThreadRanks
from tests.support.tiny import one_thread  # noqa: F401 - a fixture

BERT = {
    "model_type": "bert",
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# Models that see the future, and the field that makes them
BLIND = {
    "bert": (BERT, "is_decoder=true"),
    "embeddinggemma": (
        {**tiny.FOREIGN["gemma3_text"], "use_bidirectional_attention": True},
        "use_bidirectional_attention=false",
    ),
    # transformers reads it with getattr; LlamaConfig does not list it, and Lorry's own decoder is
    # causal all the same
    "llama": ({**tiny.LLAMA, "is_causal": False}, "is_causal=true"),
    "qwen2": ({**tiny.LLAMA, "model_type": "qwen2", "is_causal": False}, "is_causal=true"),
}


@pytest.fixture(autouse=True)
def nothing_proven_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LORRY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LORRY_PROOFS", raising=False)
    proofs._proven_digests.cache_clear()
    yield
    proofs._proven_digests.cache_clear()


def saved(config: dict[str, Any], path: Path) -> tuple[Any, Path]:
    inner = tiny.random_model(config)
    return inner, tiny.directory(inner, path / "model")


def moved(inner: Any, last: int) -> float:
    """How far a change of the last token moves the logits before it, as transformers computes them."""
    ids = tiny.text_ids()
    other = ids.clone()
    other[0, -1] = (other[0, -1] + last) % tiny.VOCAB
    with torch.no_grad():
        return float((inner(ids).logits - inner(other).logits)[0, :-1].abs().max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", BLIND)
def test_a_model_that_sees_the_future_is_refused(kind: str, dtype: str, tmp_path: Path) -> None:
    config, field = BLIND[kind]
    inner, path = saved(config, tmp_path)
    assert moved(inner, 3) > 1e-3
    notes: list[str] = []
    with pytest.raises(
        ModelError,
        match=f"(?s)model: .*is not a causal language model: changing tokens .* Set {field}",
    ):
        load_model(path, dtype=dtype, add_note=notes.append)
    if kind == "bert":
        assert any("transformers says" in note and "is_decoder=True" in note for note in notes)
    name, _, value = field.partition("=")
    tiny.edit_config(path, **{name: value == "true"})
    assert load_model(path, dtype=dtype, add_note=print).source["family"] == (
        kind if kind in ("llama", "qwen2") else None
    )


OTHERS = {
    "xlnet": (
        {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        "It cannot be trained or scored as one",
    ),
    "xlm": (
        {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
        "Set causal=true",
    ),
    "reformer": (
        {
            "is_decoder": True,
            "axial_pos_embds": False,
            "attn_layers": ["lsh"],
            "num_hidden_layers": 1,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "attention_head_size": 8,
            "feed_forward_size": 48,
            "lsh_attn_chunk_length": 4,
            "num_buckets": 4,
            "max_position_embeddings": 64,
        },
        "gives different scores for the same tokens",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_others_that_are_no_causal_models(kind: str, tmp_path: Path) -> None:
    """XLNet reads both ways and says max_position_embeddings=-1; Reformer sorts all tokens by
    random hashes.
    """
    config, words = OTHERS[kind]
    _, path = saved({"model_type": kind, "vocab_size": tiny.VOCAB, **config}, tmp_path)
    with pytest.raises(ModelError, match=words):
        load_model(path, dtype="float32", add_note=print)


def test_a_leak_into_one_position_and_of_any_size_is_found() -> None:
    model = HfModel(tiny.random_model(tiny.FOREIGN["granite"]))
    assert proofs.find_future_leak(model) == ""
    whole = model.hidden

    def leaking(packed: PackedInput, call: AdapterContext, **options: Any) -> HiddenStates:
        last = whole(packed, call, **options).last
        assert last is not None
        return HiddenStates(last + 1e-6 * last.roll(-1, 0))

    model.__dict__["hidden"] = leaking
    assert "changing tokens" in proofs.find_future_leak(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "qwen2_moe"])
def test_experts_whose_groups_change_with_later_tokens_are_no_leak(
    kind: str, dtype: torch.dtype
) -> None:
    more = {
        "num_experts": 8,
        "num_local_experts": 8,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    for seed in range(3):
        model = HfModel(
            tiny.random_model({**tiny.MOE, **more, "model_type": kind}, seed=seed).to(dtype)
        )
        assert proofs.find_future_leak(model) == ""
        assert proofs.find_cache_error(model) == ""


def test_rounding_alone_is_told_from_a_leak_by_the_gradient() -> None:
    model = HfModel(tiny.random_model(tiny.FOREIGN["granite"]).to(torch.bfloat16))
    whole = model.hidden

    def noisy(packed: PackedInput, call: AdapterContext, **options: Any) -> HiddenStates:
        last = whole(packed, call, **options).last
        assert last is not None
        # depends on all tokens, as the order of sums over an expert's tokens does
        with torch.no_grad():
            noise = (
                torch.randn(
                    last.shape, generator=torch.Generator().manual_seed(int(packed.tokens.sum()))
                )
                * 1e-2
            )
        return HiddenStates(last + noise.to(last.dtype))

    model.__dict__["hidden"] = noisy
    assert proofs.find_future_leak(model) == ""


@pytest.mark.parametrize("name", tiny.VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family_is_proven_and_runs_natively(name: str, dtype: str, tmp_path: Path) -> None:
    notes: list[str] = []
    loaded = load_model(
        tiny.directory(tiny.fresh(name), tmp_path / "m"), dtype=dtype, add_note=notes.append
    )
    assert isinstance(loaded.model, Decoder), notes
    assert len(list((tmp_path / "home" / "proofs").iterdir())) == 1


def test_a_field_that_only_transformers_reads_sends_the_model_to_transformers(
    tmp_path: Path,
) -> None:
    """GPT-NeoX's rotary table looks for `head_dim`, which its config class does not list."""
    inner, path = saved({**tiny.NEOX, "head_dim": 4}, tmp_path)
    notes: list[str] = []
    loaded = load_model(path, dtype="float32", add_note=notes.append)
    assert loaded.source["family"] is None
    assert any("other logits than transformers" in note and "more slowly" in note for note in notes)
    assert torch.equal(tiny.logits(loaded.model), inner(tiny.text_ids()).logits)


def test_a_broken_decoder_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, path = saved(tiny.LLAMA, tmp_path)
    right = proofs.Decoder._rotary_tables

    def late(self: Decoder, positions: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return right(self, positions * 2)

    monkeypatch.setattr(Decoder, "_rotary_tables", late)
    notes: list[str] = []
    loaded = load_model(path, dtype="float32", add_note=notes.append)
    assert "other logits than transformers" in loaded.source["why"]
    assert tiny.close(loaded.model, inner)
    assert len(list((tmp_path / "home" / "proofs").iterdir())) == 1  # that of transformers' own


def test_a_broken_cache_of_the_decoder_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = saved(tiny.LLAMA, tmp_path)
    for kind in (KVCache, RowKVCache):
        right = kind.write
        broken = lambda self, layer, rows, places, k, v, right=right: right(  # noqa: E731
            self, layer, rows, places, v, v
        )
        monkeypatch.setattr(kind, "write", broken)
    assert "with its cache" in load_model(path, dtype="float32", add_note=print).source["why"]


def test_a_fault_of_our_own_code_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a reason to run through transformers, more slowly and with nothing but a note."""
    _, path = saved(tiny.LLAMA, tmp_path)
    monkeypatch.delattr(Decoder, "new_cache")
    monkeypatch.delattr(DecodeRunner, "new_cache")
    with pytest.raises((AttributeError, TypeError), match="new_cache"):
        load_model(path, dtype="float32", add_note=print)


def test_what_ranks_that_share_a_model_meet_in_the_proof_is_told_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one device the model would run another way; where only Lorry's decoder can be shared, it would be
    told as that of a config that cannot."""
    _, path = saved(tiny.LLAMA, tmp_path)

    def fail(*given: Any, **named: Any) -> None:
        raise RuntimeError("can't start new thread")

    for kind in (Decoder, DecodeRunner):
        monkeypatch.setattr(kind, "new_cache", fail)
    assert "start new thread" in load_model(path, dtype="float32", add_note=print).source["why"]
    ranks = ThreadRanks(0, 2, Meeting(2))
    with pytest.raises(RuntimeError, match=r"^can't start new thread$"):
        load_model(path, dtype="float32", add_note=print, ranks=ranks)


def test_a_decoder_that_sees_the_future_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = saved(tiny.LLAMA, tmp_path)
    whole = Decoder.hidden

    def leaking(
        self: Decoder, packed: PackedInput, call: AdapterContext, **options: Any
    ) -> HiddenStates:
        last = whole(self, packed, call, **options).last
        assert last is not None
        # less than what tells two implementations apart
        return HiddenStates(last + 1e-6 * last.mean(0))

    monkeypatch.setattr(Decoder, "hidden", leaking)
    assert (
        "changes its scores at those before"
        in load_model(path, dtype="float32", add_note=print).source["why"]
    )


def test_a_proof_is_made_once_for_a_config_and_again_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = saved(tiny.LLAMA, tmp_path)
    load_model(path, dtype="float32", add_note=print)
    made: list[str] = []
    monkeypatch.setattr(
        proofs,
        "_compare_native",
        lambda family, *given: made.append(family.name) or "not this one",
    )
    for forget in (False, True):  # another process finds it on disk
        if forget:
            proofs._proven_digests.cache_clear()
        assert load_model(path, dtype="float32", add_note=print).source["family"] == "llama"
    assert made == []
    for changes, dtype in (
        ({}, "bfloat16"),
        ({"rms_norm_eps": 1e-3}, "float32"),
        ({"something_new": 1}, "float32"),
    ):
        tiny.edit_config(path, **changes)
        assert load_model(path, dtype=dtype, add_note=print).source["why"] == "not this one"


def test_of_a_model_of_transformers_it_is_made_once_for_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    real = proofs._prove_or_raise
    monkeypatch.setattr(
        proofs, "_prove_or_raise", lambda model, where: (made.append(where), real(model, where))
    )
    inner, path = saved(tiny.FOREIGN["granite"], tmp_path)
    for _ in range(2):
        load_model(path, dtype="float32", add_note=print)
    assert len(made) == 1
    with torch.no_grad():
        next(inner.parameters())[0, 0] += 1
    load_model(tiny.directory(inner, tmp_path / "other"), dtype="float32", add_note=print)
    load_model(path, dtype="bfloat16", add_note=print)
    assert len(made) == 3


def test_why_a_model_generates_without_a_cache_is_kept_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = saved(tiny.FOREIGN["granite"], tmp_path)
    monkeypatch.setattr(proofs, "find_cache_error", lambda model: "its cache is broken")
    for _ in range(2):
        notes: list[str] = []
        loaded = load_model(path, dtype="float32", add_note=notes.append)
        assert isinstance(loaded.model, HfModel)
        assert loaded.model.recompute_reason == "its cache is broken"
        assert any("generation is slow" in note and "its cache is broken" in note for note in notes)
        monkeypatch.setattr(proofs, "find_cache_error", lambda model: pytest.fail("asked again"))


def test_a_model_that_is_refused_is_asked_again(tmp_path: Path) -> None:
    _, path = saved(BERT, tmp_path)
    for _ in range(2):
        with pytest.raises(ModelError, match="is not a causal language model"):
            load_model(path, dtype="float32", add_note=print)


def test_a_proof_leaves_the_random_numbers_of_a_run_alone(tmp_path: Path) -> None:
    _, path = saved(tiny.LLAMA, tmp_path)
    before = torch.get_rng_state()
    load_model(path, dtype="float32", add_note=print)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("config", [BERT, tiny.LLAMA], ids=["bert", "llama"])
def test_the_switch_leaves_them_out_and_says_so(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = saved(config, tmp_path)
    monkeypatch.setenv("LORRY_PROOFS", "0")
    notes: list[str] = []
    load_model(path, dtype="float32", add_note=notes.append)
    assert [
        note
        for note in notes
        if note.startswith("LORRY_PROOFS=0: not checked that no position sees a later one")
    ]


def test_the_twin_of_a_large_model_is_small() -> None:
    large = {
        **tiny.LLAMA,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "vocab_size": 128256,
        "some_new_field": 7,
    }
    family = find_family("llama")
    assert family is not None
    small = proofs.shrink_config(family, large)
    assert {
        k: small[k]
        for k in ("some_new_field", "head_dim", "num_hidden_layers", "num_attention_heads")
    } == {
        "some_new_field": 7,
        "head_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    assert (small["num_key_value_heads"], small["hidden_size"]) == (2, 512)


def test_a_model_with_little_room_is_proven_as_far_as_it_goes(tmp_path: Path) -> None:
    for context in (1, 2, 5):
        path = tiny.directory(
            tiny.random_model({**tiny.GPT2, "n_positions": context}), tmp_path / str(context)
        )
        assert describe_model(path, add_note=print).family is not None
        assert load_model(path, dtype="float32", add_note=print).source["family"] == "gpt2"
