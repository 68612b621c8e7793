"""A run of several jobs killed at a few places, some before and some after a job's end, goes on
bitwise as if never stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorry.errors import ConfigError
from lorry.train import checkpoint
from lorry.train.monitoring.events import StepRecord
from lorry.train.session import train_run
from tests.support import tinyrun
from tests.support.faults import kill, run_forked
from tests.support.mortal import RunDisk, World, finished, same
from tests.support.mortal import world as world
from tests.support.tinyrun import Heard, quick  # noqa: F401 - a fixture

# one ends early, one stops early, one reads its rows as they come, all drop out and keep their best
JOBS: list[dict[str, Any]] = [
    {"name": "a", "seed": 1},
    {"name": "b", "r": 3, "max_steps": 5, "learning_rate": 3e-3},
    {
        "name": "c",
        "learning_rate": 0.3,
        "early_stopping_patience": 1,
        "lr_scheduler_type": "constant",
    },
    {"name": "d", "streaming": True, "packing": True, "seed": 4},
]


def run_jobs(world: World, folder: Path) -> Any:
    return train_run(world.run(folder, jobs=JOBS, eval_steps=1), [])


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    result = run_jobs(world, folder)
    ended = {name: (o.steps, o.stopped_early) for name, o in result.outcome.jobs.items()}
    assert ended["b"] == (5, False)
    assert ended["c"][1]
    assert ended["c"][0] < ended["d"][0] == 11
    return finished(folder)


@pytest.mark.parametrize("call", [70, 130, 220, 330])
def test_killed_and_resumed(world: World, whole: dict[str, Any], call: int, tmp_path: Path) -> None:
    outcome = run_forked(lambda f, _: run_jobs(world, f) and None, RunDisk(call, kill), tmp_path)
    assert outcome.killed, outcome.error or f"call {call} was never made"
    run_jobs(world, tmp_path)
    same(finished(tmp_path), whole, f"killed at call {call}")


class Stop(Exception):
    """The run ends here, as a kill would have it."""


class StopAt(Heard):
    def step(self, record: StepRecord) -> None:
        if record["step"] == 9:
            raise Stop


def test_resumed_after_two_jobs_are_done(
    world: World, whole: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        train_run(world.run(tmp_path, jobs=JOBS, eval_steps=1), [], [StopAt()])
    newest = checkpoint.find_latest_checkpoint(tmp_path / "run")
    assert newest is not None
    _, meta = checkpoint.load_checkpoint(newest)
    standing = meta["progress"]["jobs"]
    assert standing["b"]["steps"] == 5 < meta["progress"]["step"]
    assert standing["c"]["stopped_early"]
    run_jobs(world, tmp_path)
    same(finished(tmp_path), whole, "after step 9")


def test_other_jobs_are_another_run(world: World, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train_run(world.run(tmp_path, jobs=JOBS, eval_steps=1), [], [StopAt()])
    with pytest.raises(
        ConfigError, match=r"cannot resume, the checkpoint belongs to another run:\n  jobs "
    ):
        train_run(world.run(tmp_path, jobs=JOBS[:3], eval_steps=1), [])
    other = tinyrun.write_rows(tmp_path / "other.jsonl", tinyrun.rows(5, start=60))
    changed = [*JOBS[:3], {**JOBS[3], "data": {"path": str(other)}}]
    with pytest.raises(ConfigError, match="cannot resume"):
        train_run(world.run(tmp_path, jobs=changed, eval_steps=1), [])
