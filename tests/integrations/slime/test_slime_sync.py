"""Weights and adapters from slime's trainer to its engines on two ranks: what arrives is W + s B A of the
PEFT file, whichever way slime sends it; and each thing that can go wrong on the way stops the run and
names a tensor.

One pair of processes runs `tests/support/slime_sync.py` on the double of slime.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
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

from lorry.integrations.slime.sync.proof import VersionProof
from lorry.integrations.slime.sync.sent import difference
from tests.support.megatron_models import make_model
from tests.support.ranks import run_ranks

# of a pair of processes: far above what it takes, far below the suite's limit
pytestmark = pytest.mark.timeout(600)
CASES = (
    "llama-tp2-tensor",
    "llama-tp2-distributed",
    "llama-tp2-disk",
    "llama-pp2-tensor",
    "llama-pp2-distributed",
    "qwen2-tp2-disk",
    "qwen3-tp2-tensor",
)
BUCKET = 13_000
EXACT = 1e-6  # of a merged float32 weight, to the largest


class Found(NamedTuple):
    """The folder that both ranks wrote into, and what each found."""

    folder: Path
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("slime-sync")
    for name in ("llama", "llama-mha", "qwen2", "qwen3"):
        make_model(name, folder)
    run_ranks("tests.support.slime_sync", folder)
    return Found(folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)])


def merged_by_peft(folder: Path, model: str, kind: str = "canonical") -> dict[str, Tensor]:
    """float32 weights of transformers' model with PEFT's adapter merged."""
    base = AutoModelForCausalLM.from_pretrained(folder / model, dtype=torch.float32)
    peft: Any = PeftModel.from_pretrained(base, folder / f"{model}-{kind}")
    return dict(peft.merge_and_unload().state_dict())


def sent(found: Found, name: str) -> dict[str, Tensor]:
    """What engines hold, of every rank that sends."""
    files = sorted((found.folder / "sent").glob(f"{name}.[01].safetensors"))
    parts = [load_file(file) for file in files]
    assert sum(map(len, parts)) == len({key for part in parts for key in part})
    return {key: tensor for part in parts for key, tensor in part.items()}


def assert_merged(tensors: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    # a tied head is the embedding
    assert {*tensors, "lm_head.weight"} == {*true, "lm_head.weight"}
    for name, tensor in tensors.items():
        gap = (tensor - true[name]).abs().max() / true[name].abs().max()
        assert gap <= EXACT, name


@pytest.mark.parametrize("case", CASES)
def test_engines_get_the_adapter_in_the_weights(found: Found, case: str) -> None:
    assert_merged(sent(found, case), merged_by_peft(found.folder, case.partition("-")[0]))


def test_one_a_for_a_fused_matrix_is_merged_as_its_export_is(found: Found) -> None:
    assert_merged(sent(found, "llama-fused"), merged_by_peft(found.folder, "llama", "fused"))


@pytest.mark.parametrize("case", CASES)
def test_without_an_adapter_the_base_goes_out_bit_for_bit(found: Found, case: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(
        found.folder / case.partition("-")[0], dtype=torch.float32
    ).state_dict()
    for name, tensor in sent(found, f"{case}-base").items():
        assert torch.equal(tensor, base[name]), name


def test_the_model_is_never_written_to_and_one_merged_matrix_lies_beside_it(found: Found) -> None:
    for rank in found.ranks:
        for case in CASES:
            facts = rank["sends"][case]
            assert facts["untouched"], case
            assert 0 < facts["peak"] <= BUCKET, case
            assert facts["files"] == [], case  # slime's version directories are removed as before


@pytest.mark.parametrize("case", ["llama-tp2-tensor", "llama-pp2-tensor", "qwen3-tp2-tensor"])
def test_save_hf_is_the_policy_for_transformers(found: Found, case: str) -> None:
    model = case.partition("-")[0]
    tokens = torch.arange(12).view(2, 6)
    saved = AutoModelForCausalLM.from_pretrained(found.folder / f"saved-{case}").eval()
    base = AutoModelForCausalLM.from_pretrained(found.folder / model).eval()
    peft = PeftModel.from_pretrained(base, found.folder / f"{model}-canonical").eval()
    with torch.no_grad():
        assert torch.allclose(saved(tokens).logits, peft(tokens).logits, rtol=0, atol=1e-5)


def test_a_bfloat16_base_is_merged_in_float32_and_rounded_once(found: Found) -> None:
    half = AutoModelForCausalLM.from_pretrained(found.folder / "llama", dtype=torch.bfloat16)
    peft: Any = PeftModel.from_pretrained(half.float(), found.folder / "llama-canonical")
    true = peft.merge_and_unload().state_dict()
    for name, tensor in sent(found, "llama-bfloat16").items():
        assert tensor.dtype == torch.bfloat16
        # sums of another order may lie on the other side of a half
        assert int((tensor != true[name].bfloat16()).sum()) <= tensor.numel() // 1000, name


def test_what_differs_by_more_than_rounding() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 64, generator=generator) * 0.02
    # of one step of Adam's: below a bfloat16's spacing in most places
    delta = torch.randn(64, 64, generator=generator) * 2e-5
    for dtype in (torch.float32, torch.bfloat16):
        merged, twice = ((weight.to(dtype) + k * delta).to(dtype) for k in (1, 2))
        assert difference(merged, merged.clone()) is None
        for other in (weight.to(dtype), twice):
            assert "of its values differ" in str(difference(other, merged)), dtype
    rounded = (weight.bfloat16() + delta).bfloat16()
    other = rounded.clone()
    other.view(torch.int16)[0, 0] += 1  # the next value
    assert difference(other, rounded) is None
    assert "shape" in str(difference(weight[:1], weight))


@pytest.mark.parametrize(("every", "proved"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (0, [])])
def test_versions_are_proved_as_often_as_one_asks(every: int, proved: list[int]) -> None:
    proof = VersionProof(SimpleNamespace(lora_check_every=every))
    assert [number for number in (1, 2, 3, 4) if proof.due(number)] == proved


# what went wrong: what the message says of it
FAULTS = {
    "never": "version 2: model.layers.0.mlp.gate_proj.weight is not W + s B A",
    "twice": "version 3: model.layers.0.mlp.gate_proj.weight is not W + s B A",
    "shard": "version 4: model.layers.0.mlp.gate_proj.weight is not W + s B A",
    "swapped": "model.layers.0.self_attn.q_proj.weight is not W + s B A",
    "again": "model.layers.1.mlp.down_proj.weight was sent twice",
    "stale": "engine 0 holds version 6, and version 7 was sent",
    "lying": "engine 0: model.layers.0.mlp.gate_proj.weight is not what was sent as version 8",
    "adapter too": "engine 0 holds the adapter lora_v000001 over weights into which one is merged",
    "base answers": "the engine answers with another policy",
    "unmoved": " is merged version 12 again",
    "zero": "lora_B.weight is zero (14 such) after a step",
    "disk": "is not what was sent (SHA-256",
    "distributed never": "is not W + s B A",
    "distributed twice": "is not W + s B A",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_stops_every_rank_and_names_a_tensor(found: Found, fault: str) -> None:
    first, second = (rank["faults"][fault] for rank in found.ranks)
    assert first[0] == "ContractError"
    assert FAULTS[fault] in first[1]
    # found on its own, or told by rank 0
    assert second[0] in ("ContractError", "ModelError")


@pytest.mark.parametrize(
    "name", ["right", "right again", "stepped", "no step", "Disk right", "Distributed right"]
)
def test_what_is_right_passes(found: Found, name: str) -> None:
    for rank in found.ranks:
        assert rank["faults"][name] == ["", ""]


def test_adapters_go_alone_once_engines_have_the_base(found: Found) -> None:
    facts = found.ranks[0]["adapter"]
    assert facts["first"] == facts["second"] == ["", ""]
    base = AutoModelForCausalLM.from_pretrained(found.folder / "llama", dtype=torch.float32)
    for name, tensor in sent(found, "adapter-base").items():
        assert torch.equal(tensor, base.state_dict()[name]), name
    assert "update_weights_from_distributed" not in facts["calls"]
    assert facts["held"] == ["lora_v000002"]
    assert facts["name"] == "lora_v000002"  # what rollouts ask for


def test_the_directory_of_a_version_is_the_trained_adapter(found: Found) -> None:
    tokens = torch.arange(12).view(2, 6)
    base = AutoModelForCausalLM.from_pretrained(found.folder / "llama").eval()
    saved = AutoModelForCausalLM.from_pretrained(found.folder / "saved-adapter").eval()
    path = found.folder / "run-adapter" / "adapters" / "iter_0000001"
    peft = PeftModel.from_pretrained(base, path).eval()
    with torch.no_grad():
        # --save-hf is merged whatever engines are sent
        assert torch.allclose(saved(tokens).logits, peft(tokens).logits, rtol=0, atol=1e-5)


def test_faults_of_an_adapter_on_its_way_are_found(found: Found) -> None:
    for rank in found.ranks:
        facts = rank["adapter"]
        assert "does not hold lora_v000003" in facts["never"][1]
        assert "is not the base's of this version" in facts["merged too"][1]
        assert facts["recovered"] == ["", ""]
    assert len(found.ranks[0]["adapter"]["held again"]) == 1


def test_a_run_goes_on_at_another_layout_with_the_adapter_it_saved(found: Found) -> None:
    true = load_file(found.folder / "llama-canonical" / "adapter_model.safetensors")
    for run in ("run-llama-tp2-tensor", "run-tp2-again"):  # by way of PP 2
        folder = found.folder / run / "adapters" / "iter_0000007"
        assert (folder / "manifest.json").is_file()
        saved = load_file(folder / "adapter_model.safetensors")
        assert saved.keys() == true.keys()
        assert all(torch.equal(saved[name], true[name]) for name in true), run


def test_checkpoints_and_adapters_that_do_not_belong_together(found: Found) -> None:
    for rank in found.ranks:
        facts = rank["resumes"]
        assert "of the checkpoint is not that of" in facts["replaced"][1]
        assert "lora_" in facts["replaced"][1]
        assert facts["new over base"]
        assert facts["under reference"]
        assert "trained on other base weights" in facts["other base"][1]
        # a base that --hf-checkpoint has not can be sent; its tensors cannot be compared
        assert facts["other weights"] == ["", ""]
    base = load_file(found.folder / "llama" / "model.safetensors")
    for name, tensor in sent(found, "from-base").items():
        assert torch.equal(tensor, base[name]), name
