"""receipt.json, the last file of a finished run, read in one place: every part of it has the type that a run writes, or an error
names the part.

    found = read(run_dir / "receipt.json")        # None where there is none
    part(found, "base").get("dtype")

Parts may be missing (older runs) and unknown ones are kept; what is there can be relied on by every verb.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorry.disk import documents
from lorry.errors import DataError

OBJECTS = ("data", "base", "code", "environment", "adapters", "weights", "teacher")
NUMBERS = ("trainable_parameters", "total_parameters", "saved_bytes")
DIGESTS = ("adapters", "weights")  # {file or adapter: SHA-256}
TEXTS = ("name", "path", "adapter", "kind", "revision", "family", "dtype", "device", "why", "sha256", "source")


def read(path: Path) -> dict[str, Any] | None:
    """The receipt, None where there is no such file. Raises DataError naming the part that no run writes so, and OSError."""
    try:
        found = documents.read_json(path)
    except FileNotFoundError:
        return None
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(found).__name__}")
    for name in OBJECTS:
        _texts(part(found, name, path), name, path)
    for name in DIGESTS:
        for key, digest in part(found, name, path).items():
            _need(isinstance(digest, str), f"{name}.{key}", path)
    for name in NUMBERS:
        value = found.get(name, 0)
        _need(isinstance(value, int | float) and not isinstance(value, bool), name, path)
    seeds = found.get("seed", 0)
    for seed in seeds.values() if isinstance(seeds, dict) else [seeds]:
        _need(isinstance(seed, int) and not isinstance(seed, bool), "seed", path)
    data = part(found, "data", path)
    for name, one in {"data": data, **{f"data.{key}": held for key, held in data.items() if isinstance(held, dict)}}.items():
        _texts(one, name, path)
        part(one, "left_out", path, f"{name}.")
    return found


def part(found: Mapping[str, Any] | None, name: str, path: Path | str = "receipt.json", within: str = "") -> dict[str, Any]:
    """An object inside a receipt, empty where there is none. Raises DataError when it is something else."""
    value = {} if found is None else found.get(name, {})
    _need(isinstance(value, dict), within + name, path)
    return dict(value)


def _texts(one: Mapping[str, Any], name: str, path: Path) -> None:
    """Names, places and digests are text; null where there is none; an object where a job has that name."""
    for key in TEXTS:
        _need(isinstance(one.get(key), str | dict | None), f"{name}.{key}", path)


def _need(holds: bool, name: str, path: Path | str) -> None:
    if not holds:
        raise DataError(f"{path}: {name!r} is not what a run writes there")
