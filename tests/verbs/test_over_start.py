"""A run over a start (a frozen adapter in the base), as a person uses it: what is exported, merged,
asked, distilled from and published is base + start + g times the adapter, and needs no directory
but its own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lorry as library
from lorry.adapters.attach import get_bank
from lorry.adapters.mix import Mix
from lorry.config import DistillConfig, ModelConfig
from lorry.config.settings import ChatSettings
from lorry.errors import ModelError
from lorry.hub.files import collect_upload
from lorry.models.loading.open import open_model
from lorry.tasks.distill.teacher import TeacherLocation, open_teacher
from lorry.verbs.chat import ChatSession
from tests.support import tinyrun
from tests.support.tinyrun import quick  # noqa: F401
from tests.support.verbworld import lorry

IDS = torch.arange(3, 30)[None]
PLAIN = (
    "dtype=float32", "device=cpu", "threads=1", "max_length=64", "learning_rate=3e-2",
    "per_device_train_batch_size=3", "save_strategy=no",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model; runs/start over it, on q and v alone, scaled by layer; runs/npo over that start, whose
    directory then moves; runs/chain over both."""
    folder = tmp_path_factory.mktemp("world")
    model = tinyrun.model_directory(folder / "model", num_hidden_layers=2)
    rows = tinyrun.rows(12)
    tinyrun.write_rows(folder / "forget.jsonl", rows[:5])
    retain = tinyrun.write_rows(folder / "retain.jsonl", rows[5:])
    runs = folder / "runs"
    assert lorry(
        "sft", f"model={model}", f"data={retain}", f"output_dir={runs / 'first'}", "max_steps=6", "r=4",
        "target_modules=[q_proj,v_proj]", "lora.alpha_pattern.v_proj=3", *PLAIN,
    ) == 0  # fmt: skip
    unlearn(folder, runs / "first", runs / "npo", "r=2", "lora_alpha=3")
    unlearn(folder, runs / "npo", runs / "chain", "r=3", "target_modules=[o_proj,v_proj]")
    (runs / "first").rename(folder / "elsewhere")
    return folder


def unlearn(world: Path, model: Path, out: Path, *settings: str) -> None:
    assert lorry(
        "unlearn", f"model={model}", f"forget={world / 'forget.jsonl'}", f"retain={world / 'retain.jsonl'}",
        f"output_dir={out}", "max_steps=4", *settings, *PLAIN,
    ) == 0  # fmt: skip


def scaled_sums(folder: Path) -> dict[str, Tensor]:
    """{weight: s B A [O,I] in float64} of an adapter's files, by PEFT's rules read here anew."""
    config = json.loads((folder / "adapter_config.json").read_text())
    config = config.get("lora", config)
    values = load_file(folder / "adapter_model.safetensors")
    sums = {}
    for name, low in values.items():
        if name.endswith("lora_A.weight"):
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            leaf = path.rpartition(".")[2]
            alpha = config["alpha_pattern"].get(leaf, config["lora_alpha"])
            up = values[name.replace("lora_A", "lora_B")].double()
            sums[f"{path}.weight"] = alpha / low.shape[0] * up @ low.double()
    return sums


def folded(world: Path, *parts: tuple[Path, float]) -> Tensor:
    """Logits of transformers' own model with g s B A added to its weights in float64."""
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float64)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for folder, gate in parts:
            for name, delta in scaled_sums(folder).items():
                weights[name] += gate * delta
        return model(IDS).logits


