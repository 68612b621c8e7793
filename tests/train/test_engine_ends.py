"""What ends a run of the engine, or asks something of it, and who hears: failures, signals, the log
after a resume, listeners.
"""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lorry.backends.protocol import LossTerms
from lorry.data.batch import Batch
from lorry.errors import NonFiniteError, RunInterruptedError
from lorry.train import checkpoint
from lorry.train.monitoring.events import (
    PlainListener,
    ProgressBarListener,
    StepRecord,
    terminal_listener,
)
from tests.support.seam import Fixed
from tests.support.states import same
from tests.support.tinyrun import Heard, engine_for, evaluated, lines, quick, saved, steps  # noqa: F401 - a fixture

# --- failures and signals


class Poisoned(Fixed):
    """The loss of one step is not finite."""

    bad = 4

    def step_batches(self, step: int, models: Any) -> list[Batch]:
        self.now = step
        return super().step_batches(step, models)

    def loss(self, got: Mapping[str, Tensor], batch: Batch) -> LossTerms:
        return {
            "nll": super().loss(got, batch)["nll"] * (float("nan") if self.now == self.bad else 1.0)
        }


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    task = Poisoned(steps(8))
    stopped = engine_for(task, tmp_path, save_steps=2)
    with pytest.raises(
        NonFiniteError,
        match=r"step 5: the loss term 'nll' is not finite for 2 of 2 sequences .* \(rows \[0, 1\], keys \[400, 401\]\)",
    ) as e:
        stopped.run()
    assert e.value.exit_code == 6
    assert stopped.checks.results[7].status == "failed"
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    newest = checkpoint.find_latest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000004"
    # nothing was updated
    assert same(checkpoint.load_checkpoint(newest)[0], stopped.backend.state())
    healed = engine_for(Fixed(steps(8)), tmp_path, save_steps=2)
    healed.resume(newest)
    assert healed.run().steps == 8


class SignalAt(Heard):
    def __init__(self, step: int, number: signal.Signals) -> None:
        super().__init__()
        self.at, self.number = step, number

    def step(self, record: StepRecord) -> None:
        if record["step"] == self.at:
            os.kill(os.getpid(), self.number)


def test_sigterm_saves_this_step_and_stops(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(
        RunInterruptedError,
        match=r"SIGTERM arrived; step 3 of 6 is saved in .*resume_from_checkpoint=auto",
    ):
        engine_for(Fixed(steps(6)), tmp_path, listeners=[SignalAt(3, signal.SIGTERM)]).run()
    assert saved(tmp_path) == [3]
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_in_the_last_step_is_no_interruption(tmp_path: Path) -> None:
    assert (
        engine_for(Fixed(steps(2)), tmp_path, listeners=[SignalAt(2, signal.SIGTERM)]).run().steps
        == 2
    )


def test_sigusr1_saves_and_goes_on(tmp_path: Path) -> None:
    engine_for(Fixed(steps(5)), tmp_path, listeners=[SignalAt(2, signal.SIGUSR1)]).run()
    assert saved(tmp_path) == [2, 5]


def test_lines_beyond_the_checkpoint_are_cut(tmp_path: Path) -> None:
    engine_for(Fixed(steps(6)), tmp_path, save_steps=2, save_total_limit=None).run()
    whole = lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1}\n{"step": 8, "lo')
    again = engine_for(Fixed(steps(6)), tmp_path, save_steps=2)
    again.resume(tmp_path / "checkpoints" / "step-00000004")
    assert saved(tmp_path) == [2, 4]
    again.run()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines(tmp_path)] == [line["loss"] for line in whole]


# --- listeners


def test_plain_lines(tmp_path: Path) -> None:
    out = io.StringIO()
    plain = PlainListener(every=3, out=out)
    plain.note("a note")
    engine_for(
        Fixed(steps(5)),
        tmp_path,
        listeners=[plain],
        eval_strategy="steps",
        eval_steps=4,
        learning_rate=1e-2,
        save_strategy="no",
    ).run()
    note, three, evaluation, five = out.getvalue().splitlines()
    assert note == "a note"
    assert three.startswith("step 3/5  loss ")
    assert "  lr 7.50e-03  " in three
    assert three.endswith(" GiB")
    assert evaluation.startswith("step 4/5  eval_loss ")
    assert "eval_token_accuracy" in evaluation
    assert five.startswith("step 5/5  loss ")


def test_the_live_display_works_without_a_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    live = ProgressBarListener()
    live.note("[not markup] a note")
    engine_for(
        Fixed(steps(3)), tmp_path, listeners=[live], eval_strategy="steps", eval_steps=2
    ).run()
    shown = capfd.readouterr().err
    assert "[not markup] a note" in shown
    assert "step 2: eval_loss" in shown
    assert "3/3" in shown
    assert isinstance(terminal_listener(2), PlainListener)


def test_listeners_finish_also_after_a_failure(tmp_path: Path) -> None:
    heard = Heard()
    with pytest.raises(NonFiniteError):
        engine_for(Poisoned(steps(8)), tmp_path, listeners=[heard]).run()
    assert heard.finished == 1
