"""Files that are somebody's: bytes that no command of ours writes, and where all bytes of a folder
lie.

(folder / "README.md").write_bytes(strange("README.md"))
assert everything(folder)[strange("README.md")] == ["previous/1/README.md"]
"""

from __future__ import annotations

from pathlib import Path


def strange(name: str) -> bytes:
    """Somebody's bytes, of a length that no file of a run has."""
    return f"this {name} is somebody's\n".encode() * 3


def everything(folder: Path) -> dict[bytes, list[str]]:
    """The content of every file below a folder, and where it lies."""
    found: dict[bytes, list[str]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.setdefault(path.read_bytes(), []).append(str(path.relative_to(folder)))
    return found