def starts(run: Path) -> list[tuple[Path, float]]:
    """The copies of what a run was trained over."""
    over = run / "start_adapter"
    return [(over, 1.0), *starts(over)] if over.is_dir() else []


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "weight"), [("npo", 1.0), ("npo", -0.5), ("chain", 1.0)])
def test_exported_for_peft(world: Path, tmp_path: Path, name: str, weight: float) -> None:
    run, out = world / "runs" / name, tmp_path / "peft"
    assert lorry("export", run, "to=peft", f"weight={weight}", f"output_dir={out}") == 0
    expected = folded(world, *starts(run), (run, weight))
    base = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    with torch.no_grad():
        close(PeftModel.from_pretrained(base, out)(IDS).logits, expected)
        ours, _ = library.load(out, dtype="float32")
        close(ours(IDS).logits, expected)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    ranks = {"npo": {6, 2}, "chain": {9, 6, 5, 2}}[name]  # where which of them sit
    assert {
        v.shape[0] for k, v in load_file(out / "adapter_model.safetensors").items() if "_A" in k
    } == ranks


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0, -1.0])
def test_merged(world: Path, tmp_path: Path, weight: float, capsys: Any) -> None:
    run, out = world / "runs/npo", tmp_path / "merged"
    assert lorry("merge", run, f"weight={weight}", f"output_dir={out}") == 0
    assert "against the adapter on the start" in capsys.readouterr().err
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(IDS).logits
    close(merged, folded(world, *starts(run), (run, weight)))
    record = json.loads((out / "lorry_merge.json").read_text())
    assert record["weight"] == weight
    assert record["start"]["sha256"]
    assert lorry("unmerge", out, f"output_dir={tmp_path / 'base'}") == 0
    model = "model.safetensors"
    assert (tmp_path / "base" / model).read_bytes() == (world / "model" / model).read_bytes()


def test_exported_for_transformers(world: Path, tmp_path: Path) -> None:
    run, out = world / "runs/chain", tmp_path / "hf"
    assert lorry("export", run, "to=hf", "weight=0.5", f"output_dir={out}") == 0
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(IDS).logits
    close(merged, folded(world, *starts(run), (run, 0.5)))


def test_evaluated_with_a_weight(world: Path, tmp_path: Path, capsys: Any) -> None:
    run = shutil.copytree(world / "runs/npo", tmp_path / "npo")
    merged, rows = tmp_path / "merged", world / "forget.jsonl"
    assert lorry("merge", run, "weight=0.5", f"output_dir={merged}") == 0
    losses = []
    for model, weight in ((run, 0.5), (run, 1), (merged, 1)):
        out = tmp_path / "results.json"
        argv = (model, f"data={rows}", f"weight={weight}", "dtype=float32", f"output_dir={out}")
        assert lorry("eval", *argv, "max_new_tokens=1") == 0
        losses.append(
            {k: v["metrics"]["loss"] for k, v in json.loads(out.read_text())["sides"].items()}
        )
    assert list(losses[0]) == ["start", "npo x 0.5"]
    assert losses[0]["npo x 0.5"] == pytest.approx(losses[2]["base"], rel=1e-5)
    assert losses[1]["npo"] != pytest.approx(losses[2]["base"], rel=1e-4)
    names = [entry["name"] for entry in json.loads((run / "evaluation.json").read_text())]
    assert names == [f"{rows}, weight=0.5", str(rows)]


