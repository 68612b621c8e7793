"""Signals become flags, in this process and in a real one that is signalled from outside."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import _dispatch

from lorry.errors import RunInterruptedError
from lorry.train.monitoring import signals
from lorry.train.monitoring.signals import StopRequest, raise_on_signals, watch_signals
from tests.support.processes import started

WATCHED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def _known_handlers() -> Iterator[None]:
    """Start from handlers of our own: a test run in the background inherits an ignored SIGINT."""
    before = {number: signal.signal(number, lambda *_: None) for number in WATCHED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_stop_signal_is_a_flag_and_its_name(number: signal.Signals) -> None:
    with watch_signals() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested == number.name
        assert not stop.take_save()


def test_a_second_interrupt_raises_at_once_and_others_do_not() -> None:
    with watch_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_usr1_asks_for_one_save_and_goes_on() -> None:
    with watch_signals() as stop:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        assert (stop.take_save(), stop.take_save(), stop.requested) == (True, False, "")


def test_handlers_come_back_also_after_an_error() -> None:
    before = [signal.getsignal(number) for number in WATCHED]
    with contextlib.suppress(RuntimeError), watch_signals():
        assert [signal.getsignal(number) for number in WATCHED] != before
        raise RuntimeError("inside")
    assert [signal.getsignal(number) for number in WATCHED] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_ignored_signal_stays_ignored(number: signal.Signals) -> None:
    """SIGINT of a command in the background, SIGHUP under nohup."""
    signal.signal(number, signal.SIG_IGN)
    with raise_on_signals(), watch_signals() as stop:
        signal.raise_signal(number)
        assert not stop.requested
    assert signal.getsignal(number) is signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_outside_the_loop_it_is_raised_once_and_inside_a_flag(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_DFL)
    with raise_on_signals():
        with watch_signals() as stop:
            signal.raise_signal(number)
        assert stop.requested == number.name
        with pytest.raises(
            RunInterruptedError, match=f"{number.name} arrived outside the training steps"
        ):
            signal.raise_signal(number)
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_handler_of_somebody_else_stays() -> None:
    theirs = signal.getsignal(signal.SIGTERM)
    with raise_on_signals():
        assert signal.getsignal(signal.SIGTERM) is theirs


def test_outside_the_main_thread_nothing_changes() -> None:
    before = [signal.getsignal(number) for number in WATCHED]
    seen: list[StopRequest] = []

    def work() -> None:
        with watch_signals() as stop:
            seen.append(stop)
            assert [signal.getsignal(number) for number in WATCHED] == before

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [StopRequest()]


LOOP = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from lorry.train.monitoring.signals import watch_signals
with watch_signals() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.005)
        if stop.take_save():
            print("saved", flush=True)
    print(stop.requested, flush=True)
    while stop.requested == "SIGINT":
        time.sleep(0.005)
"""


