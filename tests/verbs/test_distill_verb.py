"""`lorry distill` from the command line: the run directory it leaves, its teachers, what is
refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.verbworld import TRAIN, World, lorry, model_directory, train

SHORT = ("max_steps=4", *TRAIN)


def steps(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def argv(world: World, run: Path, *more: str) -> list[str]:
    return [f"model={world.base}", f"data={world.rows}", f"output_dir={run}", *SHORT, *more]


@pytest.mark.usefixtures("charts")
def test_a_student_learns_from_an_adapter_of_its_base(world: World, tmp_path: Path) -> None:
    run = tmp_path / "student"
    assert (
        lorry(
            "distill",
            *argv(world, run, f"teacher_adapter={world.run}", "distill.loss=jsd", "temperature=2"),
        )
        == 0
    )
    made = steps(run)
    assert made[-1]["loss_distill"] < made[0]["loss_distill"]
    assert made[0]["loss"] == pytest.approx(made[0]["loss_nll"] + made[0]["loss_distill"])
    assert (run / "adapter_config.json").is_file()
    contracts = json.loads((run / "contracts.json").read_text())
    assert {c["status"] for c in contracts} <= {"held", "not_checked"}
    assert "task: distill" in (run / "run.yaml").read_text()
    assert lorry("eval", run, f"data={world.rows}") == 0


def test_a_cache_is_written_once_and_read_again(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (f"teacher={world.run}", f"distill.cache={tmp_path / 'cache'}")
    assert lorry("distill", *argv(world, tmp_path / "a", *more)) == 0
    first = capsys.readouterr().err
    assert lorry("distill", *argv(world, tmp_path / "b", *more)) == 0
    assert first != capsys.readouterr().err
    assert [s["loss"] for s in steps(tmp_path / "a")] == [s["loss"] for s in steps(tmp_path / "b")]


def test_another_tokenizer_takes_uld(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = model_directory(tmp_path / "other")
    tokens = json.loads((other / "tokenizer.json").read_text())
    known = tokens["model"]["vocab"]
    # two entries have changed places: ids mean something else
    known["a"], known["b"] = (
        known["b"],
        known["a"],
    )
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    argued = argv(world, tmp_path / "run", f"teacher={other}")
    assert lorry("distill", *argued) == 2
    assert "uld" in capsys.readouterr().err
    assert lorry("distill", *argued, "distill.loss=uld") == 0
    assert all(line["loss_distill"] > 0 for line in steps(tmp_path / "run"))


def test_all_weights_of_a_student_may_train(world: World, tmp_path: Path) -> None:
    more = [
        "lora=null" if word.startswith("r=") else word
        for word in argv(world, tmp_path / "run", f"teacher={world.run}")
        if not word.startswith("lora_alpha=")
    ]
    assert lorry("distill", *more) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_the_teacher_is_not_displaced(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = train(tmp_path / "teacher", world.base, world.rows, steps=2)
    assert lorry("distill", *argv(world, teacher, f"teacher={teacher}")) == 2
    assert "holds the teacher" in capsys.readouterr().err
    assert (teacher / "adapter_config.json").is_file()


@pytest.mark.parametrize("more", [(), ("distill.cache={at}/cache",)], ids=["live", "cached"])
def test_resuming_with_another_teacher_is_refused(
    world: World, tmp_path: Path, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same path holds other weights than when the checkpoint was written."""
    teacher = train(tmp_path / "teacher", world.base, world.rows, steps=2)
    settings = [
        word
        for word in argv(world, tmp_path / "a", f"teacher={teacher}")
        if not word.startswith("save_strategy")
    ]
    settings += [word.format(at=tmp_path) for word in more] + ["save_steps=2"]
    assert lorry("distill", *settings) == 0
    known = json.loads((tmp_path / "a" / "receipt.json").read_text())["teacher"]["sha256"]
    again = [
        f"output_dir={tmp_path / 'b'}" if word.startswith("output_dir") else word
        for word in settings
    ]
    again += [f"resume_from_checkpoint={tmp_path / 'a' / 'checkpoints' / 'step-00000002'}"]
    assert lorry("distill", *again) == 0
    train(teacher, world.base, world.rows, steps=3)
    capsys.readouterr()
    assert lorry("distill", *again) == 2
    assert f"teacher {known[:12]} -> " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "distill.teacher is missing"),
        (["teacher=./nope"], "no model at './nope'"),
        (["teacher={run}", "distill.loss=kll"], "kl, reverse_kl, jsd, uld"),
        (["teacher={run}", "alpha=0"], "alpha"),
        (["teacher={run}", "jobs=[{{name: a}}]"], "trains one student"),
    ],
)
def test_what_is_wrong_is_said(
    world: World, tmp_path: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lorry(
        "distill", *argv(world, tmp_path / "run", *(word.format(run=world.run) for word in more))
    ) in (2, 4)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
