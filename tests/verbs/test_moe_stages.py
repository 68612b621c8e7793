"""`lorry moe` again: what has changed since a stage was made is done again, and only that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

import lorry
from lorry.adapters.attach import get_bank
from lorry.adapters.mix import Mix
from lorry.config.data import DataConfig
from lorry.errors import DataError
from lorry.runs.stages import StageRecord, data_digests
from tests.support.verbworld import PEOPLE, model_directory, write_rows
from tests.support.verbworld import lorry as run_lorry

MLP = "[gate_proj, up_proj, down_proj]"


def write_description(folder: Path, base: Path, experts: str, **router: object) -> Path:
    file = folder / "experts.yaml"
    settings = router or {"train": {"max_steps": 2}}
    file.write_text(f"""
model: {{name: {base}, dtype: float32}}
lora: {{target_modules: {MLP}, r: 2}}
data: {{max_length: 96}}
train: {{max_steps: 2, learning_rate: 1e-2, save_strategy: "no", seed: 3}}
backend: {{threads: 1}}
experts: {experts}
router: {json.dumps(settings)}
output_dir: {folder / "mix"}
""")
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("stages") / "base")


def test_what_changed_is_done_again_and_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another content of a data file of the same name: its expert and the router are made anew."""
    rows = [
        write_rows(tmp_path / f"{n}.jsonl", PEOPLE[at : at + 2]) for n, at in (("a", 0), ("b", 2))
    ]
    experts = f"[{{name: one, data: {rows[0]}}}, {{name: two, data: {rows[1]}}}]"
    file = write_description(tmp_path, base, experts)
    assert run_lorry("moe", file) == 0
    made = tmp_path / "mix" / "experts" / "two" / "adapter_model.safetensors"
    first, router = made.read_bytes(), tmp_path / "mix" / "router" / "router.safetensors"
    capsys.readouterr()
    assert run_lorry("moe", file) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("has finished, and nothing it was made of has changed") == 2
    assert made.read_bytes() == first

    before = router.read_bytes()
    write_rows(rows[1], PEOPLE[:2])
    assert run_lorry("moe", file) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert f"experts: the rows in {rows[1]} changed since {tmp_path / 'mix' / 'experts'}" in told
    assert "router: the rows in" in told
    assert "expert two" in told
    assert made.read_bytes() != first
    assert router.read_bytes() != before
    kept = tmp_path / "mix" / "experts" / "previous" / "1" / "two" / made.name
    assert kept.read_bytes() == first
    lorry.load(tmp_path / "mix")


