"""`lorry compare`: figures and ratios from runs' files, and ways trained by processes of their own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from lorry.config import RunConfig, dump_settings, parse_settings
from lorry.config.settings import CompareSettings
from lorry.errors import ConfigError
from lorry.report.compare import comparison_row, figure_ratios
from lorry.runs.metrics import MetricsWriter
from lorry.runs.read import read_readable_runs, read_run
from lorry.verbs import compare
from tests.support.processes import LorryClone
from tests.support.verbworld import World, lorry


def made(path: Path, seconds: list[float], losses: list[float], receipt: dict[str, Any]) -> Path:
    """A run's files, written by hand."""
    path.mkdir()
    with MetricsWriter(path / "metrics.jsonl") as writer:
        for step, (s, loss) in enumerate(zip(seconds, losses, strict=True), 1):
            writer.write(
                {
                    "step": step,
                    "loss": loss,
                    "seconds": s,
                    "tokens": 100,
                    "peak_memory_bytes": 1000 * step,
                }
            )
        writer.write(
            {"step": len(losses), "eval_loss": losses[-1] + 1, "eval_bool_q_accuracy": 0.5}
        )
    (path / "run.yaml").write_text("train: {learning_rate: 0.001}\n")
    (path / "receipt.json").write_text(json.dumps(receipt))
    return path


SIZES = {"trainable_parameters": 50, "total_parameters": 1000, "saved_bytes": 300}


def test_figures_and_ratios_by_hand(tmp_path: Path) -> None:
    first = made(tmp_path / "a", [5.0, 1.0, 2.0], [4.0, 3.0, 2.0], SIZES)
    second = made(
        tmp_path / "b",
        [2.0, 2.0],
        [4.0, 1.0],
        {**SIZES, "trainable_parameters": 1000, "saved_bytes": 6000},
    )
    (second / "evaluation.json").write_text(
        json.dumps([{"name": "set", "metrics": {"f1": {"before": 0.1, "after": 0.75}}}])
    )
    rows = [comparison_row(run) for run in read_readable_runs([first, second])[0]]
    assert rows[0] == {
        "name": "a",
        "path": str(first),
        "trainable_parameters": 50,
        "trainable_share": 0.05,
        "learning_rate": 1e-3,
        "steps": 3,
        "peak_memory_bytes": 3000,
        "seconds": 8.0,
        "seconds_per_step": 2.0,
        "tokens_per_second": 37.5,
        "first_loss": 4.0,
        "final_loss": 2.0,
        "saved_bytes": 300,
        "eval_loss": 3.0,
        "eval_bool_q_accuracy": 0.5,
    }
    assert rows[1]["set: f1"] == 0.75
    assert figure_ratios(rows)[1] == {
        "trainable_parameters": 20,
        "trainable_share": 20,
        "peak_memory_bytes": 2000 / 3000,
        "seconds": 0.5,
        "seconds_per_step": 1,
        "tokens_per_second": 50 / 37.5,
        "final_loss": 0.5,
        "saved_bytes": 20,
        "eval_loss": 2 / 3,
        "eval_bool_q_accuracy": 1,
    }


def test_what_a_run_does_not_say_is_left_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = made(tmp_path / "full", [1.0], [2.0], SIZES)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "receipt.json").write_text("{}")
    assert comparison_row(read_run(tmp_path / "bare")).keys() == {"name", "path"}
    assert (
        compare.main(parse_settings(CompareSettings, [str(tmp_path / "bare"), str(full)], print))
        == 0
    )
    out = capsys.readouterr().out
    assert "Compared with bare" in out
    assert "trainable parameters" in out
    assert compare.main(parse_settings(CompareSettings, [str(full), "format=json"], print)) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["final_loss"] == 2.0


