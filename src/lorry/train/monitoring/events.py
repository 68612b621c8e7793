"""What a run tells the outside while it goes: steps, evaluations, notes. The terminal and the
trackers listen.

A listener never changes a run: a line that cannot be written (a full disk behind ``> log``) is
lost, and the run goes on. `PlainListener` prints lines, `ProgressBarListener` draws a progress bar,
`trackers` forwards to other tools.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lorry.console import VisibleConsole
from lorry.visible import make_visible

StepRecord = Mapping[str, Any]
TERM_PREFIX = "loss_"  # of a step's record: the terms of its loss, and what is reported beside them


class TrainingListener(Protocol):
    """Hears of a run. ``done`` steps of ``total`` are behind when it starts (more than 0 after a
    resume).
    """

    def start(self, done: int, total: int) -> None: ...
    def step(self, record: StepRecord) -> None: ...
    def evaluation(self, record: StepRecord) -> None: ...
    def note(self, text: str) -> None: ...
    def finish(self) -> None: ...


class PlainListener:
    """One line per ``every`` steps, for logs and pipes."""

    def __init__(self, every: int = 1, out: TextIO | None = None) -> None:
        self.every, self.out = every, out if out is not None else sys.stderr
        self.total = 0

    def start(self, done: int, total: int) -> None:
        self.total = total

    def step(self, record: StepRecord) -> None:
        # the last step always: a log should end with the loss that the run ended with
        if record["step"] % self.every == 0 or record["step"] == self.total:
            self._line(f"step {record['step']}/{self.total}  {format_step_figures(record)}")

    def evaluation(self, record: StepRecord) -> None:
        for line in format_evaluation(record):
            self._line(f"step {record['step']}/{self.total}  {line}")

    def note(self, text: str) -> None:
        self._line(text)

    def _line(self, text: str) -> None:
        # a full disk behind `> log`, or a reader that has gone: no reason to lose a run
        with contextlib.suppress(OSError):
            print(make_visible(text), file=self.out, flush=True)

    def finish(self) -> None:
        pass


class ProgressBarListener:
    """A progress bar with ETA, loss, tokens/s and memory; evaluations and notes scroll above it."""

    def __init__(self) -> None:
        self.console = VisibleConsole(stderr=True)
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(
            *columns, TextColumn("{task.fields[figures]}"), console=self.console
        )
        # hidden until `start`: loading and reading tell notes, and a bar at 0 would mislead
        self.bar = self.progress.add_task("train", figures="", visible=False)

    def start(self, done: int, total: int) -> None:
        self.progress.start()
        self.progress.update(self.bar, completed=done, total=total, visible=True)

    def step(self, record: StepRecord) -> None:
        self.progress.update(
            self.bar, completed=record["step"], figures=format_step_figures(record)
        )

    def evaluation(self, record: StepRecord) -> None:
        for line in format_evaluation(record):
            self.console.print(f"step {record['step']}: {line}", highlight=False, markup=False)

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def finish(self) -> None:
        self.progress.stop()


def format_step_figures(record: StepRecord) -> str:
    """Loss, rate of work and memory of a step in a few words: of a loss of several terms, each of
    them behind it, of several adapters, the loss of each.
    """
    speed = record["tokens"] / record["seconds"] if record.get("seconds") else float("nan")
    memory = record.get("peak_memory_bytes", 0) / 2**30
    rate = record["learning_rate"]
    # a warm-up begins at 0, as in transformers: the step looks at its rows and moves no weight
    shown = f"lr {rate:.2e}" if rate else "lr 0 (warm-up: no weight moves yet)"
    work = f"{shown}  {speed:.0f} tok/s  {memory:.2f} GiB"
    if "adapters" in record:
        return f"{work}  loss " + "  ".join(
            f"{name} {figures['loss']:.4f}" for name, figures in record["adapters"].items()
        )
    terms = "  ".join(
        f"{name.removeprefix(TERM_PREFIX)} {value:.4f}"
        for name, value in record.items()
        if name.startswith(TERM_PREFIX)
    )
    # a sum may stand still while one part of it runs away
    return f"loss {record['loss']:.4f}" + (f" ({terms})" if terms else "") + f"  {work}"


def format_evaluation(record: StepRecord) -> list[str]:
    """The values of an evaluation in a few words; of several adapters, a line each."""
    several = record.get("adapters", {"": record})
    words = {
        name: "  ".join(
            f"{metric} {value:.4f}"
            for metric, value in values.items()
            # counts are logged but are no result
            if metric != "step" and isinstance(value, float)
        )
        for name, values in several.items()
    }
    return [f"{name}  {text}" if name else text for name, text in words.items()]


def terminal_listener(every: int) -> TrainingListener:
    """A bar on a terminal, lines elsewhere."""
    return ProgressBarListener() if sys.stderr.isatty() else PlainListener(every)
