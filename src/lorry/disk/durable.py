"""Files and directories that are whole or absent, whatever kills the process or fills the disk.

Everything is built beside its place, made durable, and renamed into it; a manifest of SHA-256
digests can be written last. Every call that changes the disk goes through ``disk``, one small
object, so that a test can fail any of them.

    write_files(run, {"adapter_config.json": config, "adapter_model.safetensors": weights})
    write_directory(Path("out"), {"state.safetensors": parts, "meta.json": text}, manifest=True)
    with build_directory(Path("merged")) as folder:
        model.save_pretrained(folder)

One writer per target at a time: what an earlier, killed writer left beside it is put right by the
next one. POSIX only (a directory is made durable through its file descriptor).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lorry.disk import manifest as manifests
from lorry.errors import ConfigError, LorryError, ModelError

FileContent = bytes | Iterable[bytes | memoryview]

# ".lorry" in the name, since what matches is removed: other programs name their files
# x.old-2024-0badcafe as well
_LEFTOVER = re.compile(r"(?P<name>.+)\.(?P<kind>tmp|old|gone)\.lorry-\d+-[0-9a-f]{8}")


class DiskError(LorryError, OSError):
    """The disk refused a write or a read; ``errno`` and ``filename`` say which and where. What was
    complete before still is.
    """

    exit_code = 74  # EX_IOERR of sysexits.h

    def __str__(self) -> str:
        return (
            f"{self.filename}: {self.strerror}; complete files were not changed; repair "
            "the disk and run again"
        )


class DiskCalls:
    """Every call of Lorry that changes the disk, one method each, and those that read what is
    verified (integrity.py); tests put a failing one in ``durable.disk``."""

    def lstat(self, path: Path) -> os.stat_result:
        return os.lstat(path)

    def open_to_read(self, path: Path) -> int:
        # O_NONBLOCK waits for nobody at a FIFO
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def read(self, fd: int, size: int) -> bytes:
        return os.read(fd, size)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def create(self, path: Path) -> int:
        # O_EXCL: neither a file of somebody else nor what a link points to is ever written into
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def open(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def fsync_dir(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as e:
            # some network mounts cannot, and order their names themselves
            if e.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)


disk = DiskCalls()


def write_files(directory: Path, files: Mapping[str, FileContent]) -> None:
    """Put files into an existing directory, replacing what has their names: all are durable before
    the first rename.

    A full disk therefore leaves the old files; only a kill between two renames can leave one old
    and one new. Raises DiskError.
    """
    directory = Path(os.path.abspath(directory))
    for name in files:
        recover_writes(directory, name)
    staged = {name: _temporary_path(directory / name, "tmp") for name in files}
    with _name_path_in_errors(directory), _discard_on_error(*staged.values()):
        for name, content in files.items():
            _create_file(staged[name], content)
        # only renames are left, and a rename needs no space: a full disk has failed above
        for name, temp in staged.items():
            disk.rename(temp, directory / name)
        # a name is content of its directory: without this a power cut may undo the rename
        disk.fsync_dir(directory)


def write_directory(
    target: Path, files: Mapping[str, FileContent], *, manifest: bool = False, replace: bool = False
) -> None:
    """Write a directory of files at once; with ``manifest`` a list of their sizes and digests is
    written last.

    Raises what ``build_directory`` raises.
    """
    with _replace_directory(target, replace) as folder:
        entries = {name: _create_file(folder / name, content) for name, content in files.items()}
        if manifest:
            _create_file(folder / manifests.MANIFEST_NAME, manifests.encode_manifest(entries))


@contextmanager
def build_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill that becomes ``target``, durable and whole, on leaving, and is removed on an
    error.

    With ``replace`` an existing target is renamed aside, and removed only once the new one is in
    place; a kill between the two renames is undone by the next ``recover_writes``. Raises
    ConfigError when the target holds something and ``replace`` is false, and DiskError.
    """
    with _replace_directory(target, replace) as folder:
        yield folder
        for path in sorted(folder.rglob("*")):
            # what a link points to is not ours to open
            if path.is_file() and not path.is_symlink():
                with _name_path_in_errors(path), _open_descriptor(path) as fd:
                    disk.fsync(fd)


