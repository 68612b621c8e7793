"""Verifying a directory against its manifest: whole and unaltered, damaged, or not readable now.

    names = verify_directory(Path("checkpoints/step-00000120"))

Two answers must never be mixed up. **Damaged** is what was read and is not what was written:
ModelError, and the caller may go on without it. **Unreadable** is a disk that did not answer (EIO,
a stale network mount, no permission): DiskError, exit code 74. It says nothing about what is
stored, the next try may succeed, and so nobody may skip, set aside or replace what could not be
read. Only the absence of a file (ENOENT, or a file where its directory should be) is damage.

Everything is read through ``durable.disk``, so that tests can make any read fail.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorry.disk import durable
from lorry.disk.documents import parse_json
from lorry.disk.manifest import MANIFEST_NAME, ManifestEntry, encode_manifest
from lorry.errors import ModelError

BLOCK_BYTES = 1 << 20  # bytes read at a time
LARGEST_MANIFEST = 1 << 24  # bytes; nothing that is longer was written as one


def verify_directory(directory: Path, *, digests: bool = True) -> list[str]:
    """Check a directory against its manifest and return the names it lists.

    With ``digests`` false only presence and size are compared. Raises ModelError naming the damaged
    file: a manifest that is absent or altered, a file that is missing, of another size or content,
    a link, or outside the directory. Raises DiskError where something could not be read, which is
    no statement about it.
    """
    with translate_read_errors(directory / MANIFEST_NAME):
        # by lstat: behind a link lies what somebody else may change
        linked = stat.S_ISLNK(durable.disk.lstat(directory).st_mode)
    if linked:
        raise ModelError(f"{directory} is a symbolic link; give the directory it points to")
    entries = _read_manifest(directory / MANIFEST_NAME)
    for name, entry in entries.items():
        path = directory / name
        # a manifest is text that somebody may have altered; ../ would have a file elsewhere
        # believed
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise ModelError(
                f"{directory / MANIFEST_NAME}: {name!r} is not a plain file name of this directory"
            )
        size = plain_size(path)
        if size != entry["bytes"]:
            raise ModelError(f"{path} is damaged: {size} bytes, its manifest says {entry['bytes']}")
        if digests and (digest := file_digest(path)) != entry["sha256"]:
            raise ModelError(
                f"{path} is damaged: sha256 {digest[:12]}..., its manifest says {entry['sha256'][:12]}..."
            )
    return list(entries)


def plain_size(path: Path) -> int:
    """The size in bytes of a regular file. Raises ModelError when it is missing, a link, or no
    regular file; and DiskError.
    """
    with translate_read_errors(path):
        status = durable.disk.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{path} is not a regular file (a link or a special file) and is not read")
    return status.st_size


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises ModelError when it is missing, and DiskError."""
    digest = hashlib.sha256()
    for block in iter_blocks(path):
        digest.update(block)
    return digest.hexdigest()


def read_content(path: Path) -> bytes:
    """A whole file. Raises ModelError when it is missing, and DiskError."""
    return b"".join(iter_blocks(path))


def iter_blocks(path: Path) -> Iterator[bytes]:
    """A file piece by piece. Raises ModelError when it is missing, and DiskError."""
    with translate_read_errors(path):
        fd = durable.disk.open_to_read(path)
        try:
            while block := durable.disk.read(fd, BLOCK_BYTES):
                yield block
        finally:
            os.close(fd)


@contextmanager
def translate_read_errors(path: Path) -> Iterator[None]:
    """What the disk answers while ``path`` is read: absence is ModelError, everything else
    DiskError with its place.
    """
    try:
        yield
    # the two answers that say what is stored; every other is about the disk
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"{path} is missing") from None
    except durable.DiskError:
        raise
    except OSError as error:
        raise durable.DiskError(error.errno, error.strerror, str(error.filename or path)) from error


def _read_manifest(path: Path) -> dict[str, ManifestEntry]:
    raw = read_content(path) if plain_size(path) <= LARGEST_MANIFEST else b""
    try:
        entries: dict[str, ManifestEntry] = parse_json(raw, str(path), error=ModelError)["files"]
        # one spelling only: encoded again it must be the same bytes, so no altered byte passes
        whole = encode_manifest(entries) == raw
    except (ModelError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole or any(
        [type(v) for v in entry.values()] != [int, str] for entry in entries.values()
    ):
        raise ModelError(f"{path} is damaged: it is not the manifest that Lorry wrote")
    return entries
