"""A run of DoRA and plain jobs, stopped and resumed, from the description to the finished files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lorry import cli
from lorry.train.monitoring.events import StepRecord
from lorry.train.session import train_run
from tests.support.mortal import World, finished, same
from tests.support.mortal import world as world
from tests.support.tinyrun import Heard, quick  # noqa: F401 - a fixture

JOBS: list[dict[str, Any]] = [
    {"name": "dora", "use_dora": True, "lora_dropout": 0.1},
    {"name": "plain"},
    {"name": "both-ends", "use_dora": True, "target_modules": ["embed", "lm_head", "q_proj"]},
]


def run_jobs(world: World, folder: Path, *listeners: Any) -> Any:
    settings = {"jobs": JOBS, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    return train_run(world.run(folder, **settings), [], list(listeners))


class Stop(Exception):
    """The run ends here, as a kill would have it."""


class StopLate(Heard):
    def step(self, record: StepRecord) -> None:
        if record["step"] == 6:
            raise Stop


def test_stopped_and_resumed_bit_for_bit(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_jobs(world, tmp_path / "whole")
    assert {contract["status"] for contract in result.contracts} == {"held"}
    with pytest.raises(Stop):
        run_jobs(world, tmp_path / "parts", StopLate())
    run_jobs(world, tmp_path / "parts")
    same(finished(tmp_path / "parts"), finished(tmp_path / "whole"), "after step 6")
    tensors = load_file(tmp_path / "whole" / "run" / "dora" / "adapter_model.safetensors")
    assert any(name.endswith("lora_magnitude_vector") for name in tensors)
    plain = load_file(tmp_path / "whole" / "run" / "plain" / "adapter_model.safetensors")
    assert len(tensors) == len(plain) * 3 // 2
    # out of the run again: merged, and for PEFT, with what else does not read it
    run = str(tmp_path / "whole" / "run" / "dora")
    capsys.readouterr()
    assert cli.main(["export", run, "to=peft", f"output_dir={tmp_path / 'peft'}"]) == 0
    printed = "".join(capsys.readouterr())
    assert "reloaded by peft" in printed
    assert "vLLM takes no adapter that has more than A and B" in printed
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
