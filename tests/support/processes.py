"""Real processes of tests: ended whatever becomes of the test, and waited for without a clock.

    with started([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        wait_until(lambda: log.exists(), child)

No wait here has a limit of its own: what is a long time on this machine is a short one where ten
others share its cores. A hang is ended by pytest's limit for a test (pyproject.toml), which lies
far above what a healthy run takes anywhere.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

import pytest

from lorry import cli
from lorry.verbs import background

POLL_SECONDS = 0.02
T = TypeVar("T")


@contextmanager
def started(command: Sequence[str], **settings: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process that is gone when the block ends, also by an error; ``settings`` are Popen's."""
    with subprocess.Popen(command, **settings) as child:
        try:
            yield child
        finally:
            child.kill()


class Child(Protocol):
    """A process as Popen has it."""

    returncode: Any

    def poll(self) -> int | None: ...


def wait_until(reached: Callable[[], T], child: Child | None = None) -> T:
    """The first true answer of ``reached``; a ``child`` that ends before it is an error."""
    while True:
        # asked before: what a process did last it has done when it is found ended
        ended = child is not None and child.poll() is not None
        if answer := reached():
            return answer
        assert not ended, f"it ended with {child and child.returncode}"
        time.sleep(POLL_SECONDS)


class LorryClone:
    """What subprocess.Popen is, for a command `python ... lorry WORDS`: a clone of this process, so
    that it does not import for seconds what is imported here. Its program is command[:3], as
    `-m lorry` or `-c CODE` are; what Popen's other settings do it does.
    """

    def __init__(
        self, command: Sequence[str], *, start_new_session: bool = False,
        env: Mapping[str, str] | None = None, check: bool = False, **streams: Any,
    ) -> None:  # fmt: skip
        assert not check
        self._process = multiprocessing.get_context("fork").Process(
            target=_run_in_clone, args=(command[3:], start_new_session, env, streams)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    @property
    def returncode(self) -> int | None:
        """Once it has ended, as subprocess.run waits for it."""
        self._process.join()
        return self._process.exitcode


def clone_background_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what `background=true` starts be clones of this process."""
    stand_in = SimpleNamespace(Popen=LorryClone, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(background, "subprocess", stand_in)


def _run_in_clone(
    words: Sequence[str],
    start_new_session: bool,
    env: Mapping[str, str] | None,
    streams: Mapping[str, Any],
) -> None:
    if start_new_session:
        os.setsid()
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = streams.get(name)
        if stream == subprocess.DEVNULL:
            stream = os.open(os.devnull, os.O_RDWR)
        if stream is not None:
            os.dup2(stream if isinstance(stream, int) else stream.fileno(), number)
    # not those of pytest, which keep what is written
    sys.stdout = os.fdopen(1, "w", closefd=False)
    # by lines, as Python's own is, wherever it goes
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(env or {})
    # tests that run in the background inherit an ignored one
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(cli.main(list(words)))
