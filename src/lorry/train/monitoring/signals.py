"""SIGTERM, SIGHUP, SIGINT and SIGUSR1 as flags that the training loop reads between two steps.

    with watch_signals() as stop:
        while step < total and not stop.requested:
            ...
            if stop.take_save():
                save()
    if stop.requested:
        raise RunInterruptedError(f"{stop.requested} arrived; step {step} is saved, the same command goes on from there")

SIGTERM, SIGHUP (the terminal is gone) and SIGINT ask to stop after the current step; a second
SIGINT raises KeyboardInterrupt at once. SIGUSR1 asks for a checkpoint and goes on. A signal that
the parent made us ignore (SIGINT in ``command &``, SIGHUP under ``nohup``) stays ignored. Before
and after the loop `raise_on_signals` turns the first two into RunInterruptedError, and SIGUSR1, which
schedulers send as a warning at a moment of their choosing, changes nothing: what there is to save
is saved.

**Nothing is raised while a module is being imported**, an object is being deleted, a module of torch's
takes its tensors or torch works out what an operation of a DTensor is. Import machinery (numpy's, torch's, accelerate's C code among it)
swallows such an exception, turns it into another one or is left half done; what `__del__` raises
Python prints and forgets; torch makes a RuntimeError of it. Nor while
ranks exchange what they have, or gather weights that they share: the others would wait for what is left
out. There a signal is only remembered, and
sent again until it finds another place.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from lorry.errors import RunInterruptedError


@dataclass
class StopRequest:
    """What arrived so far. ``requested`` is the name of the first signal that asked to stop, or an
    empty string.
    """

    requested: str = ""
    save_requested: bool = False
    _interrupts: int = 0

    def take_save(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        requested, self.save_requested = self.save_requested, False
        return requested

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _detach_terminal()
        self._interrupts += number == signal.SIGINT
        # a person who presses Ctrl-C twice wants out now, with the last checkpoint as it is
        if self._interrupts > 1:
            raise KeyboardInterrupt
        # the first one's name: a scheduler's SIGTERM is the reason, not what follows it
        self.requested = self.requested or signal.Signals(number).name

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self.save_requested = True


@contextmanager
def watch_signals() -> Iterator[StopRequest]:
    """Turn the signals into flags while the block runs; the handlers there were before come back
    afterwards.

    Outside the main thread Python allows no handlers: the flags then never change and the signals
    act as before.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    wanted: dict[int, Callable[[int, FrameType | None], None]] = {
        signal.SIGTERM: stop._on_stop,
        signal.SIGHUP: stop._on_stop,
        signal.SIGINT: stop._on_stop,
        signal.SIGUSR1: stop._on_save,
    }
    before = {number: signal.getsignal(number) for number in wanted}
    try:
        for number, handler in wanted.items():
            # ignored by the parent's wish (nohup, `command &`): not ours to undo
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, handler)
        yield stop
    finally:
        for number, handler_before in before.items():
            # None: set by C code, which Python can neither see nor restore
            if handler_before is not None:
                signal.signal(number, handler_before)


OUTSIDE_THE_STEPS = (
    "arrived outside the training steps; the last checkpoint, if any, is kept. The "
    "same command with resume_from_checkpoint=auto continues from there, or starts "
    "anew"
)


# Seconds until a remembered signal is sent again: first, and at most. Each time twice as long, or a
# process that gets a core only now and then does nothing but start timers, and never imports.
RESEND_SECONDS, LONGEST_RESEND_SECONDS = 0.02, 1.0
# the file of CPython's import machinery, in every frame of it
IMPORT_FRAME_FILE = "<frozen importlib._bootstrap>"
# functions that never let an exception out as it is: Python's, and of torch.nn.Module
SWALLOWING_FUNCTIONS = ("__del__", "_load_from_state_dict")
# the ends of the names of DTensor's, and of ours whose collectives follow each other on every rank
UNSAFE_FILES = (
    os.path.join("torch", "distributed", "tensor", "_dispatch.py"),
    *(
        os.path.join("lorry", "backends", "distributed", file)
        for file in ("exchange.py", "passes.py", "sharded.py", "shares.py")
    ),
)


