"""Fault injection: make the n-th call that changes the disk kill the process, fail, or write too
little; or cut the power.

    for run in kill_points(tmp_path, lambda n: FaultyDisk(n, kill), work):
        ...  # run.folder is what the killed child left behind, run.said what it had reached

``work(folder, say)`` runs in a forked child whose ``durable.disk`` is the faulty one, once for
every n until nothing fires. A kill loses no data that reached the kernel, so it says nothing about
fsync. ``PowerCut`` does: it keeps account of what was never made durable and takes it away, in the
way least kind to the writer, before it kills.
"""

from __future__ import annotations

import errno
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from lorry.disk import durable

Fault = Callable[["FaultyDisk", str, tuple[Any, ...]], Any]
Say = Callable[[int], object]
# they change nothing, so that no disaster is tried before each of them
READS = (
    "lstat",
    "open_to_read",
    "read",
)
CALLS = tuple(
    name for name in vars(durable.DiskCalls) if not name.startswith("_") and name not in READS
)


class QuietDisk(durable.DiskCalls):
    """No fsync: nothing here outlives the machine."""

    def fsync(self, fd: int) -> None:
        pass

    def fsync_dir(self, path: Path) -> None:
        pass


class FaultyDisk(durable.DiskCalls):
    """A disk that counts its calls, keeps a trace of them, and lets ``fault`` answer call number
    ``at`` (from 1).

    It makes no fsync: nothing here outlives the machine. ``tick`` counts any other event (a
    compilation, a step) as a call, so that a test can kill there too.
    """

    def __init__(self, at: int = 0, fault: Fault | None = None) -> None:
        self.at, self.fault = at, fault
        self.calls = 0
        self.trace: list[tuple[str, str]] = []
        self.paths: dict[int, Path] = {}

    def tick(self, kind: str, *args: Any) -> Any:
        """Count one call of ``kind`` and make it, unless it is the one that fails."""
        self.calls += 1
        self.trace.append((kind, str(self.path_of(kind, args))))
        if self.calls == self.at and self.fault:
            return self.fault(self, kind, args)
        return self.make(kind, *args)

    def make(self, kind: str, *args: Any) -> Any:
        """The call itself."""
        if kind not in CALLS or kind.startswith("fsync"):
            return None
        result = getattr(durable.DiskCalls, kind)(self, *args)
        if kind in ("create", "open"):
            self.paths[result] = args[0]
        return result

    def path_of(self, kind: str, args: tuple[Any, ...]) -> Path | str:
        """What a call is about: the path of its file descriptor, the new name of a rename."""
        if not args:
            return ""
        return self.paths[args[0]] if isinstance(args[0], int) else args[-1]


def _counted(kind: str) -> Callable[..., Any]:
    return lambda self, *args: self.tick(kind, *args)


for _kind in CALLS:
    setattr(FaultyDisk, _kind, _counted(_kind))


class UnreadableDisk(durable.DiskCalls):
    """A disk whose read number ``at`` (from 1) fails with ``code``, once; ``kinds`` keeps the
    trace. Writes are as ever.

    ``below``: count only reads of paths that contain this text.
    """

    def __init__(self, at: int, code: int, below: str = "") -> None:
        self.at, self.code, self.below = at, code, below
        self.calls = 0
        self.trace: list[tuple[str, str]] = []
        self.paths: dict[int, Path] = {}

    def tick(self, kind: str, *args: Any) -> Any:
        """Make one reading call, unless it is the one that fails."""
        path = self.paths.get(args[0], Path()) if isinstance(args[0], int) else args[0]
        if self.below in str(path):
            self.calls += 1
            self.trace.append((kind, str(path)))
            if self.calls == self.at:
                raise OSError(self.code, os.strerror(self.code))
        result = getattr(durable.DiskCalls, kind)(self, *args)
        if kind == "open_to_read":
            self.paths[result] = path
        return result


for _kind in READS:
    setattr(UnreadableDisk, _kind, _counted(_kind))