@contextmanager
def scratch_directory(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` for files on their way, gone afterwards. That it cannot be removed
    is no error: the next `recover_writes` does it. Raises DiskError, also for what the body's own
    calls of the disk raise.
    """
    temp = _temporary_path(path, "tmp")
    with _name_path_in_errors(path):
        disk.mkdir(temp)
        try:
            yield temp
        finally:
            _remove_if_possible(temp)


def make_directory(path: Path, *, parents: bool = True) -> None:
    """Create a directory and, unless ``parents`` is false, those it lies in, durably; an existing
    one is left alone.

    Raises DiskError, also for a name that the file system cannot hold.
    """
    with _name_path_in_errors(path):
        if os.path.isdir(path):
            return
        if parents:
            # from the top down, so that each new name is durable before something lies under it
            make_directory(path.parent)
        disk.mkdir(path)
        disk.fsync_dir(path.parent)


def remove_directory(path: Path) -> None:
    """Remove a tree that must never be seen half removed: it loses its name first, durably, lest a
    power cut give the name back to what is left. Raises DiskError."""
    with _name_path_in_errors(path):
        gone = _temporary_path(path, "gone")
        disk.rename(path, gone)
        disk.fsync_dir(path.parent)
        _remove_tree(gone)


def rename_path(old: Path, new: Path) -> None:
    """Give a file or a directory another name, durably. Raises DiskError."""
    with _name_path_in_errors(old):
        disk.rename(old, new)
        for parent in dict.fromkeys((old.parent, new.parent)):
            disk.fsync_dir(parent)


def recover_writes(parent: Path, name: str | None = None) -> None:
    """Put right what a killed writer left in ``parent``, for one target or for all: bring an old
    one back whose replacement never arrived, and remove the rest. Raises DiskError."""
    with _name_path_in_errors(parent):
        for entry in sorted(os.listdir(parent)):
            leftover = _LEFTOVER.fullmatch(entry)
            if leftover is None or name not in (None, leftover["name"]):
                continue
            # the kill came between the two renames of `_move_in`: the old one is the only whole one
            if leftover["kind"] == "old" and not os.path.lexists(parent / leftover["name"]):
                disk.rename(parent / entry, parent / leftover["name"])
                disk.fsync_dir(parent)
            else:
                _remove_tree(parent / entry)


def replaced_name(entry: str) -> str | None:
    """The name a directory entry had before a replacement set it aside, or None for any other
    entry.
    """
    leftover = _LEFTOVER.fullmatch(entry)
    return leftover["name"] if leftover and leftover["kind"] == "old" else None


def sync_file(path: Path) -> int:
    """Make a growing file (a log) durable as far as it goes; returns its size in bytes, 0 if
    absent. Raises DiskError.
    """
    if not path.exists():
        return 0
    with _name_path_in_errors(path), _open_descriptor(path) as fd:
        disk.fsync(fd)
        disk.fsync_dir(path.parent)
        # of the open file, after its fsync: this many bytes are on the disk
        return os.fstat(fd).st_size


def truncate_file(path: Path, size: int) -> None:
    """Cut a growing file back to a size that ``sync_file`` returned. Raises DiskError, or
    ModelError when it is shorter.
    """
    size_now = path.stat().st_size if path.exists() else 0
    if size_now < size:
        raise ModelError(
            f"{path}: {size_now} bytes, but {size} when the checkpoint was written; restore it or start a new run"
        )
    if size_now > size:
        with _name_path_in_errors(path), _open_descriptor(path) as fd:
            disk.truncate(fd, size)
            disk.fsync(fd)


@contextmanager
def _name_path_in_errors(path: Path) -> Iterator[None]:
    """Name the place in an error of the disk; a call on a file descriptor knows none."""
    try:
        yield
    except DiskError:
        raise
    except OSError as e:
        raise DiskError(e.errno, e.strerror, str(e.filename or path)) from e


@contextmanager
def _discard_on_error(*temps: Path) -> Iterator[None]:
    """Remove temporary files or folders when the block fails. The failure is what matters: one of
    the removal is let go, the next writer clears up."""
    with contextlib.ExitStack() as stack:
        for temp in temps:
            stack.callback(_remove_if_possible, temp)
        yield
        # only reached without an error: then nothing is to be removed
        stack.pop_all()


@contextmanager
def _open_descriptor(path: Path) -> Iterator[int]:
    fd = disk.open(path)
    try:
        yield fd
    finally:
        disk.close(fd)


def _temporary_path(target: Path, kind: str) -> Path:
    # beside the target: a rename cannot cross file systems
    return target.with_name(f"{target.name}.{kind}.lorry-{os.getpid()}-{secrets.token_hex(4)}")


def _create_file(path: Path, content: FileContent) -> manifests.ManifestEntry:
    """Create, fill and fsync one file; returns its manifest entry, digested from memory and not
    from what the disk kept.
    """
    digest, size = hashlib.sha256(), 0
    with _name_path_in_errors(path):
        fd = disk.create(path)
        try:
            for part in [content] if isinstance(content, bytes) else content:
                # a view, since write() may take a part only and weights are not to be copied for
                # the rest
                rest = memoryview(part)
                digest.update(rest)
                size += len(rest)
                while rest:
                    rest = rest[disk.write(fd, rest) :]
            disk.fsync(fd)
        finally:
            disk.close(fd)
    return manifests.ManifestEntry(bytes=size, sha256=digest.hexdigest())


@contextmanager
def _replace_directory(target: Path, replace: bool) -> Iterator[Path]:
    """``build_directory`` for a body that makes its own files durable."""
    target = Path(os.path.abspath(target))
    make_directory(target.parent)
    recover_writes(target.parent, target.name)
    if not replace and os.path.lexists(target) and not (target.is_dir() and not os.listdir(target)):
        raise _target_exists_error(target)
    temp = _temporary_path(target, "tmp")
    with _discard_on_error(temp):
        with _name_path_in_errors(target):
            disk.mkdir(temp)
        yield temp
        with _name_path_in_errors(target):
            # the deepest first: a folder is durable once the names in it are
            for folder, _, _ in os.walk(temp, topdown=False):
                disk.fsync_dir(Path(folder))
            if replace:
                _move_in(temp, target)
            else:
                _move_to_free(temp, target)


def _target_exists_error(target: Path) -> ConfigError:
    return ConfigError(
        f"{target} already exists and is not empty; choose another path or remove it first"
    )


def _move_to_free(temp: Path, target: Path) -> None:
    """Into a place that is absent or an empty folder; what somebody put there meanwhile stays, and
    is a ConfigError.
    """
    try:
        disk.rename(temp, target)
    except OSError as e:
        # rename() itself is the test, so nobody can put something there between a look and the move
        if e.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _target_exists_error(target) from None
        raise
    disk.fsync_dir(target.parent)


def _move_in(temp: Path, target: Path) -> None:
    replaced = _temporary_path(target, "old") if os.path.lexists(target) else None
    if replaced:
        disk.rename(target, replaced)
    try:
        disk.rename(temp, target)
    except OSError:
        if replaced:
            disk.rename(replaced, target)
        raise
    disk.fsync_dir(target.parent)
    if replaced:
        _remove_tree(replaced)


def _remove_tree(path: Path) -> None:
    """Remove a file, a link (never what it points to) or a tree."""
    if path.is_symlink() or not path.is_dir():
        disk.unlink(path)
        return
    # sorted, so that a test that fails the n-th call fails the same one everywhere
    for entry in sorted(path.iterdir()):
        _remove_tree(entry)
    disk.rmdir(path)


def _remove_if_possible(path: Path) -> None:
    with contextlib.suppress(OSError):
        if os.path.lexists(path):
            _remove_tree(path)