@dataclass(frozen=True)
class _RaiseHandler:
    """A handler that raises Interrupted, for SIGINT KeyboardInterrupt; ``text`` says what that
    means just now.

    ``imports``: how many frames of imports were on the stack when the block began; a script that is
    itself being imported may call Lorry. Only what lies above those counts.
    """

    text: str
    imports: int = 0
    remembered: dict[int, threading.Timer] = field(default_factory=dict)
    # those of ``remembered`` whose timer sends, or has sent; its thread may still be alive when the
    # signal arrives, so that is no sign of a timer to come
    sent: set[int] = field(default_factory=set)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if _count_unsafe_frames(frame) > self.imports:
            # one timer per signal, or a signal that is sent often would start threads without end
            if number not in self.remembered or number in self.sent:
                self.remember(number)
            return
        self.remembered.pop(number, None)
        self.tell(number)

    def tell(self, number: int) -> None:
        """Raise what the signal means."""
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            _detach_terminal()
        raise RunInterruptedError(f"{signal.Signals(number).name} {self.text}")

    def remember(self, number: int) -> None:
        """Send the signal again a little later, to this thread, so that it also ends a wait for
        input.
        """
        before = self.remembered.get(number)
        seconds = (
            RESEND_SECONDS if before is None else min(2 * before.interval, LONGEST_RESEND_SECONDS)
        )
        self.sent.discard(number)
        timer = self.remembered[number] = threading.Timer(seconds, self.send, (number,))
        # a process that ends otherwise must not wait for it
        timer.daemon = True
        timer.start()

    def send(self, number: int) -> None:
        """What a timer does: the signal again, to the main thread."""
        main = threading.main_thread().ident
        assert main is not None
        self.sent.add(number)
        signal.pthread_kill(main, number)

    def forget(self) -> list[int]:
        """Send nothing again; the signals that were remembered and never told."""
        numbers = list(self.remembered)
        for timer in self.remembered.values():
            # joined as well: a timer that has fired already delivers before we go on, not after
            timer.cancel()
            timer.join()
        self.remembered.clear()
        return numbers


def _count_unsafe_frames(frame: FrameType | None) -> int:
    """How many frames are on the stack in which nothing is raised: see this file's beginning."""
    count = 0
    while frame is not None:
        code = frame.f_code
        count += code.co_filename == IMPORT_FRAME_FILE or code.co_name in SWALLOWING_FUNCTIONS
        count += code.co_filename.endswith(UNSAFE_FILES)
        frame = frame.f_back
    return count


def _ignore_signal(number: int, frame: FrameType | None) -> None:
    """Of SIGUSR1: nothing. A function and not SIG_IGN, which `watch_signals` and child processes
    would take for the parent's wish.
    """


@contextmanager
def raise_on_signals(text: str = OUTSIDE_THE_STEPS) -> Iterator[None]:
    """While the block runs SIGTERM and SIGHUP raise Interrupted, where they would have ended the
    process without a word, SIGINT raises KeyboardInterrupt, and SIGUSR1 passes. Blocks nest: the
    innermost one's ``text``, what follows the signal's name, is told. What arrives during an import
    is raised behind it, at the block's end at the latest.

    A handler somebody else has set, and a signal that is ignored, stay as they are; so does
    everything outside the main thread.
    """
    before = dict[int, Any]()
    handler = _RaiseHandler(text, _count_unsafe_frames(sys._getframe()))
    try:
        if threading.current_thread() is threading.main_thread():
            for watched in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
                current = signal.getsignal(watched)
                if isinstance(current, _RaiseHandler) and watched != signal.SIGUSR1:
                    for number in current.forget():  # it is this block's to tell now, once
                        handler.remember(number)
                if current in (signal.SIG_DFL, signal.default_int_handler) or isinstance(
                    current, _RaiseHandler
                ):
                    before[watched] = signal.signal(
                        watched, _ignore_signal if watched == signal.SIGUSR1 else handler
                    )
        yield
        for number in handler.forget():
            handler.tell(number)
    finally:
        untold = list[int]()
        try:
            untold = handler.forget()
        finally:
            for number, handler_before in before.items():
                signal.signal(number, handler_before)
        for number in untold:  # the block ended by an exception before it could tell
            if isinstance(before.get(number), _RaiseHandler):
                signal.raise_signal(number)
            else:  # the default would end the process without a word
                handler.tell(number)


def raise_deferred_signals() -> None:
    """A safe point, behind imports: raise at once what arrived during them, where it would be sent
    again a moment later.
    """
    for handler in map(signal.getsignal, (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)):
        if isinstance(handler, _RaiseHandler):
            for number in handler.forget():
                handler.tell(number)


def _detach_terminal() -> None:
    """Standard output and error go nowhere from now on if they were a terminal that has hung up:
    writing to it would fail, and a line about a step would cost the run."""
    for descriptor in (1, 2):
        try:
            gone = stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor)
        except OSError:
            continue  # closed
        if gone:
            # dup2 keeps the numbers 1 and 2, which libraries in C write to directly
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
