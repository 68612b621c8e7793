"""The run of a router, killed anywhere, goes on to the same files, bit for bit. Float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorry
from lorry.config import RouterRunConfig
from lorry.disk import durable
from lorry.train.session import train_run
from tests.support import tinyrun
from tests.support.faults import kill, run_forked
from tests.support.mortal import RunDisk, finished, mark_moments, same
from tests.support.tinyrun import quick  # noqa: F401 - a fixture

EXPERTS = ("one", "two")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two adapters of random values, and rows of each one's domain."""
    folder = tmp_path_factory.mktemp("files")
    tinyrun.model_directory(folder / "model", num_hidden_layers=2)
    model, _ = lorry.load(folder / "model", dtype="float32")
    rows, generator = tinyrun.rows(12), torch.Generator().manual_seed(1)
    for at, name in enumerate(EXPERTS):
        spec = lorry.LoraSpec(r=2 + at, target_modules=["q_proj", "down_proj"])
        values = lorry.attach(model, spec, name).values
        values.copy_(0.2 * torch.randn(values.shape, generator=generator))
        lorry.save_adapter(model, folder / name, name)
        tinyrun.write_rows(folder / f"{name}.jsonl", rows[6 * at : 6 * at + 6])
    return folder


def described(files: Path, folder: Path, router: dict[str, Any]) -> RouterRunConfig:
    experts = [
        {
            "name": name,
            "adapter": str(files / name),
            "data": {"path": str(files / f"{name}.jsonl"), "max_length": 64},
        }
        for name in EXPERTS
    ]
    return RouterRunConfig.model_validate(
        {
            "model": {"name": str(files / "model"), "dtype": "float32", "device": "cpu"},
            "experts": experts,
            "router": router,
            "backend": {"threads": 1},
            "train": {"max_steps": 5, "save_steps": 2, "resume_from_checkpoint": "auto"},
            "output_dir": folder / "run",
        }
    )


SPLITS = {"train_split": 0.5, "val_split": 0.25, "test_split": 0.25}


# shares of all calls to the disk at which a life ends: in the middle of training, and among the files
# of the finished mixture
@pytest.mark.parametrize(
    ("router", "shares"),
    [
        ({"kind": "token", "input": "both"}, [0.55]),
        (
            {
                "kind": "token",
                "input": "both",
                "level": "expert",
                "top_k": 1,
                "straight_through": True,
            },
            [0.6],
        ),
        ({"kind": "token", "input": "both", "level": "expert", "train_experts": True}, [0.5]),
        ({"kind": "phatgoose", "top_k": 1}, [0.55]),
        (
            {"kind": "sequence", "lora": {"r": 2, "lora_dropout": 0.1}, "layer": 0, **SPLITS},
            [0.55, 0.95],
        ),
    ],
    ids=["token", "one whole MLP", "experts train", "phatgoose", "sequence"],
)
def test_killed_anywhere(
    router: dict[str, Any],
    shares: list[float],
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(folder: Path, _: Any = None) -> None:
        train_run(described(files, folder, router), [])

    with monkeypatch.context() as patch:
        mark_moments(patch)
        calls = RunDisk()
        patch.setattr(durable, "disk", calls)
        train(tmp_path / "whole")
    expected = finished(tmp_path / "whole")
    assert {"router/router.json", "router/router.safetensors"} <= expected.keys()
    for share in shares:
        folder = tmp_path / f"{share}"
        folder.mkdir()
        with monkeypatch.context() as patch:
            mark_moments(patch)
            outcome = run_forked(train, RunDisk(int(share * calls.calls), kill), folder)
        assert outcome.killed, outcome.error
        train(folder)
        same(finished(folder), expected, f"killed at {share:.0%} of all calls")
