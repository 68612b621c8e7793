"""Which run may go on from a checkpoint: another one is refused by field, another place is noted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lorry.errors import ConfigError
from lorry.train.checkpoint import (
    DEVICE_SETTINGS,
    FREE_SETTINGS,
    code_digest,
    load_checkpoint,
    numeric_environment,
    refuse_other_run,
    save_checkpoint,
)

CONFIG = {
    "train": {"learning_rate": 1e-3, "save_steps": 10, "betas": [0.9, 0.999], "seed": 0},
    "lora": {"r": 8, "rank_pattern": {}},
    "backend": {"name": "single", "threads": 2},
    "output_dir": "runs/a",
}
CURRENT = {
    "config": CONFIG,
    "digests": {
        "data": {"train": "a" * 64, "eval": "b" * 64},
        "code": "c" * 64,
        "config": "d" * 64,
    },
    "environment": {"torch": "2.11.0", "threads": 2, "kernels": "torch only (LORRY_KERNELS=0)"},
}


def changed(field: str, value: object) -> dict[str, Any]:
    """CURRENT with one dotted field set, or removed."""
    copy = json.loads(json.dumps(CURRENT))
    *groups, leaf = field.split(".")
    inner = copy
    for group in groups:
        inner = inner[group]
    if value is None:
        del inner[leaf]
    else:
        inner[leaf] = value
    return copy


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("config.train.learning_rate", 2e-3, "train.learning_rate 0.001 -> 0.002"),
        ("config.train.betas", [0.9, 0.95], "train.betas [0.9, 0.999] -> [0.9, 0.95]"),
        ("config.train.seed", None, "train.seed 0 -> absent"),
        ("config.lora.rank_pattern", {"q_proj": 4}, "lora.rank_pattern.q_proj absent -> 4"),
        ("config.train.eval_steps", 5, "train.eval_steps absent -> 5"),
        ("digests.data.train", "e" * 64, "data.train aaaaaaaaaaaa -> eeeeeeeeeeee"),
    ],
)
def test_another_run_is_refused_by_field_with_both_values(
    field: str, value: object, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_other_run(CURRENT, changed(field, value))
    assert f"\n  {message}\n" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "longer"), [("max_steps", True), ("num_train_epochs", True), ("learning_rate", False)]
)
def test_the_error_says_what_may_change_and_how_to_train_on(field: str, longer: bool) -> None:
    with pytest.raises(
        ConfigError,
        match=r"only settings of where and how often a run writes may change \(docs/running\.md",
    ) as caught:
        refuse_other_run(CURRENT, changed(f"config.train.{field}", 7))
    assert ("adapter=THIS_RUN output_dir=ANOTHER" in str(caught.value)) == longer


@pytest.mark.parametrize("processes", [None, 1, 2])
def test_rows_of_a_step_are_those_of_all_processes(processes: int | None) -> None:
    """Not the number that was typed: the error says so where there are several."""
    now = changed("config.train.per_device_train_batch_size", 8)
    now["config"]["backend"]["processes"] = processes
    with pytest.raises(ConfigError, match="per_device_train_batch_size absent -> 8") as caught:
        refuse_other_run(CURRENT, now)
    assert ("rows of all processes together" in str(caught.value)) == (processes == 2)


def test_the_page_lists_what_may_change() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "running.md").read_text()
    may, with_a_note = (
        set(re.findall(r"`(\w+)`", line))
        for line in re.findall(r"^\| (?:yes|with a note) \| (.*) \|$", text, re.M)
    )
    assert (may, with_a_note) == (FREE_SETTINGS, DEVICE_SETTINGS)


@pytest.mark.parametrize(
    ("field", "value", "note"),
    [
        ("environment.torch", "2.13.0", 'not bitwise: torch "2.11.0" -> "2.13.0"'),
        ("environment.threads", 4, "not bitwise: threads 2 -> 4"),
        ("config.backend.threads", 4, "not bitwise: backend.threads 2 -> 4"),
        ("digests.code", "e" * 64, "not bitwise: code cccccccccccc -> eeeeeeeeeeee"),
    ],
)
def test_another_place_is_noted_and_goes_on(field: str, value: object, note: str) -> None:
    assert refuse_other_run(CURRENT, changed(field, value)) == [note]


def test_settings_of_writing_may_differ_and_equal_runs_are_equal(tmp_path: Path) -> None:
    assert refuse_other_run(CURRENT, CURRENT) == []
    _, stored = load_checkpoint(save_checkpoint(tmp_path, 1, {}, CURRENT))
    assert refuse_other_run(stored, CURRENT) == []
    for field, value in (
        ("output_dir", "runs/b"),
        ("train.save_steps", 3),
        ("train.run_name", "x"),
        ("train.report_to", ["wandb"]),
    ):
        assert refuse_other_run(CURRENT, changed(f"config.{field}", value)) == []
    assert refuse_other_run(CURRENT, changed("digests.config", "e" * 64)) == []


def test_environment_and_code_are_described() -> None:
    found = numeric_environment(device="cpu", kernels="torch only")
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["kernels"] == "torch only"
    assert json.loads(json.dumps(found)) == found
    assert re.fullmatch("[0-9a-f]{64}", code_digest())
    assert code_digest() == code_digest()