def die() -> None:
    """kill -9 of this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill(disk: FaultyDisk, kind: str, args: tuple[Any, ...]) -> None:
    """SIGKILL before the call; in the middle of it, if it is a write."""
    if kind == "write":
        disk.make(kind, args[0], args[1][: len(args[1]) // 2])
    die()


def failing(code: int) -> Fault:
    """The call fails with this errno; half of a write gets through, a close closes."""

    def fault(disk: FaultyDisk, kind: str, args: tuple[Any, ...]) -> None:
        if kind == "write":
            disk.make(kind, args[0], args[1][: len(args[1]) // 2])
        if kind == "close":
            disk.make(kind, *args)
        raise OSError(code, os.strerror(code))

    return fault


def breaking(disk: FaultyDisk, kind: str, args: tuple[Any, ...]) -> None:
    """This call and every later one fail: the disk is gone, and cleaning up fails too."""
    disk.at += 1
    failing(errno.EIO)(disk, kind, args)


def short(disk: FaultyDisk, kind: str, args: tuple[Any, ...]) -> Any:
    """A write takes one byte only and says so, as POSIX lets it; other calls succeed."""
    return disk.make(kind, args[0], args[1][:1]) if kind == "write" else disk.make(kind, *args)


@dataclass
class Change:
    """A name in a directory that is not durable yet, and how to take it back."""

    kind: str
    path: Path
    old: Path | None = None
    replaced: bytes | None = None


@dataclass
class Account:
    """What a crash of the machine would lose: contents never fsynced, names whose directory was
    never fsynced.
    """

    dirty: set[Path] = field(default_factory=set)
    names: list[Change] = field(default_factory=list)

    def record(self, kind: str, args: tuple[Any, ...], path: Path) -> None:
        if kind in ("write", "truncate"):
            self.dirty.add(path)
        elif kind == "fsync":
            self.dirty.discard(path)
        elif kind == "fsync_dir":
            self.names = [
                c for c in self.names if path not in (c.path.parent, c.old and c.old.parent)
            ]
        elif kind in ("create", "mkdir"):
            self.names.append(Change(kind, path))
        elif kind in ("unlink", "rmdir"):
            self.dirty.discard(path)
            self.names = [c for c in self.names if c.path != path]

    def rename(self, old: Path, new: Path) -> None:
        """Before a rename: remember what it replaces, and follow the files below it to their new
        place.
        """
        replaced = new.read_bytes() if new.is_file() else None
        self.dirty = {moved(p, old, new) for p in self.dirty}
        for change in self.names:
            change.path = moved(change.path, old, new)
        self.names.append(Change("rename", new, old, replaced))

    def lose_data(self) -> None:
        """The names survive, half of each file's contents does not."""
        for path in self.dirty:
            if path.is_file():
                os.truncate(path, path.stat().st_size // 2)

    def lose_names(self) -> None:
        """Take back every change of a name that was not made durable, the last first; removals
        stay.
        """
        while self.names:
            change = self.names.pop()
            if change.old is not None and change.path.exists():
                os.rename(change.path, change.old)
                self.dirty = {moved(p, change.path, change.old) for p in self.dirty}
                for earlier in self.names:
                    earlier.path = moved(earlier.path, change.path, change.old)
                if change.replaced is not None:
                    change.path.write_bytes(change.replaced)
            elif change.path.is_dir():
                remove_tree(change.path)
            elif change.path.exists():
                os.unlink(change.path)


class PowerCut(FaultyDisk):
    """A disk that dies with its machine before call ``at``: unsynced ``data``, unsynced ``names``,
    or both are lost.
    """

    def __init__(self, at: int = 0, *, data: bool = False, names: bool = False) -> None:
        super().__init__(at, lambda _, kind, args: self.cut())
        self.data, self.names = data, names
        self.account = Account()

    def make(self, kind: str, *args: Any) -> Any:
        if kind == "rename":
            self.account.rename(*args)
        path = Path(self.path_of(kind, args)) if args else Path()
        result = super().make(kind, *args)
        self.account.record(kind, args, path)
        return result

    def cut(self) -> None:
        """Lose it and die."""
        if self.names:
            self.account.lose_names()
        if self.data:
            self.account.lose_data()
        die()


def moved(path: Path, old: Path, new: Path) -> Path:
    """Where a path lies after ``old`` was renamed to ``new``."""
    return new / path.relative_to(old) if path.is_relative_to(old) else path


def remove_tree(path: Path) -> None:
    for entry in path.iterdir():
        remove_tree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    path.rmdir()


@dataclass(frozen=True)
class Outcome:
    """How a child ended: killed, or failed with ``error`` (a traceback), or neither; and what it
    said with ``say``.
    """

    folder: Path
    at: int
    killed: bool
    error: str
    said: bytes


def run_forked(work: Callable[[Path, Say], None], disk: FaultyDisk, folder: Path) -> Outcome:
    """Run ``work(folder, say)`` in a forked child on this disk. ``say(byte)`` reaches the parent
    although the child is killed.
    """
    (said_in, said_out), (error_in, error_out) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            durable.disk = disk
            work(folder, lambda byte: os.write(said_out, bytes([byte])))
            code = 0
        finally:
            if code:
                os.write(error_out, traceback.format_exc().encode()[-4000:])
            os._exit(code)
    os.close(said_out)
    os.close(error_out)
    with open(said_in, "rb") as said, open(error_in, "rb") as error:
        outcome = said.read(), error.read().decode()
    status = os.waitpid(child, 0)[1]
    return Outcome(
        folder,
        disk.at,
        os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        outcome[1],
        outcome[0],
    )


def kill_points(
    root: Path, make_disk: Callable[[int], FaultyDisk], work: Callable[[Path, Say], None]
) -> Iterator[Outcome]:
    """``work(folder, say)`` in a new folder for n = 1, 2, ... until it gets through unharmed; that
    last run is yielded too.
    """
    for n in count(1):
        folder = root / f"{n:04d}"
        folder.mkdir()
        outcome = run_forked(work, make_disk(n), folder)
        yield outcome
        if not outcome.killed and not outcome.error:
            return
