"""Real processes of tests: ended whatever becomes of the test, and waited for without a clock.

    with started([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        wait_until(lambda: log.exists(), child)

No wait here has a limit of its own: what is a long time on this machine is a short one where ten
others share its cores. A hang is ended by pytest's limit for a test (pyproject.toml), which lies
far above what a healthy run takes anywhere.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

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


def wait_until(reached: Callable[[], T], child: subprocess.Popen[Any] | None = None) -> T:
    """The first true answer of ``reached``; a ``child`` that ends before it is an error."""
    while True:
        # asked before: what a process did last it has done when it is found ended
        ended = child is not None and child.poll() is not None
        if answer := reached():
            return answer
        assert not ended, f"it ended with {child.returncode}"  # type: ignore[union-attr]
        time.sleep(POLL_SECONDS)