def test_chat_with_a_weight(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_model(ModelConfig(name=str(world / "runs/npo"), dtype="float32"), print)
    chat = ChatSession(ChatSettings(model=ModelConfig(name="npo"), weight=0.5), opened)
    mixes = []
    monkeypatch.setattr(
        "lorry.generation.engine.stream_tokens",
        lambda *_, adapter, **__: mixes.append(adapter) or iter([40]),
    )
    assert list(chat.answer("Who?"))
    assert chat.describe_adapter() == "adapter npo times 0.5"
    chat.switch_adapter("none")
    assert list(chat.answer("Who?"))
    assert mixes == [Mix.constants({"npo": 0.5}), Mix.none()]
    assert chat.describe_adapter() == "the start alone"


@pytest.mark.parametrize("teacher", ["base", "start", "npo"])
def test_a_teacher_on_the_students_weights(world: Path, teacher: str) -> None:
    """The student's base holds its start: the bare base, or another start, is another model."""
    opened = open_model(ModelConfig(name=str(world / "runs/npo"), dtype="float32"), print)
    names = {"base": world / "model", "start": world / "elsewhere", "npo": world / "runs/npo"}
    config = DistillConfig(teacher=str(names[teacher]), teacher_dtype="float32")
    place = TeacherLocation.of(config, opened, shareable=True, add_note=print)
    assert place.shared == (teacher == "npo")
    scorer = open_teacher(place, config, opened, print)
    get_bank(scorer.model, create=True).activate(scorer.mix)
    with torch.no_grad():
        found = scorer.model(IDS).logits
    over = {"base": [], "start": [(names["start"], 1.0)]}
    npo = [*starts(names["npo"]), (names["npo"], 1.0)]
    close(found, folded(world, *over.get(teacher, npo)))


def test_trained_further(world: Path, tmp_path: Path) -> None:
    run, out = world / "runs/npo", tmp_path / "more"
    argv = (f"model={run}", f"data={world / 'retain.jsonl'}", f"output_dir={out}", "max_steps=2")
    assert lorry("sft", *argv, *PLAIN) == 0
    over = (run / "start_adapter/adapter_model.safetensors").read_bytes()
    assert (out / "start_adapter/adapter_model.safetensors").read_bytes() == over
    with torch.no_grad():
        ours, _ = library.load(out, dtype="float32")
        close(ours(IDS).logits, folded(world, *starts(out), (out, 1.0)))
        assert not torch.allclose(
            ours(IDS).logits.double(), folded(world, *starts(run), (run, 1.0))
        )


def test_published_with_its_start(world: Path) -> None:
    files = collect_upload(world / "runs/chain", at="me/chain")
    weights = {name for name in files if name.endswith(".safetensors")}
    file = "adapter_model.safetensors"
    assert weights == {file, f"start_adapter/{file}", f"start_adapter/start_adapter/{file}"}
    card = files["README.md"]
    assert isinstance(card, bytes)
    facts = json.loads((world / "runs/chain/lorry_adapter.json").read_text())
    for words in (facts["start"]["sha256"], "library_name: lorry", "lorry export me/chain to=peft"):
        assert words in card.decode()
    assert "PeftModel" not in card.decode()
    assert str(world) not in card.decode()


def test_planned_examined_and_listed(world: Path, capsys: Any) -> None:
    run = world / "runs/npo"
    assert lorry("plan", run, "threads=1") == 0
    told = capsys.readouterr()
    assert "the plan of the unlearning that its run.yaml describes" in told.err
    assert f"first has gone: planned on the copy of it in {run}" in told.err
    assert f"{run} (0M parameters) on cpu: r=2" in told.out
    assert lorry("doctor", run) == 0
    assert "1 intact" in capsys.readouterr().out
    assert lorry("runs", world / "runs", "format=json") == 0
    listed = {one["name"] for one in json.loads(capsys.readouterr().out)}
    assert listed == {"npo", "chain"}
    (run / "start_adapter/adapter_model.safetensors").rename(world / "aside")
    try:
        with pytest.raises(ModelError, match="which is missing"):
            library.load(run)
        assert lorry("doctor", run) != 0
        assert "which is missing" in capsys.readouterr().err
    finally:
        (world / "aside").rename(run / "start_adapter/adapter_model.safetensors")


def test_an_unfinished_run_is_not_its_start(world: Path, tmp_path: Path) -> None:
    run = shutil.copytree(world / "runs/npo", tmp_path / "unfinished")
    for file in run.glob("adapter_*"):
        file.unlink()
    with pytest.raises(ModelError, match="is an unfinished run"):
        library.load(run)


def test_a_run_does_not_displace_its_start(world: Path) -> None:
    run = world / "runs/npo"
    before = (run / "adapter_model.safetensors").read_bytes()
    assert lorry(
        "unlearn", f"model={run}", f"forget={world / 'forget.jsonl'}", f"retain={world / 'retain.jsonl'}",
        f"output_dir={run}", "max_steps=1", *PLAIN,
    ) == 2  # fmt: skip
    assert (run / "adapter_model.safetensors").read_bytes() == before
