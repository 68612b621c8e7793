"""Whole runs of which one half of the adapter trains: its file is plain LoRA, a resumed one ends with the
same bits, and each job may have its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorry.adapters.attach import get_bank
from lorry.errors import ConfigError
from lorry.train.monitoring.events import StepRecord
from lorry.train.session import train_run
from lorry.train.setup import adapters
from tests.support.mortal import World, finished, same
from tests.support.mortal import world as world
from tests.support.tinyrun import Heard, quick  # noqa: F401 - a fixture

B_ALONE: dict[str, Any] = {"lora": {"train": ["B"]}}
MICA: dict[str, Any] = {"init_lora_weights": "mica"}


class Stop(Exception):
    """The run ends here, as a kill would have it."""


class StopAtSix(Heard):
    """Ends a run behind the checkpoint of step 4."""

    def step(self, record: StepRecord) -> None:
        if record["step"] == 6:
            raise Stop


@pytest.mark.parametrize(("settings", "side"), [(B_ALONE, "B"), (MICA, "A")], ids=["B", "mica"])
def test_it_trains_and_resumes_bit_for_bit(
    world: World, settings: dict[str, Any], side: str, tmp_path: Path
) -> None:
    result = train_run(world.run(tmp_path / "whole", **settings), [])
    assert {c["status"] for c in result.contracts} == {"held"}
    tensors = load_file(result.path / "adapter_model.safetensors")
    receipt = json.loads((result.path / "receipt.json").read_text())
    assert receipt["trainable_parameters"] == sum(
        t.numel() for n, t in tensors.items() if f"lora_{side}" in n
    )
    newest = sorted((result.path / "checkpoints").iterdir())[-1]
    held = {n for file in newest.glob("*.safetensors") for n in load_file(file)}
    assert {n[-1] for n in held if ".lora_" in n} == {side}
    with pytest.raises(Stop):
        train_run(world.run(tmp_path / "stopped", **settings), [], [StopAtSix()])
    train_run(world.run(tmp_path / "stopped", **settings), [])
    same(finished(tmp_path / "stopped"), finished(tmp_path / "whole"), "resumed")


def test_another_frozen_half_is_another_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stop):
        train_run(world.run(tmp_path, **B_ALONE), [], [StopAtSix()])
    attach = adapters.attach_adapter

    def shifted(*args: Any) -> str:
        name = attach(*args)
        adapter = get_bank(args[1].model)[name]
        assert adapter.held is not None
        with torch.no_grad():
            adapter.held[0] += 1e-7
        return name

    monkeypatch.setattr(adapters, "attach_adapter", shifted)
    with pytest.raises(ConfigError, match="frozen halves"):
        train_run(world.run(tmp_path, **B_ALONE), [])


def test_jobs_may_train_other_halves(world: World, tmp_path: Path) -> None:
    jobs = [{"name": "both"}, {"name": "up", "lora": {"train": ["B"]}}, {"name": "minor", **MICA}]
    train_run(world.run(tmp_path, jobs=jobs, load_best_model_at_end=False), [])
    files = {
        name: load_file(tmp_path / "run" / name / "adapter_model.safetensors")
        for name in ("both", "up", "minor")
    }
    for name, values in files["up"].items():
        # the same first values, of which A has kept its own
        assert torch.equal(values, files["both"][name]) is False, name
    assert {n for n, t in files["minor"].items() if not t.any()} == set()


def test_refused_before_anything_is_read(world: World, tmp_path: Path) -> None:
    for lora, message in (
        ({"train": []}, "give A, B or both"),
        ({"train": ["A"]}, "train=A leaves lora_B at zero"),
        ({"train": ["B"], "variant": "adalora", "target_r": 1}, "train does not go with"),
    ):
        with pytest.raises(ConfigError, match=message):
            world.run(tmp_path, lora=lora)
    with pytest.raises(ConfigError, match=r"leave backend\.tensor_parallel and"):
        world.run(
            tmp_path, **B_ALONE, backend={"name": "ddp", "processes": 2, "tensor_parallel": 2}
        )
