"""The manifest of a directory: size and SHA-256 of every file in it, for a reader (integrity.py) to
know it whole and unaltered.

    {"format": "lorry-manifest/1", "files": {"meta.json": {"bytes": 812, "sha256": "..."}, ...}, "sha256": "..."}

It is the last file written (``durable.write_directory``). It carries its own digest and has one
spelling only, so that no altered byte of it passes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypedDict

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = "lorry-manifest/1"


class ManifestEntry(TypedDict):
    """What a manifest says of one file."""

    bytes: int
    sha256: str


def encode_manifest(entries: Mapping[str, ManifestEntry]) -> bytes:
    """The manifest as it is written, for entries by file name."""
    files = {
        name: ManifestEntry(bytes=entries[name]["bytes"], sha256=entries[name]["sha256"])
        for name in sorted(entries)
    }
    body: dict[str, Any] = {"format": MANIFEST_FORMAT, "files": files}
    # over the body before this line is added; a reader checks it by encoding the entries again
    body["sha256"] = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps(body, indent=1) + "\n").encode()
