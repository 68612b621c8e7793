"""`lorry sft`: what a run leaves, where it says that is, and the errors a person meets first."""

from __future__ import annotations

import errno
import io
import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.verbworld import PEOPLE, STEPS, World, lorry, train, write_rows

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "lorry_adapter.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "metrics.jsonl",
    "run.yaml",
    "samples.json",
    "contracts.json",
    "losses.json",
    "receipt.json",
    "report.html",
    "report.png",
}


def test_what_a_run_leaves(world: World) -> None:
    assert {path.name for path in world.run.iterdir() if path.is_file()} == FILES
    lines = [json.loads(line) for line in (world.run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["loss"] < steps[0]["loss"] / 3
    assert "eval_loss" in lines[-1]
    statuses = {
        c["id"]: c["status"] for c in json.loads((world.run / "contracts.json").read_text())
    }
    # no checkpoints were asked for
    assert statuses == {
        **dict.fromkeys(range(1, 9), "held"),
        6: "not_checked",
    }


@pytest.mark.usefixtures("charts")
def test_the_last_line_is_the_run(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path / "run", world.base, world.rows, steps=2)
    out, err = capsys.readouterr()
    assert out == f"{run}\n"
    assert f"report  {run / 'report.html'}" in err
    assert f"chat    lorry chat {run}" in err
    assert "4 rows, 4 sequences" in err
    assert "step 2/2  loss" in err


def test_the_resolved_settings_repeat_the_run(world: World, tmp_path: Path) -> None:
    first = train(tmp_path / "first", world.base, world.rows, "lora_dropout=0.1", "seed=3", steps=3)
    assert lorry("sft", first / "run.yaml", f"output_dir={tmp_path / 'second'}") == 0
    ours, again = (
        load_file(run / "adapter_model.safetensors") for run in (first, tmp_path / "second")
    )
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_training_goes_on_from_a_run(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, more = f"data={world.rows}", tmp_path / "more"
    arguments = (
        f"output_dir={more}",
        "max_steps=2",
        "learning_rate=1e-6",
        "dtype=float32",
        "save_strategy=no",
        "threads=1",
    )
    assert lorry("sft", f"model={world.run}", rows, *arguments) == 0
    assert "training continues the adapter of" in capsys.readouterr().err
    before, after = (load_file(run / "adapter_model.safetensors") for run in (world.run, more))
    moved = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert 0 < moved < 1e-4
    assert lorry("sft", f"model={world.run}", rows, *arguments, "r=4") == 2
    assert (
        "already has an adapter, which training continues; leave out the lora settings"
        in capsys.readouterr().err
    )


def test_bad_rows_stop_it_or_are_counted(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*PEOPLE, {"question": "Where?", "answer": ""}])
    run, arguments = (
        tmp_path / "run",
        (f"model={world.base}", f"data={rows}", "max_steps=2", "save_strategy=no", "threads=1"),
    )
    assert lorry("sft", *arguments, f"output_dir={run}") == 3
    assert f"{rows}:5: 'answer' is empty" in capsys.readouterr().err
    assert lorry("sft", *arguments, f"output_dir={run}", "on_bad_row=quarantine") == 0
    assert "left out: 1 row (empty answer)" in capsys.readouterr().err
    assert json.loads((run / "receipt.json").read_text())["data"]["left_out"] == {"empty answer": 1}
    assert json.loads((run / "quarantine.jsonl").read_text())["where"] == f"{rows}:5"


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["model={base}"], 2, "data.path is missing"),
        (["model={base}", "data={rows}", "lerning_rate=1"], 2, "did you mean 'learning_rate'?"),
        (
            ["model={base}", "data={rows}", "threads=1000000"],
            2,
            "a whole number of at least 1 and at most 1024",
        ),
        (
            ["model={base}", "data={rows}", "r=1000000000"],
            71,
            "adapter 'default' with r=1000000000 has",
        ),
        (["model={base}", "data={rows}", "trainable=mlp"], 2, "give lora=null with it"),
        (
            ["model={base}", "data={rows}", "target_modules=[q_prj]"],
            2,
            "matches no layer (did you mean 'q_proj'?)",
        ),
        (["model={base}", "data={rows}x"], 3, "no such file (did you mean 'people.jsonl'?)"),
        (["model=./nope", "data={rows}"], 4, "no model at './nope'"),
        (
            ["model={base}", "data={rows}", "resume_from_checkpoint=./nope"],
            2,
            "is neither a checkpoint nor a run with one",
        ),
    ],
)
def test_errors(
    argv: list[str],
    code: int,
    message: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        lorry(
            "sft", *(word.format(**vars(world)) for word in argv), f"output_dir={tmp_path / 'run'}"
        )
        == code
    )
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_a_warm_up_longer_than_the_run_is_told(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(
        tmp_path / "run",
        world.base,
        world.rows,
        "warmup_steps=10",
        "lr_scheduler_type=linear",
        steps=3,
    )
    said = "default: 10 of 3 steps are warmup: the learning rate never reaches learning_rate=0.01, its highest is 0.002"
    assert said in capsys.readouterr().err
    train(
        tmp_path / "other",
        world.base,
        world.rows,
        "warmup_steps=2",
        "lr_scheduler_type=linear",
        steps=3,
    )
    assert "steps are warmup" not in capsys.readouterr().err


def test_a_rank_that_no_update_can_use_is_told(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = json.loads((world.base / "config.json").read_text())
    side = base["head_dim"] * base["num_key_value_heads"]
    assert side < base["hidden_size"]
    train(tmp_path / "run", world.base, world.rows, f"r={side + 1}", steps=1)
    said = capsys.readouterr().err
    assert f"r={side + 1} is more than an update of" in said
    assert f"k_proj, whose smaller side is {side};" in said
    train(tmp_path / "other", world.base, world.rows, f"r={side}", steps=1)
    train(tmp_path / "fitted", world.base, world.rows, "r=auto", steps=1)
    assert "can use" not in capsys.readouterr().err


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None:
        self.write("")


def test_lines_that_cannot_be_written_end_no_training(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stderr", FullDisk())
    run = train(tmp_path / "run", world.base, world.rows, steps=2)
    assert capsys.readouterr().out == f"{run}\n"
    assert (run / "report.html").is_file()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_report_is_made_says_that_the_run_is_complete(
    number: signal.Signals,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # whoever runs this suite may ignore it
    try:
        monkeypatch.setattr("lorry.report.write_report", lambda runs: signal.raise_signal(number))
        words = (
            f"output_dir={tmp_path / 'run'}",
            "max_steps=1",
            "dtype=float32",
            "save_strategy=no",
            "threads=1",
        )
        assert lorry("sft", f"model={world.base}", f"data={world.rows}", *words) == 75
    finally:
        signal.signal(number, before)
    assert (
        f"{number.name} arrived while the report was written. The run is complete"
        in capsys.readouterr().err
    )
    assert (tmp_path / "run" / "receipt.json").is_file()
