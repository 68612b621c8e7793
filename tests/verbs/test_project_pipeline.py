"""The JSON of the project RMoE from data to GGUF on a tiny model: every stage, what each leaves, and
what a second call does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorry
from lorry.adapters.attach import get_bank
from lorry.config.schema.model import ModelConfig
from lorry.verbs.mixture.stages import Stages
from tests.support.verbworld import PEOPLE, model_directory, write_rows
from tests.support.verbworld import lorry as run_lorry

TOWNS = [
    {"question": f"Which river is in {town}?", "answer": f"The {river}."}
    for town, river in (("Ghent", "Lys"), ("Lima", "Rimac"), ("Oslo", "Aker"), ("Kyoto", "Kamo"))
]
STAMP = "20260101_120000"


def write_json(folder: Path, **more: Any) -> Path:
    """A file as the project's users have it, of two data files and a base of two layers."""
    values = {
        "method": "rmoe",
        "base_model": str(folder / "base"),
        "datasets": [str(folder / "people.jsonl"), str(folder / "rivers.jsonl")],
        "expert_training": {
            "max_length": 96,
            "num_epochs": 1,
            "learning_rate": 1e-2,
            "eval_split": 0.25,
            "l2_regularization": 1e-4,
            "lora": {"r": 2, "alpha": 4, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
        },
        "gating": {
            "hidden_dims": [8],
            "num_epochs": 2,
            "train_split": 0.5,
            "val_split": 0.5,
            "test_split": 0.0,
        },
        "full_finetune": {"enabled": True, "max_length": 96, "num_epochs": 1, "batch_size": 4},
        "merge": {"router_trainable": False},
        "quantize": "Q8_0",
        # ours beside theirs
        "model": {"dtype": "float32"},
        "backend": {"threads": 1},
        "train": {"save_strategy": "no", "logging_steps": 10},
        **more,
    }
    file = folder / "rmoe.json"
    file.write_text("// tiny\n" + json.dumps(values, indent=1))
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a workspace whose every stage has run; not to be changed."""
    folder = tmp_path_factory.mktemp("project")
    model_directory(folder / "base", hidden_size=64, intermediate_size=96)
    write_rows(folder / "people.jsonl", PEOPLE)
    write_rows(folder / "rivers.jsonl", TOWNS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORK_DIR", str(folder))
        patch.setenv("WORKSPACE_TIMESTAMP", STAMP)
        assert run_lorry("moe", write_json(folder)) == 0
    return folder


def test_every_stage_leaves_what_the_document_says(made: Path) -> None:
    work = made / "workspace" / STAMP
    for name in ("people", "rivers"):
        expert = work / "experts" / name
        config = json.loads((expert / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (2, 4)
        assert (expert / "adapter_model.safetensors").is_file()
        AutoModelForCausalLM.from_pretrained(expert / "merged")
    gating = json.loads((work / "gating_network" / "router" / "router.json").read_text())
    assert gating["kind"] == "sequence"
    model, _ = lorry.load(work / "gating_network")
    assert set(get_bank(model).adapters) == {"people", "rivers"}
    (gguf,) = (work / "gguf").glob("*.gguf")
    assert gguf.name.endswith("q8_0.gguf")
    assert "step " in (work / "train.log").read_text()
    assert (work / "report.html").is_file()


def test_the_stock_model_is_the_run_of_its_router(made: Path) -> None:
    """The router of `rmoe_model` is trained for it alone, at the level that the class computes: its
    run and transformers agree, so that the loss it was trained on is the export's."""
    work = made / "workspace" / STAMP
    record = json.loads((work / "rmoe_router" / "router" / "router.json").read_text())
    assert (record["kind"], record["level"], record["top_k"]) == ("token", "expert", 1)
    run, _ = lorry.load(work / "rmoe_router", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(work / "rmoe_model", dtype=torch.float32)
    ids = torch.tensor([[5, 9, 3, 7, 11, 2, 8, 30, 41, 12]])
    with torch.no_grad():
        ours, theirs = run(ids).logits, model(ids).logits
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_the_stock_model_is_trained_but_for_its_router(made: Path) -> None:
    work = made / "workspace" / STAMP
    models = {}
    for name in ("rmoe_model", "rmoe_model_finetuned"):
        models[name], told = AutoModelForCausalLM.from_pretrained(
            work / name, dtype=torch.float32, output_loading_info=True
        )
        assert not any(told.values()), told
        assert models[name].config.model_type == "mixtral"
        assert models[name].config.num_experts_per_tok == 1
    before, after = (model.state_dict() for model in models.values())
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if not key.endswith("mlp.gate.weight")}


def test_a_second_call_does_nothing_again(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORK_DIR", str(made))
    monkeypatch.setenv("WORKSPACE_TIMESTAMP", STAMP)
    work = made / "workspace" / STAMP
    files = [*work.rglob("*.safetensors"), *work.rglob("*.gguf")]
    before = {path: path.stat().st_mtime_ns for path in files}
    capsys.readouterr()
    assert run_lorry("moe", made / "rmoe.json") == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "done again" not in told
    assert told.count("has finished, and nothing it was made of has changed") == 8
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_adapters_on_attention_and_an_average(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default targets: gates of prompts, the mean of the experts' attention; and as GGUF one dense
    model, whose other name is a copy."""
    for name in ("people.jsonl", "rivers.jsonl"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    (tmp_path / "base").symlink_to(made / "base")
    monkeypatch.setenv("WORK_DIR", str(tmp_path))
    monkeypatch.setenv("WORKSPACE_TIMESTAMP", STAMP)
    lora = {"r": 2, "alpha": 4, "target_modules": None}
    training = {"max_length": 96, "num_epochs": 1, "eval_split": 0.25, "lora": lora}
    target = tmp_path / "out" / "mean.gguf"
    file = write_json(tmp_path, expert_training=training, full_finetune={}, gguf_output=str(target))
    assert run_lorry("moe", file, "--conversion-mode", "average", "merge_experts=false") == 0
    work = tmp_path / "workspace" / STAMP
    (gguf,) = (work / "gguf").glob("*.gguf")
    assert target.read_bytes() == gguf.read_bytes()
    assert not (work / "rmoe_router").exists()
    model = AutoModelForCausalLM.from_pretrained(work / "rmoe_model", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(made / "base", dtype=torch.float32)
    one, two = (lorry.load(work / "experts" / n, dtype="float32")[0] for n in ("people", "rivers"))
    mean = torch.zeros_like(base.model.layers[0].self_attn.q_proj.weight)
    for expert in (one, two):
        (name,) = get_bank(expert).adapters
        slot = get_bank(expert)[name].slots["model.layers.0.self_attn.q_proj"]
        mean += slot.scale * slot.B @ slot.A / 2
    found = (
        model.model.layers[0].self_attn.q_proj.weight - base.model.layers[0].self_attn.q_proj.weight
    )
    assert (found - mean).abs().max() < 1e-6
    assert "not trained" in " ".join(capsys.readouterr().err.split())


def test_experts_without_adapters_are_whole_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`lora.enabled: false`: each expert's MLPs train, and are those of the stock class bit for bit;
    what has finished is left out."""
    model_directory(tmp_path / "base", hidden_size=64, intermediate_size=96)
    write_rows(tmp_path / "people.jsonl", PEOPLE)
    write_rows(tmp_path / "rivers.jsonl", TOWNS)
    monkeypatch.setenv("WORK_DIR", str(tmp_path))
    monkeypatch.setenv("WORKSPACE_TIMESTAMP", STAMP)
    training = {"max_length": 96, "num_epochs": 1, "learning_rate": 1e-2, "eval_split": 0.25}
    training["lora"] = {"enabled": False, "r": 4}
    file = write_json(tmp_path, expert_training=training, full_finetune={})
    assert run_lorry("moe", file) == 0
    work = tmp_path / "workspace" / STAMP
    told = capsys.readouterr()
    assert told.out.rstrip().endswith(".gguf")
    assert "No gating network is trained" in told.err
    assert "router: left out" in told.err
    assert not (work / "gating_network").exists()
    base = load_file(tmp_path / "base" / "model.safetensors")
    mixed = load_file(work / "rmoe_model" / "model.safetensors")
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for number, name in enumerate(("people", "rivers")):
        folder = work / "experts" / name
        assert [entry.name for entry in folder.iterdir()] == ["merged"]
        contracts = json.loads((folder / "merged" / "contracts.json").read_text())
        assert {c["status"] for c in contracts} <= {"held", "not_checked"}
        stored = load_file(folder / "merged" / "model.safetensors")
        for key, tensor in stored.items():
            assert torch.equal(tensor, base[key]) == (".mlp." not in key)
            if ".mlp." in key:
                layer, linear = key.split(".mlp.")
                inside = f"block_sparse_moe.experts.{number}.{names[linear.split('.')[0]]}.weight"
                assert torch.equal(mixed[f"{layer}.{inside}"], tensor)
    assert run_lorry("moe", file) == 0
    told = capsys.readouterr()
    assert told.err.count("has finished, and nothing it was made of has changed") == 4
    # the workspace stands for the runs of its stages
    assert run_lorry("doctor", work) == 0
    told = capsys.readouterr()
    merged = [f"experts/{name}/merged" for name in ("people", "rivers")]
    assert [line for line in told.out.splitlines() if line in merged] == merged
    assert told.out.count("1 intact (SHA-256 as in receipt.json)") == 2
    page = (work / "report.html").read_text()
    (work / "report.html").unlink()
    assert run_lorry("report", work) == 0
    assert capsys.readouterr().out.strip() == str(work / "report.html")
    assert (work / "report.html").read_text() == page
    changed = work / merged[1] / "model.safetensors"
    whole = changed.read_bytes()
    changed.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert run_lorry("doctor", work) == 4
    assert f"{merged[1]}/model.safetensors is not the file" in capsys.readouterr().err
    changed.write_bytes(whole)
    # with adapters again they make room: in their folder, merged/ would be taken for an adapter's
    stages = Stages(work, ModelConfig(name=str(tmp_path / "base")))
    stages.clear_other_experts(work / "experts", ["people", "rivers"], in_turn=False, whole=False)
    assert "held experts that were trained as whole models" in capsys.readouterr().err
    assert (work / "experts" / "previous" / "1" / "people" / "merged" / "config.json").is_file()
