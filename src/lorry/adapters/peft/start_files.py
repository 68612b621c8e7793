"""The adapter that another one was trained over (its start, `AdapterBank.move_to_base`), in the files of
that one.

They name it by directory and SHA-256, and have a copy of its files in a folder `start_adapter` of
their own, which may have one in turn. The copy goes before the directory; neither is used unless its
digest is the named one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from lorry.adapters.adapter import AdapterOrigin
from lorry.adapters.attach import get_bank
from lorry.adapters.peft.config import INFORMATION_KEYS, OVER_ADAPTER, read_adapter_json
from lorry.disk import durable
from lorry.disk.integrity import file_digest, read_content
from lorry.errors import ModelError
from lorry.runs.layout import (
    ADAPTER_CONFIG,
    ADAPTER_FACTS,
    ADAPTER_FILES,
    ADAPTER_WEIGHTS,
    START,
    is_adapter_folder,
)

_ORIGIN = ("path", "sha256")


def start_files(model: nn.Module) -> dict[str, bytes]:
    """The files of the adapters that a model's are trained over, {name below an adapter's folder:
    content}, ``start_adapter/adapter_config.json`` the first; none without a start. Raises ModelError where
    they are no longer there, or others.
    """
    start = get_bank(model, create=True).start
    files = dict[str, bytes]()
    if start is None:
        return files
    inside = ""
    for folder, origin in [(Path(start.path), start), *start_chain(Path(start.path))]:
        inside += f"{START}/"
        _verify_start(folder, origin, "the model")
        files |= {
            inside + name: read_content(folder / name)
            for name in ADAPTER_FILES
            if (folder / name).is_file()
        }
    return files


def write_start_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write what `start_files` gave into an adapter's folder. Raises DiskError."""
    by_folder = dict[Path, dict[str, durable.FileContent]]()
    for name, content in files.items():
        by_folder.setdefault((folder / name).parent, {})[Path(name).name] = content
    for inner, contents in by_folder.items():
        durable.make_directory(inner)
        durable.write_files(inner, contents)


def start_chain(folder: Path) -> list[tuple[Path, AdapterOrigin]]:
    """(where its files are, what they must be) of every adapter that the one in ``folder`` was
    trained over, the nearest first. A copy beside an adapter goes before the directory that its
    files name. Raises ModelError for files that lead back to themselves.
    """
    chain, seen = list[tuple[Path, AdapterOrigin]](), {folder.resolve()}
    while (origin := _read_start(folder)) is not None:
        copy = folder / START
        place = copy if (copy / ADAPTER_WEIGHTS).is_file() else Path(origin.path)
        if place.resolve() in seen:
            raise ModelError(
                f"{folder / ADAPTER_FACTS}: its start (the adapter it was trained on "
                f"top of) leads back to {place}"
            )
        seen.add(place.resolve())
        chain.append((place, origin))
        folder = place
        if not is_adapter_folder(folder):
            break
    return chain


def adapter_digest(folder: Path) -> str:
    """SHA-256 of all that an adapter's files add to a model: its weights, the settings that say with
    which factor and where they count, and the start it was trained over. Raises ModelError.
    """
    config = read_adapter_json(folder / ADAPTER_CONFIG)
    origin = _read_start(folder)
    settings = config.get("lora", config)
    # where a base lies and which version wrote the file change nothing of what is computed
    digested = {key: settings[key] for key in sorted(settings) if key not in INFORMATION_KEYS}
    start = None if origin is None else origin.sha256
    facts = json.dumps([file_digest(folder / ADAPTER_WEIGHTS), digested, start], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()


def _read_start(folder: Path) -> AdapterOrigin | None:
    """The adapter that one in ``folder`` was trained over, as its files say. Raises ModelError
    where they say half of it."""
    facts = folder / ADAPTER_FACTS
    entry = read_adapter_json(facts).get("start") if facts.is_file() else None
    over = read_adapter_json(folder / ADAPTER_CONFIG).get("peft_type") == OVER_ADAPTER
    if entry is None and not over:
        return None
    if not (
        over and isinstance(entry, dict) and all(isinstance(entry.get(k), str) for k in _ORIGIN)
    ):
        raise ModelError(
            f"{facts}: the adapter was trained on top of another one, which start "
            "has to name (path and sha256)"
        )
    return AdapterOrigin(entry["path"], entry["sha256"])


def check_start(
    model: nn.Module, folder: Path, recorded: tuple[Path, AdapterOrigin] | None
) -> None:
    """Refuse an adapter over another start than the model has. Raises ModelError."""
    start = None if recorded is None else recorded[1]
    bank = get_bank(model, create=True)
    if bank.start is not None:
        if start is None or start.sha256 != bank.start.sha256:
            over = "the base model alone" if start is None else f"the adapter {start.path}"
            raise ModelError(
                f"{folder}: this adapter was trained on top of {over}, but the "
                f"model has {bank.start.path} as its start; load it on its own start"
            )
        return
    if recorded is None or start is None:
        return
    if bank.adapters:
        raise ModelError(
            f"{folder}: this adapter was trained on top of the adapter "
            f"{start.path}, but the model has {', '.join(bank.adapters)} on the "
            "base model alone; load it by itself"
        )
    _verify_start(recorded[0], start, str(folder))


def verify_starts(folder: Path) -> int:
    """How many adapters the one in ``folder`` was trained over, one over the other. Raises
    ModelError where one of them is not there or is another."""
    chain = start_chain(folder)
    for place, origin in chain:
        _verify_start(place, origin, str(folder))
    return len(chain)


def _verify_start(place: Path, start: AdapterOrigin, whose: str) -> None:
    """Raise ModelError unless the adapter in ``place`` is the one that ``whose`` was trained over."""
    weights = place / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ModelError(
            f"{whose}: trained on top of the adapter {start.path}, which is "
            f"missing; restore it there, or put a copy into the folder {START} "
            "beside it (SHA-256 of its weights and settings: "
            f"{start.sha256[:16]}...)"
        )
    if (digest := adapter_digest(place)) != start.sha256:
        raise ModelError(
            f"{weights}: not the adapter that {whose} was trained on top of "
            f"(SHA-256 is {digest[:16]}..., expected {start.sha256[:16]}...); with "
            "another start the results would be wrong"
        )
