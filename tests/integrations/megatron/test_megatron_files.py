"""Adapters of a Megatron model on two ranks as files: PEFT's at every layout, Megatron's distributed
checkpoints, and what is refused; initial values, dropout and traffic at every layout.

One pair of processes runs `tests/support/megatron_files.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

pytest.importorskip(
    "megatron.core", reason="megatron-core is an extra: pip install 'lorry[megatron]'"
)

import lorry
from lorry.adapters.attach import attach, get_bank
from lorry.adapters.peft.base_digest import base_digest
from lorry.adapters.peft.files import load_adapter
from lorry.errors import ModelError
from lorry.models.loading.load import load_model
from lorry.notes import ignore_note
from tests.support.megatron_files import LAYOUTS, RANK, RATE, SPEC, STEPS
from tests.support.megatron_gradients import LENGTH, ROWS, batch
from tests.support.megatron_models import make_model
from tests.support.ranks import run_ranks

# of a pair of processes: far above what it takes, far below the suite's limit
pytestmark = pytest.mark.timeout(600)


class Found(NamedTuple):
    """The folder that both ranks wrote into, and what each found."""

    folder: Path
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("megatron-files")
    make_model("qwen2", folder)
    (folder / "qwen2").rename(folder / "model")
    for kind in ("canonical", "fused"):
        (folder / f"qwen2-{kind}").rename(folder / kind)
    run_ranks("tests.support.megatron_files", folder)
    return Found(folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)])


def open_base(found: Found) -> Any:
    """The base in our own decoder."""
    return load_model(
        found.folder / "model", dtype="float32", device="cpu", add_note=ignore_note
    ).model


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["canonical", "fused"])
def test_an_adapter_is_the_same_after_every_layout(found: Found, kind: str) -> None:
    true = tensors(found.folder / kind)
    for layout in LAYOUTS:
        got = tensors(found.folder / f"{kind}-{layout}")
        assert got.keys() == true.keys()
        assert all(torch.equal(got[name], true[name]) for name in true), layout


@pytest.mark.parametrize("kind", ["canonical", "fused"])
def test_peft_and_lorry_read_what_was_saved(found: Found, kind: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(found.folder / "model", dtype=torch.float32)
    tokens = batch(27)
    with torch.no_grad():
        bare = base(input_ids=tokens).logits
        true = PeftModel.from_pretrained(base, found.folder / kind)(input_ids=tokens).logits
        again = AutoModelForCausalLM.from_pretrained(found.folder / "model", dtype=torch.float32)
        read = PeftModel.from_pretrained(again, found.folder / f"{kind}-tp2-sp-te")
        assert torch.equal(read(input_ids=tokens).logits, true)
        ours = open_base(found)
        # the digest of the base, gathered from ranks, is the one that is asked for here
        load_adapter(ours, found.folder / f"{kind}-tp2-sp-te")
        torch.testing.assert_close(ours(tokens).logits, true, rtol=1e-4, atol=1e-4)
    assert float((true - bare).abs().max()) > 0.1


def test_files_say_which_mode_and_which_base(found: Found) -> None:
    ours = open_base(found)
    for layout in LAYOUTS:
        for kind in ("canonical", "fused"):
            facts = json.loads((found.folder / f"{kind}-{layout}/lorry_adapter.json").read_text())
            assert (facts["megatron_mode"], facts["base_digest"]) == (kind, base_digest(ours))
    config = json.loads((found.folder / "canonical-tp2/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((found.folder / "model").resolve())


def test_initial_values_are_the_banks_at_every_layout(found: Found) -> None:
    ours = open_base(found)
    # Megatron's name of gate and up, which the bank does not have
    ranks = {"gate_proj": SPEC.rank_pattern["linear_fc1"], "up_proj": 2}
    attach(ours, lorry.LoraSpec(r=SPEC.r, lora_alpha=SPEC.lora_alpha, rank_pattern=ranks), seed=7)
    true = get_bank(ours)["default"].tensors()
    for layout in LAYOUTS:
        got = tensors(found.folder / f"new-{layout}")
        assert len(got) == len(true)
        for name, value in true.items():
            assert torch.equal(got[f"base_model.model.{name}.weight"], value), (layout, name)


@pytest.mark.parametrize("kind", ["canonical", "fused"])
def test_megatrons_checkpoints_hold_adapters_at_another_layout(found: Found, kind: str) -> None:
    got, true = tensors(found.folder / f"from-checkpoint-{kind}"), tensors(found.folder / kind)
    assert got.keys() == true.keys()
    assert all(torch.equal(got[name], true[name]) for name in true)


def test_a_base_checkpoint_is_taken_once_and_said(found: Found) -> None:
    for rank in found.ranks:
        assert ["holds no adapters" in note for note in rank["base, once"]] == [True]
        assert rank["base, twice"][0] == "ModelError"
        assert "not new" in rank["base, twice"][1]
        assert rank["some lacking"][0] == "ModelError"
        assert "lora_A_gate.layer_0" in rank["some lacking"][1]


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("drifted", "ContractError", "layers.0.mlp.down_proj.lora_B is the same on every rank"),
        ("not finite", "ModelError", "NaN"),
        ("one of two", "ModelError", "needs"),
        ("another base", "ModelError", "other base weights"),
    ],
)
def test_a_fault_is_raised_on_every_rank(found: Found, fault: str, kind: str, words: str) -> None:
    for rank in found.ranks:
        # a rank that has it from another one: a ModelError that names the rank
        assert rank[fault][0] in (kind, "ModelError")
        assert words in rank[fault][1]
    for name in ("drifted", "not-finite"):
        assert not (found.folder / name).exists()


def test_peft_does_not_take_half_of_a_matrix(found: Found) -> None:
    base = AutoModelForCausalLM.from_pretrained(found.folder / "model")
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(base, found.folder / "one-of-two")
    with pytest.raises(ModelError, match="needs"):
        load_adapter(open_base(found), found.folder / "one-of-two")


@pytest.mark.parametrize("kind", ["canonical", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_pefts_and_rounded_once(
    found: Found, kind: str, dtype: torch.dtype
) -> None:
    base = AutoModelForCausalLM.from_pretrained(found.folder / "model", dtype=dtype).double()
    model = PeftModel.from_pretrained(base, found.folder / kind).double()
    true = {n: p.to(dtype) for n, p in model.merge_and_unload().named_parameters()}
    word = str(dtype).removeprefix("torch.")
    ranks = [
        load_file(found.folder / f"merged-{kind}-{word}-{rank}.safetensors") for rank in (0, 1)
    ]

    def joined(name: str, dim: int) -> Tensor:
        return torch.cat([rank[name] for rank in ranks], dim)

    got = {}
    for layer in (0, 1):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        # a rank has one KV group: its two queries, its key, its value, of 8 rows each
        qkv = [rank[f"{ours}.self_attention.linear_qkv.weight"].split([16, 8, 8]) for rank in ranks]
        for target, parts in zip("qkv", zip(*qkv, strict=True), strict=True):
            got[f"{theirs}.self_attn.{target}_proj.weight"] = torch.cat(parts)
        fc1 = [rank[f"{ours}.mlp.linear_fc1.weight"].chunk(2) for rank in ranks]
        for target, parts in zip(("gate", "up"), zip(*fc1, strict=True), strict=True):
            got[f"{theirs}.mlp.{target}_proj.weight"] = torch.cat(parts)
        got[f"{theirs}.self_attn.o_proj.weight"] = joined(
            f"{ours}.self_attention.linear_proj.weight", 1
        )
        got[f"{theirs}.mlp.down_proj.weight"] = joined(f"{ours}.mlp.linear_fc2.weight", 1)
    got["model.embed_tokens.weight"] = joined("embedding.word_embeddings.weight", 0)[:27]
    assert not any("lora" in name for name in ranks[0])
    for name, value in got.items():
        error = (value.double() - true[name].double()).abs().max() / true[name].double().abs().max()
        # rounded once: a value between two of bf16 may fall to either where fp32 is 1e-7 off
        assert float(error) < (1e-6 if dtype == torch.float32 else 2**-8)
        same = float((value == true[name]).float().mean())
        assert dtype == torch.float32 or same > 0.999, name
    changed = set(got) - {"model.embed_tokens.weight"}
    plain = dict(AutoModelForCausalLM.from_pretrained(found.folder / "model").named_parameters())
    assert all(not torch.equal(got[n].float(), plain[n].to(dtype).float()) for n in changed)


@pytest.mark.parametrize("layout", ["tp2-sp-te", "pp2"])
def test_the_base_comes_out_as_it_went_in(found: Found, layout: str) -> None:
    got = load_file(found.folder / f"base-{layout}" / "model.safetensors")
    true = load_file(found.folder / "model" / "model.safetensors")
    assert got.keys() == true.keys()
    assert all(torch.equal(got[name], true[name]) for name in true)


@pytest.mark.parametrize("kind", ["canonical", "fused"])
@pytest.mark.parametrize("layout", ["tp2-sp-te", "pp2"])
def test_transformers_computes_with_a_merged_model_what_peft_does(
    found: Found, kind: str, layout: str
) -> None:
    merged = AutoModelForCausalLM.from_pretrained(found.folder / f"merged-{kind}-{layout}")
    base = AutoModelForCausalLM.from_pretrained(found.folder / "model")
    adapted = PeftModel.from_pretrained(base, found.folder / kind)
    weights = dict(adapted.merge_and_unload().named_parameters())
    for name, value in merged.named_parameters():
        error = (value - weights[name]).detach().abs().max() / weights[name].detach().abs().max()
        assert float(error) < 1e-6, name
    base = AutoModelForCausalLM.from_pretrained(found.folder / "model")
    true = PeftModel.from_pretrained(base, found.folder / kind)
    with torch.no_grad():
        tokens = batch(27)
        got, expected = merged(input_ids=tokens).logits, true(input_ids=tokens).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_model_is_not_written_over_another(found: Found) -> None:
    for rank in found.ranks:
        assert rank["taken"][0] in ("ConfigError", "ModelError")
        assert str(found.folder / "model") in rank["taken"][1]


def test_steps_of_megatrons_optimizer_are_adams_on_peft(found: Found) -> None:
    base = AutoModelForCausalLM.from_pretrained(found.folder / "model", dtype=torch.float64)
    model = PeftModel.from_pretrained(base, found.folder / "canonical", is_trainable=True).double()
    adapter = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in adapter.items()}
    optimizer = torch.optim.Adam(adapter.values(), lr=RATE)
    tokens = batch(27)
    for _ in range(STEPS):
        optimizer.zero_grad()
        logits = model(input_ids=tokens).logits[:, :-1]
        functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    for layout in ("tp2", "pp2"):
        got = tensors(found.folder / f"trained-{layout}")
        for name, true in adapter.items():
            moved = got[name.replace(".default", "")].double() - start[name]
            error = (moved - (true.detach() - start[name])).norm() / moved.norm()
            assert float(error) < 1e-3, name
    for rank in found.ranks:
        assert rank["trained"] == {"tp2": True, "pp2": True}


def test_dropout_draws_the_same_masks_at_every_layout(found: Found) -> None:
    for rank in found.ranks:
        losses = rank["dropout"]
        print(losses)
        same = [losses["tp2 4"], losses["tp2-sp-te 4"], losses["pp2 4"]]
        assert max(same) - min(same) < 1e-6 * same[0]
        assert abs(losses["tp2 5"] - losses["tp2 4"]) > 1e-3 * same[0]


def test_ranks_exchange_what_is_as_wide_as_the_rank(found: Found) -> None:
    tokens, linears = ROWS * LENGTH, 2 * 4
    for name, (base, adapted) in found.ranks[0]["traffic"].items():
        each = (adapted - base) / linears
        print(f"{name}: {each / (RANK * tokens):.2f} r T a linear, the base {base:.0f}")
        assert 0 < each <= 4 * RANK * tokens
