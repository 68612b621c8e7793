"""The manifest of a directory: size and SHA-256 of every file in it, so that a reader knows it whole and unaltered.

    {"format": "lorry-manifest/1", "files": {"meta.json": {"bytes": 812, "sha256": "..."}, ...}, "sha256": "..."}

It is the last file written (``durable.write_directory``). It carries its own digest and has one spelling only, so that
no altered byte of it passes. Reading follows no links and leaves the directory's bounds for nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from lorry.errors import ModelError

NAME = "manifest.json"
FORMAT = "lorry-manifest/1"


class Entry(TypedDict):
    """What a manifest says of one file."""

    bytes: int
    sha256: str


def text(entries: Mapping[str, Entry]) -> bytes:
    """The manifest as it is written, for entries by file name."""
    files = {name: Entry(bytes=entries[name]["bytes"], sha256=entries[name]["sha256"]) for name in sorted(entries)}
    body: dict[str, Any] = {"format": FORMAT, "files": files}
    body["sha256"] = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps(body, indent=1) + "\n").encode()


def verify(directory: Path, *, digests: bool = True) -> list[str]:
    """Check a directory against its manifest and return the names it lists.

    With ``digests`` false only presence and size are compared. Raises ModelError naming the damaged file: a manifest
    that is absent or altered, a file that is missing, of another size or content, a link, or outside the directory.
    """
    try:
        return _verify(directory, digests)
    except OSError as e:
        raise ModelError(f"{e.filename or directory} cannot be read: {e.strerror}") from e


def plain_size(path: Path) -> int:
    """The size in bytes of a regular file. Raises ModelError when it is missing, a link, or no regular file."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing") from None
    if not stat.S_ISREG(found.st_mode):
        raise ModelError(f"{path} is not a plain file (a link or a special file); it is not followed")
    return found.st_size


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(directory: Path, digests: bool) -> list[str]:
    if directory.is_symlink():
        raise ModelError(f"{directory} is a symbolic link; give the directory it points to")
    entries = _read_manifest(directory / NAME)
    for name, entry in entries.items():
        path = directory / name
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise ModelError(f"{directory / NAME}: {name!r} is not a plain file name of this directory")
        size = plain_size(path)
        if size != entry["bytes"]:
            raise ModelError(f"{path} is damaged: {size} bytes, its manifest says {entry['bytes']}")
        if digests and (found := file_digest(path)) != entry["sha256"]:
            raise ModelError(f"{path} is damaged: sha256 {found[:12]}..., its manifest says {entry['sha256'][:12]}...")
    return list(entries)


def _read_manifest(path: Path) -> dict[str, Entry]:
    plain_size(path)
    raw = path.read_bytes()
    try:
        body = json.loads(raw)
        entries: dict[str, Entry] = body["files"]
        whole = text(entries) == raw
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        whole = False
    if not whole or any([type(v) for v in entry.values()] != [int, str] for entry in entries.values()):
        raise ModelError(f"{path} is damaged: it is not the manifest that was written")
    return entries
