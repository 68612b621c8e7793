"""A run left alone, as real processes: listed, reported, stopped, gone on with, killed; what fails
at once; a closed terminal.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import lorry as package
from lorry.runs import status
from lorry.runs.process import read_process
from lorry.verbs import background
from tests.support.processes import clone_background_runs, started, wait_until
from tests.support.verbworld import TRAIN, World, lorry

SRC = Path(package.__file__).resolve().parent.parent
IN_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs this suite may ignore it, as nohup does
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""
LONG = 1_000_000  # steps: it does not end by itself


@pytest.fixture
def sft(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Any]]:
    """`lorry sft ... background=true`: (exit code, standard output, standard error). What still
    runs at the end is killed.
    """
    monkeypatch.setenv("PYTHONPATH", str(SRC))
    # what a run does at its start is what is asked for here, on however slow a machine
    monkeypatch.setattr(background, "START_TIMEOUT", math.inf)
    folders = list[Path]()

    def start(folder: Path, *settings: str, steps: int) -> tuple[int, str, str]:
        folders.append(folder)
        capfd.readouterr()
        words = (
            f"model={world.base}",
            f"data={world.rows}",
            f"output_dir={folder}",
            f"max_steps={steps}",
            *TRAIN,
            *settings,
        )
        return lorry("sft", *words, "background=true"), *capfd.readouterr()

    yield start
    for folder in folders:
        found = read_process(folder) if folder.is_dir() else None
        if found is not None and found.ended is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found.pid, signal.SIGKILL)


@pytest.fixture
def cloned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are clones of this process. Those that are watched, or have a terminal, are not."""
    clone_background_runs(monkeypatch)


def state(folder: Path) -> status.RunState:
    [found] = status.list_run_states(folder)
    return found


def until(folder: Path, reached: Callable[[status.RunState], bool]) -> status.RunState:
    """Wait for a run to get somewhere; one that ends before that is an error."""

    def look() -> status.RunState | None:
        found = state(folder)
        if reached(found):
            return found
        log = (folder / "log.txt").read_text()[-2000:]
        assert found.state == "running", f"{found}\n{log}"
        return None

    found = wait_until(look)
    assert found is not None
    return found


def test_left_alone_watched_stopped_and_gone_on_with(
    sft: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    code, out, err = sft(run, "save_steps=5", "save_strategy=steps", steps=LONG)
    assert (code, out) == (0, f"{run}\n"), err
    pid = int(re.search(r"kill -TERM (\d+)", err)[1])  # type: ignore[index]
    assert f"lorry report {run}" in err
    assert f"tail -f {run / 'log.txt'}" in err
    assert os.getsid(pid) == pid != os.getsid(0)  # no terminal can hang up on it
    found = until(run, lambda s: s.step >= 10)
    assert (found.state, found.pid, found.total) == ("running", pid, LONG)

    assert lorry("report", run) == 0
    assert re.search(rf"still running: step [\d,]+ of {LONG:,}", (run / "report.html").read_text())
    assert lorry("doctor", run) == 0
    assert "still running: step" in capfd.readouterr().out
    assert sft(run, "resume_from_checkpoint=auto", steps=LONG)[0] == 2  # one at a time

    os.kill(pid, signal.SIGTERM)
    stopped = until(run, lambda s: s.state != "running")
    assert stopped.state == "interrupted"
    assert stopped.detail.startswith(
        "SIGTERM arrived; resume_from_checkpoint=auto continues from step-"
    )
    assert stopped.checkpoint == f"step-{stopped.step:08d}"
    assert read_process(run).ended.exit_code == 75  # type: ignore[union-attr]
    assert "error: SIGTERM arrived" in (run / "log.txt").read_text()


@pytest.mark.usefixtures("cloned")
def test_killed_without_a_word(sft: Callable[..., Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert sft(run, steps=LONG)[0] == 0
    pid = until(run, lambda s: s.step >= 2).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait()
    dead = until(run, lambda s: s.state != "running")
    assert dead.state == "dead"
    assert dead.step >= 2
    assert (
        dead.detail
        == f"process {pid} ended without an error message; there is no checkpoint to continue from"
    )


@pytest.mark.usefixtures("cloned")
def test_finished(sft: Callable[..., Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert sft(run, steps=4)[0] == 0
    assert until(run, lambda s: s.state != "running").state == "finished"
    assert "chat    lorry chat" in (run / "log.txt").read_text(), (
        "who reads the state finds the log complete"
    )
    assert "still running" not in (run / "report.html").read_text()
    assert not (run / "process.json").exists()
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = json.loads((run / "losses.json").read_text())
    assert losses == {
        "step": [1, 2, 3, 4],
        "loss": [line["loss"] for line in logged],
        "eval_step": [],
        "eval_loss": [],
    }
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("cloned")
def test_what_fails_at_once_is_told_at_once(sft: Callable[..., Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, err = sft(run, f"data={tmp_path / 'nope.jsonl'}", steps=4)
    assert (code, out) == (3, "")
    assert "nope.jsonl: no such file" in err
    assert state(run).state == "failed"
    assert "nope.jsonl: no such file" in state(run).detail
    assert sft(tmp_path / "other", "lerning_rate=1", steps=4)[0] == 2
    assert not (tmp_path / "other").exists()


def test_a_terminal_that_closes(world: World, tmp_path: Path) -> None:
    """It saves and stops. (Under nohup the signal is ignored and stays so: test_signals.py.)"""
    run, (ours, theirs) = tmp_path / "run", pty.openpty()
    words = (
        f"model={world.base}",
        f"data={world.rows}",
        f"output_dir={run}",
        f"max_steps={LONG}",
        *TRAIN,
        "logging_steps=1",
    )
    command = [sys.executable, "-c", IN_TERMINAL, sys.executable, "-m", "lorry.cli", "sft", *words]
    environment = {**os.environ, "PYTHONPATH": str(SRC)}

    def has_begun() -> bool:
        with contextlib.suppress(BlockingIOError):
            os.read(ours, 1 << 16)  # or it would wait for us to read
        return (run / "metrics.jsonl").is_file() and state(run).step >= 3

    with started(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as child:
        os.close(theirs)
        os.set_blocking(ours, False)
        wait_until(has_begun, child)
        os.close(ours)
        assert child.wait() == 75
    found = state(run)
    assert found.state == "interrupted"
    assert (
        found.detail
        == f"SIGHUP arrived; resume_from_checkpoint=auto continues from {found.checkpoint}"
    )
    assert found.checkpoint == f"step-{found.step:08d}"


def test_a_worker_of_the_child_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With backend=ddp process.json is of rank 0, which the child has started; not of the child."""
    with started(
        ["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True
    ) as child:
        worker = int(child.stdout.readline())  # type: ignore[union-attr]
        try:
            for pid, trains in ((worker, True), (child.pid, True), (os.getpid(), False)):
                record = SimpleNamespace(pid=pid, begun="now")
                monkeypatch.setattr(background.process, "read_process", lambda _, r=record: r)
                monkeypatch.setattr(background, "START_TIMEOUT", 2.0 if trains else 0.1)
                assert background._wait_for_training(child, tmp_path) is trains
        finally:
            os.kill(worker, signal.SIGKILL)
