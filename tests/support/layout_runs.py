"""Descriptions of whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorry.config import RunConfig
from tests.support import tinyrun
from tests.support.tinyrun import quick  # noqa: F401 - a fixture

EVALUATED: dict[str, Any] = {
    "lora_dropout": 0.1,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "test_size": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
}
# of a model that two ranks share
SHARED = {**EVALUATED, "max_steps": 2, "load_best_model_at_end": True}
# of a run that one layout begins and another one ends
HALVES = {**EVALUATED, "max_steps": 2, "eval_steps": 1, "save_steps": 1, "warmup_ratio": 0}
FIRST_HALF = Path("checkpoints") / "step-00000001"
# longer than it takes to see the third step and kill a process, on any machine
LONG = {**EVALUATED, "max_steps": 150, "save_steps": 1, "eval_strategy": "no"}
del LONG["eval_steps"]
JOBS = "[{name: a, r: 3}, {name: b, learning_rate: 0.02}]"


def described(folder: Path, out: Path, **settings: Any) -> RunConfig:
    return tinyrun.described(folder / "model", folder / "data.jsonl", out, **settings)


def words_of(folder: Path, out: Path, **settings: Any) -> list[str]:
    """The same as words of the command line."""
    paths = {"model": folder / "model", "data": folder / "data.jsonl", "output_dir": out}
    given = {**paths, **tinyrun.DEFAULTS, **settings}
    return [f"{name}={value}" for name, value in given.items()]


def going_on(folder: Path, out: Path, name: str, begun: str, **settings: Any) -> list[str]:
    """The command line that ends what another run has half done."""
    at = {"resume_from_checkpoint": folder / begun / FIRST_HALF}
    return ["sft", *words_of(folder, out / name, **HALVES, **settings, **at)]


def write_files(folder: Path) -> None:
    """A model, one that two ranks can share, and rows."""
    tinyrun.model_directory(folder / "model")
    tinyrun.model_directory(folder / "shared", num_key_value_heads=2)
    tinyrun.write_rows(folder / "data.jsonl", tinyrun.rows(16))
    tinyrun.write_rows(folder / "retain.jsonl", tinyrun.rows(16, start=16))
