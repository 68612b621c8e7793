"""Standard output and error of a command, so that a terminal or a log that cannot be written costs no work.

    with streams():
        ...  # sys.stdout and sys.stderr are these

What goes to standard error tells of the work: where it cannot be written (a full disk behind ``2> log``, a reader that has gone)
it is lost, and the work goes on. What goes to standard output is the result: where it cannot be written the command ends with
DiskError, and with BrokenPipeError where its reader has gone, as under ``| head``.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from lorry.disk.durable import DiskError


class _Stream:
    """A text stream with writing and flushing of its own; everything else is the stream's behind it."""

    def __init__(self, behind: TextIO) -> None:
        self._behind = behind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._behind)


class Messages(_Stream):
    """Standard error: what cannot be written is dropped."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._behind.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._behind.flush()


class Results(_Stream):
    """Standard output: what cannot be written ends the command."""

    def write(self, text: str) -> int:
        with _blame_standard_output():
            return self._behind.write(text)

    def flush(self) -> None:
        with _blame_standard_output():
            self._behind.flush()


@contextlib.contextmanager
def _blame_standard_output() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise DiskError(error.errno, error.strerror, "standard output") from error


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Put both in the place of ``sys.stdout`` and ``sys.stderr`` while the block runs."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Results(before[0]), Messages(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def abandon(stream: TextIO) -> None:
    """Send what a stream still holds nowhere: Python would try again at exit, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
