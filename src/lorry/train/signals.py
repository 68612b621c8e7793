"""SIGTERM, SIGINT and SIGUSR1 as flags that the training loop reads between two steps.

    with watching() as stop:
        while step < total and not stop.requested:
            ...
            if stop.take_save():
                save()
    if stop.requested:
        raise Interrupted(f"{stop.requested} arrived; step {step} is saved, the same command goes on from there")

SIGTERM and SIGINT ask to stop after the current step; a second SIGINT raises KeyboardInterrupt at once. SIGUSR1 asks for
a checkpoint and goes on. A signal that the parent made us ignore (SIGINT in ``command &``) stays ignored.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Stop:
    """What arrived so far. ``requested`` is the name of the first signal that asked to stop, or an empty string."""

    requested: str = ""
    save_requested: bool = False
    _interrupts: int = 0

    def take_save(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        asked, self.save_requested = self.save_requested, False
        return asked

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.requested = self.requested or signal.Signals(number).name

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self.save_requested = True


@contextmanager
def watching() -> Iterator[Stop]:
    """Turn the signals into flags while the block runs; the handlers there were before come back afterwards.

    Outside the main thread Python allows no handlers: the flags then never change and the signals act as before.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    wanted: dict[int, Callable[[int, FrameType | None], None]] = {
        signal.SIGTERM: stop._on_stop,
        signal.SIGINT: stop._on_stop,
        signal.SIGUSR1: stop._on_save,
    }
    before = {number: signal.getsignal(number) for number in wanted}
    try:
        for number, handler in wanted.items():
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, handler)
        yield stop
    finally:
        for number, handler_before in before.items():
            if handler_before is not None:  # None: set by C code, which Python can neither see nor restore
                signal.signal(number, handler_before)
