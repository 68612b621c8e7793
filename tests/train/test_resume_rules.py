"""What may go on from a checkpoint: the same run only, named field by field where it is another;
damage costs a few steps.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lorry.errors import ConfigError, DataError
from lorry.train.monitoring.events import StepRecord
from lorry.train.session import train_run
from tests.support import tinyrun
from tests.support.mortal import SHAPES, STEPS, Whole, World, finished, same, state_of
from tests.support.tinyrun import quick  # noqa: F401 - a fixture


class Stopped(Exception):
    """The run ends here, as a kill would have it."""


class StopAt(tinyrun.Heard):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.at = step

    def step(self, record: StepRecord) -> None:
        if record["step"] == self.at:
            raise Stopped


@pytest.fixture
def unfinished(world: World, tmp_path: Path) -> Path:
    """A packed run that was stopped after step 10, its newest checkpoint of step 9, the best so
    far.
    """
    with pytest.raises(Stopped):
        train_run(world.run(tmp_path, **SHAPES["packed"]), [], [StopAt(10)])
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"learning_rate": 2e-2}, ["train.learning_rate 0.01 -> 0.02"]),
        ({"r": 4, "lora_alpha": 8}, ["lora.r 2 -> 4", "lora.lora_alpha 32 -> 8"]),
        ({"seed": 4, "packing": False}, ["train.seed 3 -> 4", "data.packing true -> false"]),
        ({"eval_steps": 2}, ["train.eval_steps 3 -> 2"]),
        ({"target_modules": ["q_proj", "o_proj"]}, ["lora.target_modules"]),
    ],
)
def test_another_config_is_refused_by_field(
    world: World, unfinished: Path, changed: dict[str, Any], named: list[str]
) -> None:
    before = state_of(unfinished)
    with pytest.raises(ConfigError) as refused:
        train_run(world.run(unfinished, **{**SHAPES["packed"], **changed}), [])
    assert all(field in str(refused.value) for field in named)
    assert state_of(unfinished) == before


def test_other_data_and_another_base_are_refused(
    world: World, unfinished: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before, data, weights = (
        state_of(unfinished),
        world.data.read_bytes(),
        world.model / "model.safetensors",
    )
    tinyrun.write_rows(
        world.data, [*tinyrun.rows(15), {"question": "What is new?", "answer": "This."}]
    )
    with pytest.raises(ConfigError, match=r"another run:\n  data [0-9a-f]{12} -> [0-9a-f]{12}"):
        train_run(world.run(unfinished, **SHAPES["packed"]), [])
    world.data.write_bytes(data)
    kept = weights.read_bytes()
    other = (
        tinyrun.model_directory(tmp_path_factory.mktemp("other"), spread=0.21) / "model.safetensors"
    )
    weights.write_bytes(other.read_bytes())
    with pytest.raises(ConfigError, match=r"another run:\n  base [0-9a-f]{12} -> [0-9a-f]{12}"):
        train_run(world.run(unfinished, **SHAPES["packed"]), [])
    weights.write_bytes(kept)
    assert state_of(unfinished) == before


def test_other_streamed_data_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train_run(world.run(tmp_path, **SHAPES["streamed"]), [], [StopAt(6)])
    data = world.data.read_bytes()
    tinyrun.write_rows(world.data, tinyrun.rows(16, start=1))
    with pytest.raises(DataError, match="not the data this run was started with"):
        train_run(world.run(tmp_path, **SHAPES["streamed"]), [])
    world.data.write_bytes(data)


def test_other_threads_go_on_with_a_note(world: World, unfinished: Path) -> None:
    heard = tinyrun.Heard()
    train_run(world.run(unfinished, **SHAPES["packed"], threads=2), [], [heard])
    torch.set_num_threads(1)
    assert "not bitwise: backend.threads 1 -> 2" in heard.notes
    assert "not bitwise: threads 1 -> 2" in heard.notes
    assert heard.started == [(9, STEPS)]


def test_how_often_it_saves_and_shows_is_free(world: World, whole: Whole, unfinished: Path) -> None:
    heard = tinyrun.Heard()
    settings = {
        **SHAPES["packed"],
        "save_steps": 2,
        "save_total_limit": 5,
        "logging_steps": 3,
        "run_name": "other",
    }
    train_run(world.run(unfinished, **settings), [], [heard])
    assert [n for n in heard.notes if "bitwise" in n or "resumed" in n] == [
        "resumed from step-00000009: 9 of 11 steps are done"
    ]
    for name in (
        "adapter_model.safetensors",
        "metrics.jsonl",
        "checkpoints/step-00000011/state.safetensors",
    ):
        assert finished(unfinished)[name] == whole("packed")[name]


@pytest.mark.parametrize("harm", ["state.safetensors", "meta.json", "manifest.json", "lost"])
def test_a_damaged_newest_checkpoint_is_passed_over(
    world: World, whole: Whole, unfinished: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = unfinished / "run" / "checkpoints" / "step-00000009"
    if harm == "lost":
        (newest / "state.safetensors").unlink()
    else:
        content = bytearray((newest / harm).read_bytes())
        content[len(content) // 2] ^= 1
        (newest / harm).write_bytes(content)
    heard = tinyrun.Heard()
    train_run(world.run(unfinished, **SHAPES["packed"]), [], [heard])
    assert f"skipped the checkpoint {newest}" in caplog.text
    assert any(note.startswith("resumed from step-00000008") for note in heard.notes)
    aside = newest.with_name("step-00000009.damaged")
    assert aside.is_dir(), "what was passed over is set aside, not removed"
    shutil.rmtree(aside)
    same(finished(unfinished), whole("packed"), f"{harm} damaged")