def test_a_stopped_stage_of_other_rows_starts_again(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints of other rows are no place to go on from; those of the same rows are."""
    rows = [
        write_rows(tmp_path / f"{n}.jsonl", PEOPLE[at : at + 2]) for n, at in (("a", 0), ("b", 2))
    ]
    experts = f"[{{name: one, data: {rows[0]}}}, {{name: two, data: {rows[1]}}}]"
    file = write_description(tmp_path, base, experts)
    more = ("train.save_strategy=steps", "train.save_steps=1")
    assert run_lorry("moe", file, *more) == 0
    receipt = tmp_path / "mix" / "experts" / "receipt.json"
    trained = (tmp_path / "mix" / "experts" / "two" / "adapter_model.safetensors").read_bytes()
    receipt.unlink()
    capsys.readouterr()
    assert run_lorry("moe", file, *more) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "is unfinished; training resumes from its newest checkpoint" in told
    assert receipt.exists()
    again = (tmp_path / "mix" / "experts" / "two" / "adapter_model.safetensors").read_bytes()
    assert again == trained

    receipt.unlink()
    write_rows(rows[0], PEOPLE[1:3])
    assert run_lorry("moe", file, *more) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "resumes from its newest checkpoint" not in told
    assert (tmp_path / "mix" / "experts" / "previous" / "1" / "checkpoints").is_dir()


def test_a_constant_mixture_made_twice(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was refused as "already exists"; other gates make room for it."""
    rows = write_rows(tmp_path / "a.jsonl", PEOPLE[:2])
    experts = f"[{{name: one, data: {rows}}}, {{name: two, data: {rows}, seed: 5}}]"
    file = write_description(tmp_path, base, experts, kind="uniform")
    for _ in range(2):
        assert run_lorry("moe", file) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("has finished, and nothing it was made of has changed") == 2
    assert not (tmp_path / "mix" / "previous").exists()
    assert run_lorry("moe", file, "router.kind=fixed", "router.gates={one: 0.25}") == 0
    model, _ = lorry.load(tmp_path / "mix")
    assert get_bank(model).active == Mix.constants({"one": 0.25})
    assert (tmp_path / "mix" / "previous" / "1" / "router" / "router.json").is_file()
    assert (tmp_path / "mix" / "previous" / "1" / "one" / "adapter_config.json").is_file()
    # and a router that trains makes room as well
    assert run_lorry("moe", file, "router.kind=token", "router.train.max_steps=1") == 0
    assert (tmp_path / "mix" / "previous" / "2" / "router" / "router.json").is_file()
    assert json.loads((tmp_path / "mix" / "router" / "router.json").read_text())["kind"] == "token"


def test_a_trained_router_makes_room_for_one_that_is_not(base: Path, tmp_path: Path) -> None:
    """Its run moves whole: what stays behind would tell of the router that is gone. Also one that was
    stopped, of which nothing but its checkpoints is there."""
    rows = write_rows(tmp_path / "a.jsonl", PEOPLE[:2])
    experts = f"[{{name: one, data: {rows}}}, {{name: two, data: {rows}, seed: 5}}]"
    file, mix = write_description(tmp_path, base, experts), tmp_path / "mix"
    assert run_lorry("moe", file) == 0
    of_run = {path.name for path in mix.iterdir()} - {"experts", "stages.json"}
    assert {"run.yaml", "receipt.json", "README.md", "metrics.jsonl", "checkpoints"} <= of_run
    write_description(tmp_path, base, experts, kind="uniform")
    for number in (1, 2):
        assert run_lorry("moe", file) == 0
        kept = {path.name for path in (mix / "previous" / str(number)).iterdir()}
        assert kept >= (of_run if number == 1 else {"run.yaml", "checkpoints"})
        model, _ = lorry.load(mix)
        assert get_bank(model).active == Mix.constants({"one": 0.5, "two": 0.5})
        left = {"experts", "previous", "stages.json", "one", "two", "router"}
        left |= {"run.yaml", "receipt.json", "report.html", "report.png"}  # its own
        assert yaml.safe_load((mix / "run.yaml").read_text())["router"]["kind"] == "uniform"
        assert {p.name for p in mix.iterdir() if "token" not in p.name} <= left | {
            "chat_template.jinja"
        }
        if number == 2:
            break
        # a router that began to train moved the mixture, and was stopped
        (mix / "receipt.json").unlink()
        for name in ("router", "one", "two"):
            shutil.rmtree(mix / name)
        shutil.copytree(mix / "previous" / "1" / "checkpoints", mix / "checkpoints")
        shutil.copy(mix / "previous" / "1" / "run.yaml", mix)


def test_a_folder_that_is_not_ours_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "a.jsonl", PEOPLE[:2])
    experts = f"[{{name: one, data: {rows}}}, {{name: two, data: {rows}, seed: 5}}]"
    (tmp_path / "mix" / "two").mkdir(parents=True)
    file = write_description(tmp_path, base, experts, kind="uniform")
    assert run_lorry("moe", file) == 2
    assert f"{tmp_path / 'mix' / 'two'} already exists" in capsys.readouterr().err.replace("\n", "")


def test_the_record_says_what_is_other(tmp_path: Path) -> None:
    record = StageRecord(tmp_path / "run")
    assert record.changes("experts", {"code": "1"}) is None
    record.begin("experts", {"code": "1", "rows": "2"})
    assert record.changes("experts", {"code": "1", "rows": "2"}) == []
    assert not record.is_finished("experts")
    record.finish("experts", {"code": "1", "rows": "2"})
    assert record.is_finished("experts")
    assert record.changes("experts", {"code": "3", "base": "4"}) == ["code", "rows", "base"]
    (tmp_path / "run" / "stages.json").write_text('{"stages": {"experts": 1}}')
    with pytest.raises(DataError, match="not a record of stages"):
        record.is_finished("experts")


def test_rows_are_known_by_what_files_hold(tmp_path: Path) -> None:
    """Of a file, of a folder by names and contents, and of local files of named sets."""
    file, folder = write_rows(tmp_path / "a.jsonl", PEOPLE), tmp_path / "many"
    folder.mkdir()
    write_rows(folder / "x.jsonl", PEOPLE)
    settings = DataConfig.model_validate(
        {"path": [str(file), str(folder)], "eval": str(file), "local": {"tofu": str(folder)}}
    )
    before = data_digests(settings)
    assert set(before) == {str(file), str(folder)}
    (folder / "x.jsonl").rename(folder / "y.jsonl")
    after = data_digests(settings)
    assert after[str(folder)] != before[str(folder)]
    assert after[str(file)] == before[str(file)]
