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
from transformers import AutoModelForCausalLM

pytest.importorskip(
    "megatron.core", reason="megatron-core is an extra: pip install 'lorry[megatron]'"
)

import lorry
from lorry.adapters.attach import attach, get_bank
from lorry.adapters.peft.files import base_digest, load_adapter
from lorry.errors import ModelError
from lorry.models.loading.load import load_model
from lorry.notes import ignore_note
from tests.support.megatron_files import LAYOUTS, RANK, SPEC
from tests.support.megatron_gradients import LENGTH, ROWS, batch
from tests.support.megatron_models import make_model
from tests.support.pairs import run_pair

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
    run_pair("tests.support.megatron_files", folder)
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