def test_each_way_in_a_process_of_its_own(
    world: World,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Clones of this process here; the command itself is that of the next test."""
    stand_in = SimpleNamespace(run=LorryClone, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(compare, "subprocess", stand_in)
    words = [
        f"model={world.base}",
        f"data={world.rows}",
        f"output_dir={tmp_path}",
        "max_steps=3",
        "threads=1",
        "dtype=float32",
    ]
    settings = parse_settings(
        CompareSettings,
        [*words, "ways=[full,mlp]", "learning_rates={full: 1e-4}", "learning_rate=1e-2"],
        print,
    )
    assert compare.main(settings) == 0
    out, err = capfd.readouterr()
    assert "Compared with full" in out
    assert "training full at a learning rate of 0.0001" in err
    rows = json.loads((tmp_path / "compare.json").read_text())["runs"]
    with safe_open(world.base / "model.safetensors", "pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118 - no mapping
    mlps = sum(size for name, size in sizes.items() if ".mlp." in name)
    assert [row["trainable_parameters"] for row in rows] == [sum(sizes.values()), mlps]
    assert [row["learning_rate"] for row in rows] == [1e-4, 1e-3]
    assert rows[0]["saved_bytes"] == (tmp_path / "full" / "model.safetensors").stat().st_size
    assert rows[0]["first_loss"] == rows[1]["first_loss"]
    assert rows[1]["ratios"]["trainable_parameters"] == pytest.approx(mlps / sum(sizes.values()))
    assert lorry("doctor", tmp_path / "mlp") == 0
    assert "1 intact" in capfd.readouterr().out
    (tmp_path / "mlp" / "model.safetensors").write_bytes(b"other")
    assert lorry("doctor", tmp_path / "mlp") == 4
    assert "is not the file that this run wrote" in capfd.readouterr().err


def test_a_way_that_fails_ends_with_its_exit_code(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [
        f"model={world.base}",
        f"data={tmp_path}/absent.jsonl",
        f"output_dir={tmp_path}",
        "ways=[mlp]",
    ]
    assert compare.main(parse_settings(CompareSettings, words, print)) == 3
    assert "absent.jsonl" in capfd.readouterr().err


def test_the_ways_are_the_runs_they_would_be_alone(tmp_path: Path) -> None:
    settings = parse_settings(
        CompareSettings,
        ["data=x.jsonl", "r=4", "learning_rate=1e-3", f"output_dir={tmp_path}", "seed=7"],
        print,
    )
    lora, full, mlp = (settings.run_of_way(name) for name in ("lora", "full", "mlp"))
    assert lora.lora is not None
    assert lora.lora.r == 4
    assert (lora.trainable, full.lora, full.trainable, mlp.lora, mlp.trainable) == (
        None,
        None,
        "all",
        None,
        "mlp",
    )
    assert [run.train.learning_rate for run in (lora, full, mlp)] == pytest.approx(
        [1e-3, 5e-5, 1e-4]
    )
    assert {run.train.seed for run in (lora, full, mlp)} == {7}
    assert yaml.safe_load(dump_settings(full)).keys() == RunConfig.model_fields.keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to compare: name run directories, or give data=FILE"),
        (["run", "data=x.jsonl"], "runs and data are both given"),
        (["data=x.jsonl", "ways=[mlp,mlp]"], "name every way to train once"),
        (["data=x.jsonl", "ways=[mpl]"], "mpl"),
        (
            ["data=x.jsonl", "background=true"],
            "background: all ways are trained one after the other",
        ),
        (
            ["data=x.jsonl", "push_to_hub=me/x"],
            "push_to_hub: all ways are trained one after the other",
        ),
        (
            ["data=x.jsonl", "jobs=[{name: a},{name: b}]"],
            "jobs: all ways are trained one after the other",
        ),
        (
            ["data=x.jsonl", "model.quantize=nf4", "ways=[lora,full]"],
            r"ways=\[lora, full\]: packed weights cannot train",
        ),
        (["data=x.jsonl", "loraplus_lr_ratio=4"], "loraplus_lr_ratio is for an adapter"),
        (["data=x.jsonl", "memory_budget=1GiB"], "memory_budget is for training adapters only"),
        (
            ["data=x.jsonl", "learning_rates={fill: 1e-3}"],
            "learning_rates names 'fill', which is not among ways",
        ),
    ],
)
def test_bad_input(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare.main(parse_settings(CompareSettings, words, print))
