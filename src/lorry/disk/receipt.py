"""receipt.json, the last file of a finished run, read in one place: every part of it has the type
that a run writes, or an error names the part.

    receipt = read(run_dir / "receipt.json")        # None where there is none
    part(receipt, "base").get("dtype")

Parts may be missing (older runs) and unknown ones are kept; what is there can be relied on by every
verb.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorry.disk import documents
from lorry.errors import RunFilesError

OBJECTS = ("data", "base", "code", "environment", "adapters", "weights", "teacher")
# of the process that ended the run: another one's differ
MEMORY = ("loading_peak_bytes", "trained_bytes")
NUMBERS = ("trainable_parameters", "total_parameters", "saved_bytes", *MEMORY)
DIGESTS = ("adapters", "weights")  # {file or adapter: SHA-256}
TEXTS = (
    "name",
    "path",
    "adapter",
    "kind",
    "revision",
    "family",
    "dtype",
    "device",
    "why",
    "sha256",
    "source",
)


def read(path: Path) -> dict[str, Any] | None:
    """The receipt, None where there is no such file. Raises DataError naming the part that no run
    writes so, and OSError.
    """
    try:
        receipt = documents.read_json_document(path, error=RunFilesError)
    except FileNotFoundError:
        return None
    if not isinstance(receipt, dict):
        raise RunFilesError(f"{path}: expected a JSON object, got {type(receipt).__name__}")
    for name in OBJECTS:
        _texts(part(receipt, name, path), name, path)
    for name in DIGESTS:
        for key, digest in part(receipt, name, path).items():
            _require(isinstance(digest, str), f"{name}.{key}", path)
    for name in NUMBERS:
        value = receipt.get(name, 0)
        # Python counts true as 1
        _require(isinstance(value, int | float) and not isinstance(value, bool), name, path)
    # one seed, or one for each job by name
    seeds = receipt.get("seed", 0)
    for seed in seeds.values() if isinstance(seeds, dict) else [seeds]:
        _require(isinstance(seed, int) and not isinstance(seed, bool), "seed", path)
    data = part(receipt, "data", path)
    for name, rows in {
        "data": data,
        **{f"data.{key}": held for key, held in data.items() if isinstance(held, dict)},
    }.items():
        _texts(rows, name, path)
        part(rows, "left_out", path, f"{name}.")
    return receipt


def is_of_same_run(path: Path, other: Mapping[str, Any]) -> bool:
    """Whether a receipt lies there that says what another does, but for a process's memory. Raises
    OSError.
    """
    try:
        found = read(path)
    except RunFilesError:
        return False
    if found is None:
        return False
    return {k: v for k, v in found.items() if k not in MEMORY} == {
        k: v for k, v in other.items() if k not in MEMORY
    }


def part(
    receipt: Mapping[str, Any] | None,
    name: str,
    path: Path | str = "receipt.json",
    within: str = "",
) -> dict[str, Any]:
    """An object inside a receipt, empty where there is none. Raises DataError when it is something
    else.
    """
    value = {} if receipt is None else receipt.get(name, {})
    _require(isinstance(value, dict), within + name, path)
    # a copy: a verb that changes what it shows changes no receipt
    return dict(value)


def _texts(group: Mapping[str, Any], name: str, path: Path) -> None:
    """Names, places and digests are text; null where there is none; an object where a job has that
    name.
    """
    for key in TEXTS:
        _require(isinstance(group.get(key), str | dict | None), f"{name}.{key}", path)


def _require(holds: bool, name: str, path: Path | str) -> None:
    if not holds:
        raise RunFilesError(f"{path}: {name!r} is not valid in a receipt")
