"""Open what a person names: a base, a base with adapters, or a run directory with one adapter or a folder of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorry.bank.attach import bank_of
from lorry.bank.mix import Mix
from lorry.bank.peft_io import load_adapter
from lorry.config.schema import ModelConfig
from lorry.errors import ModelError
from lorry.models.load import load_model

ADAPTER_FILE = "adapter_config.json"


@dataclass
class Opened:
    """A model ready to use, its tokenizer, where the base came from, and the adapters attached, first one active."""

    model: nn.Module
    tokenizer: Any
    source: dict[str, Any]
    adapters: list[str]


def open_model(config: ModelConfig, notes: list[str], *, adapters: Sequence[str] = ()) -> Opened:
    """Load the base and every adapter named: that of `config.name` if it is a run, `config.adapter`, and ``adapters``.

    Raises ModelError if anything is missing, damaged or belongs to another base.
    """
    loaded = load_model(
        config.name,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        native=config.native,
        notes=notes,
    )
    places = [loaded.source["adapter"]] if loaded.source.get("adapter") else []
    places += [p for p in (config.adapter, *adapters) if p]
    names: list[str] = []
    for place in (folder for p in places for folder in adapter_folders(Path(p))):
        name = free_name(place, names)
        load_adapter(loaded.model, place, name)
        names.append(name)
    if names:
        bank_of(loaded.model).activate(Mix.one(names[0]))
    return Opened(loaded.model, loaded.tokenizer, loaded.source, names)


def adapter_folders(path: Path) -> list[Path]:
    """The adapter directories a path stands for: itself, or its sub-folders that are adapters. Raises ModelError if none is."""
    if (path / ADAPTER_FILE).is_file():
        return [path]
    found = sorted(p.parent for p in path.glob(f"*/{ADAPTER_FILE}")) if path.is_dir() else []
    if not found:
        raise ModelError(f"{path} holds no adapter ({ADAPTER_FILE} is missing); give a run or adapter directory")
    return found


def free_name(path: Path, taken: Sequence[str]) -> str:
    """A name for an adapter from its folder, legal and not taken yet."""
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name)[:56].strip(".-") or "adapter"
    return next(n for n in (base, *(f"{base}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)
