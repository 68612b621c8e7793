"""process.json of a run directory: which process is at work there, or how the last one ended.
`train/monitoring/process.py` writes it.

    process = read_process(Path("runs/people"))
    if process is not None and is_process_alive(process, Path("runs/people")): ...

A process is known by its number, its time of birth (numbers are used again), its machine, and the
directory's own number: the copy of a run is not at work.
"""

from __future__ import annotations

import errno
import os
import platform
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from lorry.disk import documents
from lorry.disk.durable import DiskError
from lorry.errors import ConfigError, RunFilesError
from lorry.runs.closeable import CloseableResource
from lorry.runs.layout import PROCESS

# seconds by which a time of birth may differ when it is asked again: it follows the clock of the
# machine
CLOCK_SLACK = 10.0


@dataclass(frozen=True)
class ProcessEnding:
    """How a process ended that did not finish: when (UTC, ISO), with which exit code, and why."""

    at: str
    exit_code: int
    reason: str


@dataclass(frozen=True)
class RunProcess:
    """What process.json holds. ``born``: seconds since 1970, by psutil; ``folder``: device and
    inode of the run directory; ``begun``: when training began (None: loading and reading);
    ``done``: steps of ``total_steps`` that were behind it then.
    """

    pid: int
    born: float
    host: str
    folder: list[int]
    command: list[str]
    started: str
    begun: str | None = None
    done: int = 0
    total_steps: int | None = None
    ended: ProcessEnding | None = None


def read_process(run_dir: Path) -> RunProcess | None:
    """The run's process.json, or None where there is none. Raises DataError naming file and line of
    one that is damaged.
    """
    path = run_dir / PROCESS
    try:
        document = documents.read_json_document(path)
    except FileNotFoundError:
        return None
    process = _process_from_json(document)
    if process is None:
        raise RunFilesError(
            f"{path}:1: this was not written by a run; move it away if no run is "
            f"going on in {run_dir}"
        )
    return process


def _process_from_json(document: Any) -> RunProcess | None:
    """A process from its JSON, or None where that holds something else."""
    try:
        # unknown keys are TypeErrors of the constructors: the fields are listed once
        ended = ProcessEnding(**document["ended"]) if document["ended"] is not None else None
        process = RunProcess(**{**document, "ended": ended})
        times = [
            process.started,
            *(at for at in (process.begun, ended.at if ended else None) if at is not None),
        ]
        whole = [
            process.pid,
            process.done,
            process.total_steps or 0,
            ended.exit_code if ended else 0,
        ]
        # type, not isinstance: true is an int in Python
        sound = all(datetime.fromisoformat(at).tzinfo for at in times) and all(
            type(n) is int and abs(n) < 2**31 for n in whole
        )
        words = [process.host, *process.command, *((ended.at, ended.reason) if ended else ())]
        sound = (
            sound
            and process.pid > 0
            and type(process.born) in (int, float)
            and all(type(w) is str for w in words)
        )
        sound = (
            sound
            and type(process.command) is list
            and [type(n) for n in process.folder] == [int, int]
        )
    except (TypeError, ValueError, KeyError):
        return None
    return process if sound else None


def is_process_alive(process: RunProcess, run_dir: Path) -> bool | None:
    """Whether a process is at work in this directory; None: it belongs to another machine, which
    cannot be asked from here.
    """
    # a copied directory has another inode: the process is at work in the original
    if process.ended is not None or process.folder != directory_identity(run_dir):
        return False
    if process.host != platform.node():
        return None
    try:
        other = psutil.Process(process.pid)
        return (
            # a zombie has ended, and its parent has not looked yet
            other.status() != psutil.STATUS_ZOMBIE
            and abs(other.create_time() - process.born) < CLOCK_SLACK
        )
    except psutil.NoSuchProcess:
        return False


def refuse_second(run_dir: Path) -> None:
    """Raises ConfigError, naming the process, where one is at work in the directory."""
    process = read_process(run_dir)
    if process is not None and is_process_alive(process, run_dir) and process.pid != os.getpid():
        raise ConfigError(
            f"{run_dir} is in use: process {process.pid} has been running there "
            f"since {process.started}; use another output_dir, or stop it (kill "
            f"-TERM {process.pid}: it saves and ends)"
        )


class RunDirectoryGoneError(DiskError):
    """The directory a run is at work in was moved, removed or replaced."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class RunDirectoryHandle(CloseableResource):
    """A run directory held open, so that a run knows when its name has come to mean nothing, or
    another directory.

    A run never makes its directory again: half of it would lie under the old name, and the other
    half wherever somebody moved it. Raises DiskError where it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise DiskError(error.errno, error.strerror, str(path)) from error

    def is_there(self) -> bool:
        """Whether the name still means this directory. A disk that does not say (EIO, ESTALE,
        EACCES) has not said no: one such answer ends no run, and if it lasts, the next write fails
        with what the disk says.
        """
        try:
            here, there = os.fstat(self._held), os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)

    def check(self) -> None:
        """Raises RunDirectoryGoneError, saying where the directory is now if the system knows,
        unless it is there.
        """
        if self.is_there():
            return
        now = self.now()
        go_on = (
            f"it is now {now}, and output_dir={now} resume_from_checkpoint=auto "
            "continues from its newest checkpoint"
        )
        what = (
            "the run directory was moved, removed or replaced while the run was "
            "writing to it; the run stopped"
        )
        raise RunDirectoryGoneError(
            errno.ENOENT,
            f"{what}; {go_on if now else 'nothing was written in its place'}",
            str(self.path),
        )

    def now(self) -> Path | None:
        """Where the directory is now; None where it was removed, or on a system that does not say
        (Linux does).
        """
        try:
            # the kernel keeps an open directory's name up to date, with "(deleted)" once it is
            path = Path(os.readlink(f"/proc/self/fd/{self._held}"))
            here, there = os.fstat(self._held), os.stat(path)
        except OSError:
            return None
        return path if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino) else None

    def close(self) -> None:
        """Let it go."""
        os.close(self._held)


def directory_identity(run_dir: Path) -> list[int]:
    """Device and inode of a directory: its name may change, and a copy has another."""
    status = os.stat(run_dir)
    return [status.st_dev, status.st_ino]
