"""Standard output and error of a command, so that a terminal or a log that cannot be written costs
no work.

    with guard_streams():
        ...  # sys.stdout and sys.stderr are these

What goes to standard error tells of the work: where it cannot be written (a full disk behind ``2>
log``, a reader that has gone) it is lost, and the work goes on. What goes to standard output is the
result: where it cannot be written the command ends with DiskError, and with BrokenPipeError where
its reader has gone, as under ``| head``.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from lorry.disk.durable import DiskError
from lorry.errors import LorryError

BACKGROUND_VARIABLE = "LORRY_BACKGROUND"  # set in the environment of a run that is left alone


class _WrappedStream:
    """A text stream with writing and flushing of its own; everything else is the stream's behind
    it.
    """

    def __init__(self, behind: TextIO) -> None:
        self._behind = behind

    # isatty, fileno, encoding, buffer ...: other libraries ask for all of them
    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._behind)


class MessageStream(_WrappedStream):
    """Standard error: what cannot be written is dropped."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._behind.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._behind.flush()


class ResultStream(_WrappedStream):
    """Standard output: what cannot be written ends the command."""

    def write(self, text: str) -> int:
        with _blame_standard_output():
            return self._behind.write(text)

    def flush(self) -> None:
        with _blame_standard_output():
            self._behind.flush()


@contextlib.contextmanager
def silence_streams() -> Iterator[TextIO]:
    """While the block runs standard output and error go nowhere: of a process that only helps another
    one. Yields what standard error was, for its own failure."""
    output, messages = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = sys.stderr = nowhere
        try:
            yield messages
        finally:
            sys.stdout, sys.stderr = output, messages


@contextlib.contextmanager
def _blame_standard_output() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise DiskError(error.errno, error.strerror, "standard output") from error


# what waits for the last line; None: nothing is to wait
_last_action: list[Callable[[], None]] | None = None


def after_last_line(action: Callable[[], None]) -> None:
    """Do something once all is said: of a run in the background whoever reads how it stands must
    find its log complete.
    """
    if _last_action is None:
        action()
    else:
        _last_action.append(action)


def is_left_alone() -> bool:
    """Whether this process is a run in the background, whose state is told last."""
    return _last_action is not None


@contextlib.contextmanager
def guard_streams() -> Iterator[None]:
    """Put both in the place of ``sys.stdout`` and ``sys.stderr`` while the block runs. In a process
    that verbs/background.py started, what is given to `after_last_line` is done at the block's end."""
    global _last_action
    originals = sys.stdout, sys.stderr
    # a stream that was closed (`>&-`) is None: what goes there goes nowhere
    streams = [
        stream if stream is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        for stream in originals
    ]
    sys.stdout, sys.stderr = ResultStream(streams[0]), MessageStream(streams[1])
    # taken out: a process that this one starts is none of its kind
    _last_action = [] if os.environ.pop(BACKGROUND_VARIABLE, "") else None
    try:
        yield
    finally:
        actions, _last_action = _last_action or [], None
        # first, so that an action's own error goes to the stream itself
        sys.stdout, sys.stderr = originals
        for action in actions:
            try:
                action()
            except LorryError as error:  # the disk; the log is where it can be told
                print(f"error: {error}", file=sys.stderr, flush=True)


def abandon_stream(stream: TextIO) -> None:
    """Send what a stream still holds nowhere: Python would try again at exit, and complain."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
