"""Say in RUN/process.json that this process is at work there, and how it ended: for `lorry runs`,
and for a second start.

    with record_process(Path("runs/people")) as process:  # refused while another one is at work there
        ...                                        # load, attach, read
        process.begin(done=0, total=200)
        ...                                        # train, write

The file (runs/process.py) is there while a run goes. A run that finished takes it away; one that
stopped or failed leaves it with ``ended``, and one that was killed leaves it as it was. No torch
here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from lorry.disk import durable
from lorry.disk.secret_shapes import mask_secrets, names_secret
from lorry.errors import ConfigError, LorryError
from lorry.runs.layout import CHECKPOINTS, PROCESS, RECEIPT, RUN_FILE
from lorry.runs.process import (
    ProcessEnding,
    RunDirectoryHandle,
    RunProcess,
    directory_identity,
    refuse_second,
)
from lorry.streams import after_last_line
from lorry.train.monitoring.signals import raise_on_signals

LOG_FILE = "log.txt"  # what a run in the background says
RUN_FILES = (RUN_FILE, RECEIPT, CHECKPOINTS)  # any of them: the directory holds a run that began
MAX_REASON_LENGTH = 2000


class RunProcessRecorder:
    """This process at work in a run directory (see `record_process`)."""

    def __init__(self, run_dir: Path, home: RunDirectoryHandle) -> None:
        self.run_dir, self.path, self.home = run_dir, run_dir / PROCESS, home
        # of the last life, put back where this one fails before it touched anything
        self.before = self.path.read_bytes() if self.path.is_file() else None
        # a process number is used again after its process; with its birth it is one process only
        born = psutil.Process().create_time()
        self.process = RunProcess(
            os.getpid(),
            born,
            platform.node(),
            directory_identity(run_dir),
            redact_secrets(sys.argv),
            _utc_now(),
        )
        self._write(self.process)

    def begin(self, done: int, total: int) -> None:
        """Everything is read and training begins, ``done`` of ``total`` steps being behind. Raises
        DiskError.
        """
        self.process = replace(self.process, begun=_utc_now(), done=done, total_steps=total)
        self._write(self.process)

    def finish(self) -> None:
        """The run is complete: nothing is at work here any more. Raises DiskError, also where the
        directory has moved away.
        """
        self.home.check()
        # last of all: whoever waits for the run's end must find its log complete
        after_last_line(self._remove)

    def fail(self, error: BaseException) -> None:
        """Record how it ended. What went wrong before training touched anything leaves no trace in
        a directory: it is not the end of a run that was there already, nor the business of other
        files. Only a log (of a run in the background) is told of.
        """
        # where it is now it says what happened to it; in its place nothing is written
        if not self.home.is_there():
            moved = self.home.now()
            if moved is None:
                return
            self.run_dir, self.path = moved, moved / PROCESS
        if self.process.begun is None:
            if self.before is not None:
                durable.write_files(self.run_dir, {PROCESS: self.before})
                return
            if not (self.run_dir / LOG_FILE).exists() or any(
                (self.run_dir / name).exists() for name in RUN_FILES
            ):
                self._remove()
                return
        reason = (
            str(error)
            if isinstance(error, LorryError)
            else f"{type(error).__name__}: {error}".removesuffix(": ")
        )
        ended = replace(
            self.process,
            ended=ProcessEnding(_utc_now(), exit_code_for(error), reason[:MAX_REASON_LENGTH]),
        )
        after_last_line(lambda: self._write(ended))

    def _write(self, process: RunProcess) -> None:
        durable.write_files(
            self.run_dir, {PROCESS: (json.dumps(asdict(process), indent=1) + "\n").encode()}
        )

    def _remove(self) -> None:
        try:
            with contextlib.suppress(FileNotFoundError):  # somebody was quicker
                durable.disk.unlink(self.path)
            durable.disk.fsync_dir(self.run_dir)
        except OSError as error:
            # with the path: the system's own text names none after fsync
            raise durable.DiskError(error.errno, error.strerror, str(self.path)) from error


@contextlib.contextmanager
def record_process(run_dir: Path) -> Iterator[RunProcessRecorder]:
    """Say that this process is at work in ``run_dir`` (made if absent) while the block runs, and
    afterwards how it ended.

    SIGTERM and SIGHUP, which would end it without a word, become Interrupted (the training loop has
    its own way with them). Raises ConfigError when another process is at work there, and DiskError.
    """
    is_new = not os.path.isdir(run_dir)
    durable.make_directory(run_dir)
    # the lock outermost: it is held until process.json says how this process ended
    with _directory_lock(run_dir), raise_on_signals(), RunDirectoryHandle(run_dir) as home:
        here = RunProcessRecorder(run_dir, home)
        try:
            yield here
        except BaseException as error:
            # the error itself is what matters, also where the disk takes no more
            with contextlib.suppress(OSError):
                here.fail(error)
                # a directory that we made and left empty is no trace worth keeping
                if is_new and home.is_there() and not os.listdir(run_dir):
                    durable.disk.rmdir(run_dir)
            raise
        here.finish()


@contextlib.contextmanager
def _directory_lock(run_dir: Path) -> Iterator[None]:
    """Hold the directory's lock: of two that start at the same moment one is refused. The kernel
    frees it, however we end.
    """
    # process.json first: it names the process, which a lock cannot
    refuse_second(run_dir)
    folder = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{run_dir} is in use: another process has just begun there; use another output_dir"
            ) from None
        except OSError:
            pass  # a file system without locks: process.json alone has to do
        yield
    finally:
        os.close(folder)


def exit_code_for(error: BaseException) -> int:
    """The exit code that the command line ends with on this error."""
    if isinstance(error, LorryError):
        return error.exit_code
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def redact_secrets(words: Sequence[str]) -> list[str]:
    """A command line to keep: *** for what a token or password is set to, and for what looks like
    one.
    """
    redacted, hide = list[str](), False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = names_secret(name)
        redacted.append(
            "***" if hide else f"{name}=***" if secret and equals else mask_secrets(word)
        )
        # "--token VALUE": the secret is the next word
        hide = secret and not equals and word.startswith("--")
    return redacted


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