def test_a_real_process_saves_goes_on_and_stops() -> None:
    with started(
        [sys.executable, "-c", LOOP], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        os.kill(child.pid, signal.SIGUSR1)
        assert child.stdout.readline() == "saved\n"
        os.kill(child.pid, signal.SIGINT)
        assert child.stdout.readline() == "SIGINT\n"
        os.kill(child.pid, signal.SIGINT)
        _, errors = child.communicate()
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_what_arrives_while_an_object_is_deleted_is_raised_behind_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Python prints what `__del__` raises and forgets it."""

    class Last:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(RunInterruptedError, match="SIGTERM arrived"), raise_on_signals("arrived"):
        Last()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert capsys.readouterr().err == ""


def test_what_arrives_in_an_operation_of_a_dtensor_is_raised_behind_it() -> None:
    """torch makes a RuntimeError of what is raised inside: a traceback, and another exit code."""
    source = """
try:
    signal.raise_signal(signal.SIGTERM)
except Exception as e:
    raise RuntimeError(f"{e}: Sharding propagation failed") from e
"""
    operation = compile(source, _dispatch.__file__, "exec")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(RunInterruptedError, match="SIGTERM"), raise_on_signals():
        exec(operation, {"signal": signal})


class StoppedWhenCopied(torch.Tensor):
    """A tensor during whose copy SIGTERM arrives."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            signal.raise_signal(signal.SIGTERM)
        return super().__torch_function__(func, types, args, kwargs)


def test_what_arrives_while_a_module_takes_its_tensors_is_raised_behind_it() -> None:
    """In float32. torch makes a RuntimeError of what is raised inside."""
    linear, state = torch.nn.Linear(2, 1), {"weight": torch.ones(1, 2), "bias": torch.ones(1)}
    state["weight"] = state["weight"].as_subclass(StoppedWhenCopied)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(RunInterruptedError, match="SIGTERM"), raise_on_signals():
        linear.load_state_dict(state)
    assert linear.weight.tolist() == [[1.0, 1.0]]


def test_what_is_remembered_is_sent_again_without_a_safe_point() -> None:
    class Last:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGHUP)

    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def work() -> None:
        with raise_on_signals():
            Last()
            while True:  # a signal that arrives right before a long wait would not end it
                time.sleep(0.001)

    with pytest.raises(RunInterruptedError, match="SIGHUP"):
        work()


def test_it_is_sent_again_although_the_thread_that_sent_it_lingers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a busy machine the thread of the timer may not have ended when its signal arrives, which
    counted as a timer still to come: `lorry chat` waited for input, and SIGTERM was forgotten.
    """
    sent, gone = list[int](), threading.Event()
    send = signal.pthread_kill

    def linger(thread: int, number: int) -> None:
        send(thread, number)
        sent.append(number)
        if len(sent) == 1:
            gone.wait()

    class Last:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)
            while not sent:  # it is sent again in here, and must be once more behind it
                time.sleep(0.001)

    monkeypatch.setattr(signals.signal, "pthread_kill", linger)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    enough = threading.Timer(200, gone.set)
    enough.start()

    def work() -> None:
        with raise_on_signals():
            Last()
            while not gone.is_set():
                time.sleep(0.001)

    try:
        with pytest.raises(RunInterruptedError, match="SIGTERM"):
            work()
        assert not gone.is_set(), "it was told at the block's end only"
    finally:
        enough.cancel()
        gone.set()


def test_a_script_that_is_being_imported_is_stopped_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "training_script.py").write_text(
        "import signal\n"
        "from lorry.train.monitoring.signals import raise_on_signals\n"
        "with raise_on_signals():\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        ""
        "    raise AssertionError\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(RunInterruptedError):
        importlib.import_module("training_script")


def test_what_came_during_an_import_that_failed_is_told_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text(
        "import signal\nsignal.raise_signal(signal.SIGTERM)\nraise ImportError\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(RunInterruptedError), raise_on_signals("outside"):  # noqa: PT012
        try:
            with raise_on_signals("inside"):
                importlib.import_module("broken_module")
        except ImportError:
            raise AssertionError("the signal was lost") from None
        raise AssertionError("the signal was lost")


def test_a_signal_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "signalled_module.py").write_text(
        "import signal\nsignal.raise_signal(signal.SIGTERM)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # or it is sent again before the inner block begins, on a machine that is busy just then
    monkeypatch.setattr(signals, "RESEND_SECONDS", 1e6)
    told = list[str]()
    with raise_on_signals("outside"):
        with pytest.raises(RunInterruptedError, match="inside"):  # noqa: PT012
            importlib.import_module("signalled_module")
            with raise_on_signals("inside"):
                told.append("inside")
        told.append("outside")
    assert told == ["inside", "outside"]


def test_what_came_before_an_error_is_told_where_nobody_else_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default of SIGTERM would end this process."""
    (tmp_path / "another_module.py").write_text(
        "import signal\nsignal.raise_signal(signal.SIGTERM)\nraise ImportError\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(RunInterruptedError), raise_on_signals("outside"):
        importlib.import_module("another_module")
