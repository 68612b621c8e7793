"""From what a person typed to a directory on this disk: an embedded model, a path, a GGUF file, an
adapter, or a hub id.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from lorry.disk.home import name_of_converted
from lorry.errors import ModelError, suggest_nearest
from lorry.models.gguf.embedded import (
    EMBEDDED,
    convert_gguf,
    find_embedded_file,
    resolve_embedded_model,
)
from lorry.models.loading.describe import read_model_json
from lorry.notes import NoteCallback
from lorry.runs.layout import (
    ADAPTER_CONFIG,
    ADAPTER_FACTS,
    RUN_FILE,
    is_adapter_folder,
    list_adapter_subfolders,
)

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
# No .bin: pickles are never opened. Python files are added only where they may run.
ALLOW_PATTERNS = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
]
# "*/*": sub-folders hold other formats (onnx, original) of the same weights.
IGNORE_PATTERNS = ["*/*", "consolidated*", "training_args*", "optimizer*"]


@dataclass(frozen=True)
class ModelLocation:
    """A model on this disk. kind: directory, hub, gguf or embedded; adapter: the adapter or run
    directory that was asked for; file: the GGUF file that the directory was converted from.
    """

    directory: Path
    kind: str
    adapter: Path | None = None
    file: Path | None = None


def resolve_model(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    add_note: NoteCallback,
    base_only: bool = False,
) -> ModelLocation:
    """Find (and if need be download or convert) a model. An embedded name wins over a path; write
    ./NAME for the path.

    ``base_only``: an adapter will not do. Raises ModelError naming what was looked for and what
    comes near.
    """
    if name in EMBEDDED:
        directory = resolve_embedded_model(name, add_note)
        return ModelLocation(directory, "embedded", file=find_embedded_file(name))
    path = Path(name).expanduser()
    if path.is_file():
        # a single .safetensors has no config beside its name
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is a file; give the directory of the model, or a .gguf file")
        return ModelLocation(convert_gguf(path, add_note), "gguf", file=path)
    if path.is_dir():
        location = _locate_adapter_base(path.resolve(), add_note, base_only)
        if (
            location is None
            and (path / RUN_FILE).is_file()
            and not (path / "config.json").is_file()
        ):
            raise ModelError(
                f"{path} is an unfinished run; repeat its command with "
                "resume_from_checkpoint=auto to finish it"
            )
        return location or ModelLocation(path.resolve(), "directory")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not HUB_ID.fullmatch(name):
        raise ModelError(f"no model at {name!r}{_suggest_names(name)}")
    snapshot = _download_snapshot(name, revision, trust_remote_code)
    return _locate_adapter_base(snapshot, add_note, base_only) or ModelLocation(snapshot, "hub")


def find_adapters_in(path: Path) -> list[Path]:
    """The adapters of a directory: itself, or the folders of a run of several; none if it is a
    model.
    """
    if is_adapter_folder(path):
        return [path]
    return [] if (path / "config.json").is_file() else list_adapter_subfolders(path)


def _locate_adapter_base(
    path: Path, add_note: NoteCallback, base_only: bool
) -> ModelLocation | None:
    """The base that the adapters of a directory were trained on, which must be one; None if it
    holds no adapters.
    """
    bases = {adapter: _base_of_adapter(adapter) for adapter in find_adapters_in(path)}
    if not bases:
        return None
    if base_only:
        raise ModelError(f"{path} is an adapter; merge it into its base model first")
    if len(different := {base: adapter for adapter, base in bases.items()}) > 1:
        pairs = ", ".join(f"{adapter.name} on {base!r}" for base, adapter in different.items())
        raise ModelError(
            f"{path}: its adapters were trained on different base models ({pairs}); "
            "load one of them"
        )
    try:
        return replace(
            resolve_model(next(iter(different)), add_note=add_note, base_only=True), adapter=path
        )
    except ModelError as e:
        raise ModelError(f"{path} is an adapter and its base model cannot be loaded: {e}") from e


def _base_of_adapter(adapter: Path) -> str:
    """What to load as an adapter's base: an embedded name, a directory that exists, or else a name
    for the hub.
    """
    facts = (
        read_model_json(adapter / ADAPTER_FACTS).get("base")
        if (adapter / ADAPTER_FACTS).is_file()
        else None
    )
    from_facts = [facts.get("name"), facts.get("path")] if isinstance(facts, dict) else [facts]
    recorded = read_model_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    names = [n for n in (*from_facts, recorded) if isinstance(n, str) and n]
    if not names:
        raise ModelError(
            f"{adapter / ADAPTER_CONFIG} names no base_model_name_or_path; load the "
            "base model and add the adapter to it"
        )
    # the cache directory of an embedded model, on a machine that may not have it yet
    names += [embedded for embedded in map(name_of_converted, names) if embedded in EMBEDDED]
    # what is on this machine first, then the hub, then whatever was written
    local = [n for n in names if n in EMBEDDED] + [n for n in names if Path(n).exists()]
    return (local + [n for n in names if HUB_ID.fullmatch(n)] + names)[0]


def _download_snapshot(name: str, revision: str | None, trust_remote_code: bool) -> Path:
    """A snapshot of a hub repository: weights in safetensors, JSON and tokenizer files; Python only
    if it may run.
    """
    # imported here: what is on this disk needs no client of the hub, a quarter of a second
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = [*ALLOW_PATTERNS, "*.py"] if trust_remote_code else ALLOW_PATTERNS
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=IGNORE_PATTERNS
            )
        )
    except (OSError, HFValidationError) as e:
        where = (
            "not cached here (HF_HUB_OFFLINE is set)"
            if constants.HF_HUB_OFFLINE
            else "not available"
        )
        at = f" at revision {revision!r}" if revision else ""
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ModelError(
            f"no model {name!r}{at}: there is no such directory here, and as a hub id it is {where} ({reason}){_suggest_names(name)}. A "
            f"private or gated model needs `hf auth login`; embedded: {', '.join(EMBEDDED)}"
        ) from e


def _suggest_names(name: str) -> str:
    """A "did you mean" tail over the embedded names and what can be opened beside the path that was
    typed: the new directory of this very run is no model.
    """
    path = Path(name).expanduser()
    parent = path.parent if path.parent.is_dir() else Path()
    try:
        beside = [
            os.path.join(path.parent, p.name) if path.parent != Path() else p.name
            for p in parent.iterdir()
            if p.suffix == ".gguf"
            or (p.is_dir() and ((p / "config.json").is_file() or find_adapters_in(p)))
        ]
    except OSError:
        beside = []
    return suggest_nearest(name, [*EMBEDDED, *beside])
