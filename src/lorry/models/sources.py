"""From what a person typed to a directory on this disk: an embedded model, a path, a GGUF file, an adapter, or a hub id."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError

from lorry.errors import ModelError, nearest
from lorry.models.describe import read_json
from lorry.models.embedded import EMBEDDED, converted, embedded

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
UNWANTED = ["*/*", "consolidated*", "training_args*", "optimizer*"]


@dataclass(frozen=True)
class Place:
    """A model on this disk. kind: directory, hub, gguf or embedded; adapters: {name: its directory} that were asked for with it."""

    directory: Path
    kind: str
    name: str
    adapters: Mapping[str, Path] = field(default_factory=dict)


def resolve(name: str, *, revision: str | None = None, trust_remote_code: bool = False, notes: list[str]) -> Place:
    """Find (and if need be download or convert) a model. An embedded name wins over a path; write ./NAME for the path.

    Raises ModelError naming what was looked for and what comes near.
    """
    if name in EMBEDDED:
        return Place(embedded(name, notes), "embedded", name)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is a file; give the directory of the model, or a .gguf file")
        return Place(converted(path, notes), "gguf", name)
    if path.is_dir():
        found = adapters_in(path)
        return _with_base(found, notes) if found else Place(path.resolve(), "directory", name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not HUB_ID.fullmatch(name):
        raise ModelError(f"no model at {name!r}{_near(name)}")
    return _download(name, revision, trust_remote_code, notes)


def adapters_in(path: Path) -> dict[str, Path]:
    """{name: directory} of an adapter directory (name `default`), or of a run with one folder per adapter; else empty."""
    if (path / "adapter_config.json").is_file():
        return {"default": path.resolve()}
    if (path / "config.json").is_file():
        return {}
    return {p.name: p.resolve() for p in sorted(path.iterdir()) if (p / "adapter_config.json").is_file()}


def _with_base(adapters: dict[str, Path], notes: list[str]) -> Place:
    """The base that adapters were trained on. All of them must name the same."""
    wanted = {name: base_names(path) for name, path in adapters.items()}
    first = next(iter(wanted))
    for name, names in wanted.items():
        if names[0] != wanted[first][0]:
            raise ModelError(f"{adapters[name]}: its base is {names[0]!r}, that of {first!r} is {wanted[first][0]!r}; load one at a time")
    base = next((n for n in wanted[first] if n in EMBEDDED or Path(n).exists()), wanted[first][0])
    if Path(base).is_dir() and adapters_in(Path(base)):
        raise ModelError(f"{adapters[first]}: its base {base} is itself an adapter; merge that one first")
    try:
        return replace(resolve(base, notes=notes), adapters=adapters)
    except ModelError as e:
        raise ModelError(f"{adapters[first]} is an adapter and its base cannot be loaded: {e}") from e


def base_names(adapter: Path) -> list[str]:
    """What an adapter's files call its base, best first: the name it was trained with, then the recorded directory."""
    names: list[Any] = []
    if (adapter / "lorry_adapter.json").is_file():
        base = read_json(adapter / "lorry_adapter.json").get("base")
        names += [base.get("name"), base.get("path")] if isinstance(base, dict) else [base]
    recorded = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    names.append(recorded)
    if isinstance(recorded, str):  # the cache directory of an embedded model, on a machine that may not have it yet
        names += [m.group(1) for m in [re.fullmatch(r"(.+)-[0-9a-f]{12}", Path(recorded).name)] if m and m.group(1) in EMBEDDED]
    known = [n for n in names if isinstance(n, str) and n]
    if not known:
        raise ModelError(f"{adapter}/adapter_config.json names no base_model_name_or_path; load the base and the adapter yourself")
    return known


def _download(name: str, revision: str | None, trust_remote_code: bool, notes: list[str]) -> Place:
    """A snapshot of a hub repository: weights in safetensors, JSON and tokenizer files; Python only if it may run."""
    patterns = [*WANTED, "*.py"] if trust_remote_code else WANTED
    try:
        got = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=UNWANTED))
    except (OSError, HFValidationError) as e:
        where = "offline (HF_HUB_OFFLINE is set) and not in the local cache" if constants.HF_HUB_OFFLINE else "not reachable on the hub"
        at = f" at revision {revision!r}" if revision else ""
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ModelError(
            f"no model {name!r}{at}: there is no such directory here, and as a hub id it is {where} ({reason}){_near(name)}. A "
            f"private or gated model needs `hf auth login`; embedded: {', '.join(EMBEDDED)}"
        ) from e
    adapters = adapters_in(got)
    return _with_base(adapters, notes) if adapters else Place(got, "hub", name)


def _near(name: str) -> str:
    """A "did you mean" tail over the embedded names and the directories beside the path that was typed."""
    path = Path(name).expanduser()
    parent = path.parent if path.parent.is_dir() else Path()
    try:
        beside = [os.path.join(path.parent, p.name) if path.parent != Path() else p.name for p in parent.iterdir()]
    except OSError:
        beside = []
    return nearest(name, [*EMBEDDED, *beside])
