"""A rank that fails or is asked to stop between two sums over those that share its model: all end with its
error, at once, and the same processes go on with the next command. In float32.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support import tinyrun
from tests.support.ranked import FAULT, Ended, run_ranked

# less than one wait of `backend.timeout`, which a rank that nobody hears of would cost
pytestmark = pytest.mark.timeout(580)
ERROR = "what it alone has is broken"
BROKEN, STOPPED = 5, 75  # exit codes


class Commands:
    """Command lines over a tiny model that two ranks share."""

    def __init__(self, folder: Path, backend: str = "ddp") -> None:
        self.folder = folder
        self.data = tinyrun.write_rows(folder / "data.jsonl", tinyrun.rows(8))
        self.backend = {
            "backend": backend,
            "backend.tensor_parallel": 2,
            "backend.timeout": 600,
        }
        self.given: dict[str, Any] = {
            **tinyrun.DEFAULTS,
            "model": tinyrun.model_directory(folder / "model", num_key_value_heads=2),
            "data": self.data,
            "per_device_train_batch_size": 2,
            "lora_dropout": 0.1,
            "max_steps": 4,
            "test_size": 2,
            "eval_steps": 2,
            "save_steps": 2,
            **self.backend,
        }

    def sft(self, name: str, *more: str, fault: str = "") -> list[str]:
        marks = [f"{FAULT}{fault}"] if fault else []
        run = f"output_dir={self.folder / name}"
        return [*marks, "sft", *(f"{k}={v}" for k, v in self.given.items()), run, *more]

    def eval(self, name: str, fault: str = "") -> list[str]:
        marks = [f"{FAULT}{fault}"] if fault else []
        settings = [f"{k}={v}" for k, v in self.backend.items()]
        return [*marks, "eval", str(self.folder / name), f"data={self.data}", "limit=2", *settings]


TRAINING = {
    "a forward pass": "fail 1 forward 20",
    "a backward pass": "fail 0 backward 6",
    "an adapter's file": "fail 1 disk 9",
}
ASKING = {"scores": "fail 1 forward 5", "an answer": "fail 1 token 3"}


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    return Commands(tmp_path_factory.mktemp("tensor"))


@pytest.fixture(scope="module")
def ended(commands: Commands) -> Ended:
    words = {
        **{name: commands.sft(name, fault=fault) for name, fault in TRAINING.items()},
        "stopped": commands.sft("run", fault="stop 1 backward 7"),
        "resumed": commands.sft("run", "resume_from_checkpoint=auto"),
        "whole": commands.sft("whole"),
        **{name: commands.eval("whole", fault) for name, fault in ASKING.items()},
        "a stopped answer": commands.eval("whole", "stop 1 token 2"),
        "asked": commands.eval("whole"),
    }
    # whether a process has proofs to run or knows their outcome would move the numbers of the faults
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORRY_PROOFS", "0")
        return run_ranked(commands.folder / "ranks", words)


@pytest.mark.parametrize("name", [*TRAINING, *ASKING])
def test_all_ranks_end_with_the_error_of_one(ended: Ended, name: str) -> None:
    assert ended.codes[name] == [BROKEN, BROKEN], ended.printed[name]
    failed = {**TRAINING, **ASKING}[name].split()[1]
    tag = "" if failed == "0" else f"rank {failed}: "
    (_, main), (_, other) = ended.printed[name]
    assert f"error: {tag}{ERROR}" in main
    assert "error" not in other  # rank 0 speaks for all


def test_a_rank_that_is_stopped_in_a_step_stops_all_behind_it(
    commands: Commands, ended: Ended
) -> None:
    assert ended.codes["stopped"] == [STOPPED, STOPPED], ended.printed["stopped"]
    assert re.search(r"SIGTERM arrived; step [123] of 4 is saved", ended.printed["stopped"][0][1])
    assert ended.codes["resumed"] == ended.codes["whole"] == [0, 0], ended.printed["resumed"]
    adapters = [
        (commands.folder / run / "adapter_model.safetensors").read_bytes()
        for run in ("run", "whole")
    ]
    assert adapters[0] == adapters[1]


def test_a_rank_that_is_stopped_in_an_answer_stops_all(ended: Ended) -> None:
    assert ended.codes["a stopped answer"] == [STOPPED, STOPPED], ended.printed["a stopped answer"]
    assert "error: rank 1: SIGTERM arrived" in ended.printed["a stopped answer"][0][1]


def test_the_same_ranks_go_on(ended: Ended) -> None:
    """No sum of a command that failed is taken for one of the next."""
    assert ended.codes["asked"] == [0, 0], ended.printed["asked"]


def draw_faults(ranks: int, count: int, sums: int) -> list[str]:
    draw = random.Random(12)
    return [
        f"{draw.choice(['fail', 'stop'])} {draw.randrange(ranks)} sum {draw.randint(1, sums)}"
        for _ in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "ranks", "count"), [("ddp", 2, 16), ("fsdp", 4, 10)])
def test_all_ranks_end_wherever_one_fails(
    backend: str, ranks: int, count: int, tmp_path: Path
) -> None:
    """With the model cut by layers too, where a pass is walked to its end before anybody is told."""
    commands = Commands(tmp_path, backend)
    # a training has more sums than that, answers and what is read back among them
    faults = draw_faults(ranks, count, 200)
    words: Mapping[str, Sequence[str]] = {f: commands.sft(f"run-{f}", fault=f) for f in faults}
    ended = run_ranked(tmp_path / "ranks", {**words, "whole": commands.sft("whole")}, ranks)
    for fault in faults:
        code = BROKEN if fault.startswith("fail") else STOPPED
        assert ended.codes[fault] == [code] * ranks, ended.printed[fault]
    assert ended.codes["whole"] == [0] * ranks, ended.printed["whole"]
