"""The workers of a command on this machine: `lorry sft CONFIG backend=ddp backend.processes=2` is
this process, which trains nothing, and two of torch's elastic launcher, which run the same command
with RANK, WORLD_SIZE and MASTER_ADDR set.

This process keeps the store by which they find each other (its port is the system's choice, so none
can be in use, and it outlives rank 0), hands on the signals that it gets, and when one worker fails
ends the others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    SubprocessContext,
    start_processes,
)

from lorry.plan.machine import available_threads
from lorry.visible import make_visible

LOCALHOST = "127.0.0.1"
POLL_SECONDS = 0.1
# what asks a run to stop, or to save: the workers answer, as they would alone
HANDED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)
# the ends that have another cause than the worker itself
ENDED_BY_LAUNCHER = (-signal.SIGTERM, -signal.SIGKILL)
# torch's launcher logs there each worker that it ends: behind an error of eight, eight lines that
# say no more than the error did
logging.getLogger(SubprocessContext.__module__).setLevel(logging.CRITICAL)


def run_workers(words: Sequence[str], processes: int) -> int:
    """Run ``lorry WORDS`` in so many processes; their exit code: 0 where all succeeded, else that
    of rank 0 unless another one was ended by a signal."""
    store = open_store()
    with _handing_on() as workers:
        context = start_processes(
            "lorry",
            sys.executable,
            args=dict.fromkeys(range(processes), ("-m", "lorry", *words)),
            envs=worker_environments(processes, store.port),
            # their output is this command's
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        )
        assert isinstance(context, SubprocessContext)  # of an executable, not of a function
        workers.begin(list(context.pids().values()))
        first = dict[int, int]()
        try:
            while True:
                # asked before `wait`, which on a failure ends the others, and waits 30 seconds for
                # them
                first = first or _failed_workers(context)
                if (result := context.wait(timeout=0)) is not None:
                    break
                time.sleep(POLL_SECONDS)
        finally:
            context.close(signal.SIGTERM)
    failures = {rank: failure.exitcode for rank, failure in result.failures.items()}
    return _exit_code(first, failures)


def open_store() -> TCPStore:
    """A store of this process's, for workers on this machine, at a port that the system chooses."""
    return TCPStore(LOCALHOST, 0, is_master=True, wait_for_workers=False)


def worker_environments(processes: int, port: int) -> dict[int, dict[str, str]]:
    """By rank, what each worker's environment says besides this process's. ``port``: of
    the store."""
    threads = str(max(1, available_threads() // processes))
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": LOCALHOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        # cores divided: with all of them each, workers wait for each other's threads
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
    }
    return {
        rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)
    }


class _Workers:
    """The processes that signals go to; what arrives before there are any, they get at once."""

    def __init__(self) -> None:
        self.pids, self.waiting = list[int](), list[int]()

    def begin(self, pids: list[int]) -> None:
        self.pids = pids
        for number in self.waiting:
            self.hand_on(number, None)

    def hand_on(self, number: int, frame: FrameType | None) -> None:
        if not self.pids:
            self.waiting.append(number)
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@contextlib.contextmanager
def _handing_on() -> Iterator[_Workers]:
    workers, before = _Workers(), dict[signal.Signals, Any]()
    # the launcher would install handlers of its own, which end the workers after 30 seconds
    name = "TORCHELASTIC_SIGNALS_TO_HANDLE"
    handled_before = os.environ.get(name)
    os.environ[name] = "SIGQUIT"
    try:
        for number in HANDED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, workers.hand_on)
        yield workers
    finally:
        for watched, handler in before.items():
            signal.signal(watched, handler)
        if handled_before is None:
            del os.environ[name]
        else:
            os.environ[name] = handled_before


def _failed_workers(context: SubprocessContext) -> dict[int, int]:
    """{rank: exit code} of those that have ended with another than 0."""
    codes = {rank: worker.proc.poll() for rank, worker in context.subprocess_handlers.items()}
    return {rank: code for rank, code in codes.items() if code}


def _exit_code(first: Mapping[int, int], failures: Mapping[int, int]) -> int:
    """One exit code of those that were not 0, by rank; a worker that a signal ended is named,
    unless another explains the end. ``first``: those that had failed when that was noticed; later
    ones the launcher may have ended.
    """
    own = {rank: code for rank, code in failures.items() if code not in ENDED_BY_LAUNCHER}
    causes = first or own or failures
    for rank, code in sorted(causes.items()):
        if code < 0:
            name = signal.Signals(-code).name
            print(f"rank {rank} was ended by {make_visible(name)}", file=sys.stderr)
    codes = [code for each in (causes, failures) for _, code in sorted(each.items()) if code > 0]
    return codes[0] if codes else int(bool(failures))
