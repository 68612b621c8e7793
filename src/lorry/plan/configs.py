"""Find the config of a model without its weights: a directory, a run or adapter (its base), a
well-known name, a hub id.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lorry.config.left_out import find_in_adapter
from lorry.disk import documents
from lorry.disk.home import name_of_converted
from lorry.errors import ModelError, suggest_nearest
from lorry.plan.known import KNOWN_CONFIGS
from lorry.runs.layout import (
    ADAPTER_CONFIG,
    ADAPTER_FACTS,
    ADAPTER_WEIGHTS,
    START,
    is_adapter_folder,
    list_adapter_subfolders,
)

HUB_ID = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*|[A-Za-z0-9][A-Za-z0-9._-]*"
)


@dataclass(frozen=True)
class FoundConfig:
    """A config, where it was found, and the ranks of the adapters that were named instead of a base,
    by name (none: a base was named). ``folders``: those of the adapters.
    """

    config: dict[str, Any]
    where: str
    adapter_ranks: Mapping[str, int] = field(default_factory=dict)
    folders: tuple[Path, ...] = ()

    @property
    def adapter_rank(self) -> int | None:
        """That of the only adapter."""
        return next(iter(self.adapter_ranks.values())) if len(self.adapter_ranks) == 1 else None


def find_config(name: str, *, revision: str | None = None) -> FoundConfig:
    """The config that ``name`` stands for. Raises ModelError naming what was looked for and what
    comes near.
    """
    path = Path(name).expanduser()
    # a well-known name stays one beside a folder that happens to have it; ./NAME is the folder
    if path.is_dir() and name not in KNOWN_CONFIGS:
        return _directory_config(path)
    if name.lower() in KNOWN_CONFIGS:
        return FoundConfig(
            KNOWN_CONFIGS[name.lower()], f"the table of well-known models ({name.lower()})"
        )
    if path.suffix == ".gguf":
        raise ModelError(
            f"{path}: plan reads config.json, which a GGUF file lacks; give the "
            "directory that it was converted to"
        )
    if name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        raise ModelError(
            f"no model at {name!r}{suggest_nearest(name, KNOWN_CONFIGS)}; known by name: {', '.join(sorted(KNOWN_CONFIGS))}"
        )
    return _hub_config(name, revision)


def _directory_config(path: Path) -> FoundConfig:
    if (path / "config.json").is_file():
        return FoundConfig(_read_config(path / "config.json"), str(path / "config.json"))
    folders = [path] if is_adapter_folder(path) else list_adapter_subfolders(path)
    if not folders:
        raise ModelError(
            f"{path} has neither config.json nor adapter_config.json; give a model, a run or an adapter directory"
        )
    bases = {folder: _adapter_facts(folder) for folder in folders}
    first, _ = bases[folders[0]]
    for folder, (base, _) in bases.items():
        if base != first:
            raise ModelError(
                f"{path}: its adapters are for several base models "
                f"({folders[0].name} for {first}, {folder.name} for {base}); name "
                "the folder of one"
            )
    # an adapter may name a converted model that another machine's cache holds: its shape is
    # that of the well-known model it was converted from
    cached = name_of_converted(first)
    known = not Path(first).is_dir() and cached in KNOWN_CONFIGS
    ranks = {folder.name: rank for folder, (_, rank) in bases.items()}
    return replace(
        find_config(cached if known and cached else first),
        adapter_ranks=ranks,
        folders=tuple(folders),
    )


def count_start_values(folder: Path) -> int:
    """Values of the adapter in a folder and of those that it was trained over. Raises ModelError for
    files that are not there or not whole.
    """
    values, seen = 0, set[Path]()
    while folder.resolve() not in seen:
        seen.add(folder.resolve())
        values += _count_values(folder / ADAPTER_WEIGHTS)
        facts = folder / ADAPTER_FACTS
        start = _read_config(facts).get("start") if facts.is_file() else None
        if not isinstance(start, dict):
            break
        # the copy beside an adapter goes before the directory that its files name
        copy = folder / START
        folder = copy if (copy / ADAPTER_WEIGHTS).is_file() else Path(str(start.get("path")))
    return values


def _count_values(file: Path) -> int:
    try:
        # shapes alone: no tensor is read
        with safe_open(file, framework="numpy") as opened:
            shapes = [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118 - safe_open is not iterable
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file}: not a complete safetensors file ({error}); a run that starts from this adapter needs it"
        ) from None
    return sum(prod(shape) for shape in shapes)


def _adapter_facts(path: Path) -> tuple[str, int]:
    """(base, rank) of an adapter directory. Raises ModelError."""
    adapter = _read_config(path / ADAPTER_CONFIG)
    if asked := find_in_adapter(adapter):
        key, method = asked
        raise ModelError(
            f"{path / ADAPTER_CONFIG}: {key}={adapter[key]!r:.80}: {method}; {method.file}"
        )
    # of one that was trained over another, its own settings lie one level down
    own = adapter.get("lora")
    base = adapter.get("base_model_name_or_path")
    rank = own.get("r") if isinstance(own, dict) else adapter.get("r")
    if not isinstance(base, str) or not isinstance(rank, int):
        raise ModelError(
            f"{path / ADAPTER_CONFIG}: no base_model_name_or_path and r; this is not a LoRA adapter"
        )
    return base, rank


def _hub_config(name: str, revision: str | None) -> FoundConfig:
    """config.json of a hub repository, from the cache or the hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        file = hf_hub_download(name, "config.json", revision=revision)
    except (OSError, HFValidationError) as e:
        # the hub's errors run over several lines; the first has the cause
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ModelError(
            f"no config of {name!r}: no such directory here, no well-known "
            f"name{suggest_nearest(name.lower(), KNOWN_CONFIGS)}, and it could not "
            f"be read from the hub ({reason}); known by name: "
            f"{', '.join(sorted(KNOWN_CONFIGS))}"
        ) from e
    return FoundConfig(_read_config(Path(file)), f"{name} on the hub")


def _read_config(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size. Raises ModelError with file and line."""
    # transformers writes Infinity into some configs (`time_step_limit` of Mamba2)
    return documents.read_object(path, error=ModelError, nonfinite=True, largest=10**40)
