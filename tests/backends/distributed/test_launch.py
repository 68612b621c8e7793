"""The workers of a command: cores divided, and one exit code of all."""

from __future__ import annotations

import os

import pytest

from lorry.backends.distributed import launch
from lorry.backends.distributed.launch import run_workers, worker_environments

TERM, KILL, SEGV = -15, -9, -11


@pytest.mark.parametrize(
    ("first", "failures", "code", "told"),
    [
        # an error of one explains the end, and what the launcher ended is not named
        ({1: 3}, {0: TERM, 1: 3}, 3, ""),
        ({0: 2, 1: 2}, {0: 2, 1: 2}, 2, ""),
        # the system ran out of memory: the others lost their peer
        ({1: KILL}, {0: 1, 1: KILL}, 1, "rank 1 was ended by SIGKILL\n"),
        ({0: 1, 1: KILL}, {0: 1, 1: KILL}, 1, "rank 1 was ended by SIGKILL\n"),
        ({1: SEGV}, {0: TERM, 1: SEGV}, 1, "rank 1 was ended by SIGSEGV\n"),
        # noticed too late to know: a worker's own end before the launcher's doing
        ({}, {0: TERM, 1: 4}, 4, ""),
        ({}, {0: TERM, 1: SEGV}, 1, "rank 1 was ended by SIGSEGV\n"),
        ({}, {0: KILL}, 1, "rank 0 was ended by SIGKILL\n"),
        ({}, {}, 0, ""),
    ],
)
def test_one_exit_code_of_all(
    capsys: pytest.CaptureFixture[str],
    first: dict[int, int],
    failures: dict[int, int],
    code: int,
    told: str,
) -> None:
    assert launch._exit_code(first, failures) == code
    assert capsys.readouterr().err == told


def test_cores_of_this_process_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that it may use, not those of the machine."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7, 9}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    made = worker_environments(2, 1234)
    assert [made[rank]["OMP_NUM_THREADS"] for rank in (0, 1)] == ["2", "2"]
    assert worker_environments(8, 1234)[7]["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert worker_environments(2, 1234)[1]["OMP_NUM_THREADS"] == "3"


def test_the_launcher_adds_nothing_to_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """Two workers, as torch's launcher starts them, end with an error of the command line; which
    worker failed it would log, and each that it ends."""
    assert run_workers(["no-such-verb"], 2) == 2
    assert caplog.messages == []
