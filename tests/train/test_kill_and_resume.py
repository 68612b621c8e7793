"""A run killed anywhere goes on from its last checkpoint and ends as if it had never been stopped,
bit for bit.

At every call of a whole run that changes the disk, and at moments between such calls, a real
process in that state dies by SIGKILL (in the middle of the call, if it is a write); what it leaves
behind is resumed and compared with an uninterrupted run, every file of it. Equal leavings are
resumed once.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from lorry.errors import RunInterruptedError
from lorry.runs.metrics import MetricsWriter
from lorry.train import checkpoint
from lorry.train.session import train_run
from tests.support import tinyrun
from tests.support.faults import kill, run_forked
from tests.support.mortal import (
    MOMENTS,
    SETTINGS,
    SHAPES,
    RunDisk,
    Whole,
    World,
    finished,
    killed_everywhere,
    mark_moments,
    same,
)
from tests.support.processes import LorryClone
from tests.support.tinyrun import quick  # noqa: F401 - a fixture


# At every call takes minutes (`make test-slow`). Each kind of call is hit at every place either way,
# in the packed run: the others write the same files, and differ in which rows they go on with.
@pytest.mark.parametrize(
    ("shape", "every", "everywhere"),
    [
        pytest.param("packed", 1, True, marks=pytest.mark.slow),
        pytest.param("not packed", 20, True, marks=pytest.mark.slow),
        pytest.param("streamed", 25, True, marks=pytest.mark.slow),
        ("packed", 25, True),
        ("not packed", 50, False),
        ("streamed", 60, False),
    ],
)
def test_killed_at_every_call_and_moment(
    world: World, whole: Whole, shape: str, every: int, everywhere: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    expected = whole(shape)
    with monkeypatch.context() as patch:
        mark_moments(patch)
        killed, states = killed_everywhere(world, tmp_path, shape, every, everywhere)
    same(finished(tmp_path / "live"), expected, "writes cut short")
    assert killed.keys() >= {
        "mkdir",
        "create",
        "write",
        "fsync",
        "close",
        "fsync_dir",
        "rename",
        "unlink",
        "rmdir",
        *MOMENTS,
    }
    for folder in states:
        train_run(world.run(folder, **SHAPES[shape]), [])
        same(finished(folder), expected, f"killed at {folder.name}")
        shutil.rmtree(folder)
    with capsys.disabled():
        kinds = f"every kind of call{' at every place' if everywhere else ''}"
        share = "every call" if every == 1 else f"{kinds} and every {every}th"
        print(
            f"\n{shape}: {killed.total()} SIGKILLs ({share}), {len(states)} different states left; all resumed bitwise"
        )


def resume_forked(world: World, folder: Path, at: int) -> bool:
    """Go on with the packed run in a process of its own that is killed at its call ``at``; whether
    it was.
    """
    outcome = run_forked(
        lambda f, _: train_run(world.run(f, **SHAPES["packed"]), []) and None,
        RunDisk(at, kill),
        folder,
    )
    assert not outcome.error, outcome.error
    return outcome.killed


def test_killed_several_times(world: World, whole: Whole, tmp_path: Path) -> None:
    """First, second and third lives end at random calls; the last one ends well."""
    draw = random.Random(0)
    deaths = 0
    for n in range(6):
        folder = tmp_path / str(n)
        folder.mkdir()
        deaths += sum(
            resume_forked(world, folder, draw.randrange(5, last)) for last in (260, 160, 80)
        )
        assert not resume_forked(world, folder, 0)
        same(finished(folder), whole("packed"), f"history {n}")
    assert deaths > 12


def test_always_killed_young(world: World, whole: Whole, tmp_path: Path) -> None:
    """Every life lasts just long enough to save once: a run that is killed over and over still
    ends, and ends the same.
    """
    lives = 1
    while resume_forked(world, tmp_path, 90):
        lives += 1
        assert lives < 12
    assert lives > 3
    same(finished(tmp_path), whole("packed"), f"after {lives} lives")


# --- signals


STOP_AT = 5


def command_line(world: World, folder: Path) -> list[str]:
    """`lorry sft` for the packed run."""
    given = {
        **tinyrun.DEFAULTS,
        **SETTINGS,
        **SHAPES["packed"],
        "eval": world.held,
        "output_dir": folder / "run",
    }
    settings = {"model": world.model, "data": world.data, **given}
    return [
        "sft",
        *(f"{k}={','.join(v) if isinstance(v, list) else str(v)}" for k, v in settings.items()),
    ]


def check_stopped(folder: Path) -> None:
    newest = checkpoint.find_latest_checkpoint(folder / "run")
    assert newest is not None
    assert newest.name == f"step-{STOP_AT:08d}"
    contracts = json.loads((folder / "run" / "contracts.json").read_text())
    assert {c["status"] for c in contracts} == {"held", "not_checked"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_75(
    number: signal.Signals,
    world: World,
    whole: Whole,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = MetricsWriter.write

    def then_signal(self: MetricsWriter, record: dict[str, Any]) -> None:
        write(self, record)
        if record["step"] == STOP_AT:
            os.kill(os.getpid(), number)

    command = [sys.executable, "-m", "lorry", *command_line(world, tmp_path)]
    with monkeypatch.context() as patch, (tmp_path / "said").open("w") as file:
        patch.setattr(MetricsWriter, "write", then_signal)
        clone = LorryClone(command, stderr=file)
        assert clone.returncode == RunInterruptedError.exit_code == 75
    said = (tmp_path / "said").read_text()
    assert f"{number.name} arrived; step 5 of 11 is saved" in said
    assert "resume_from_checkpoint=auto" in said
    assert "Traceback" not in said
    check_stopped(tmp_path)
    train_run(world.run(tmp_path, **SHAPES["packed"]), [])
    same(finished(tmp_path), whole("packed"), f"after {number.name}")
