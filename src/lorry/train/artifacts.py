"""What a run leaves in its directory besides metrics and checkpoints: adapter, run.yaml, receipt,
contracts.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from lorry.adapters.peft.files import adapter_files
from lorry.disk import durable, receipt
from lorry.runs import ownership
from lorry.runs.layout import ADAPTER_WEIGHTS, CONTRACTS, RECEIPT, RUN_FILE


def write_json(run_dir: Path, name: str, value: Any) -> None:
    """One JSON file of a run, whole or not at all."""
    write_text(run_dir, name, json_text(value))


def json_text(value: Any) -> str:
    """A value as the JSON files of a run have it."""
    # ensure_ascii off: people read these files, in any language
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_text(run_dir: Path, name: str, text: str) -> None:
    """One text file of a run, whole or not at all. What somebody put there while the run went moves
    to previous/N; a description, contracts and a receipt of the run's earlier lives are written over."""
    ours: dict[str, Callable[[Path], object]] = {
        RUN_FILE: ownership.read_run_description,
        CONTRACTS: ownership.is_contracts,
        RECEIPT: lambda path: receipt.is_of_same_run(path, json.loads(text)),
    }
    ownership.write_owned_files(
        run_dir, {name: text.encode()}, ours=lambda path: name in ours and bool(ours[name](path))
    )


def write_adapters(
    run_dir: Path, model: nn.Module, tokenizer: Any, names: Sequence[str], base_name: str
) -> dict[str, str]:
    """The adapter(s) in PEFT's format, and the tokenizer: one adapter in the run directory itself,
    several in a folder each.

    Returns {adapter: SHA-256 of its weights file}. Raises DiskError.
    """
    digests = {
        name: _write_adapter(run_dir, "" if len(names) == 1 else f"{name}/", model, name, base_name)
        for name in names
    }
    # its writer takes a directory and writes over what is there: it gets one of its own first
    with durable.scratch_directory(run_dir / "tokenizer") as folder:
        tokenizer.save_pretrained(folder)
        contents = {
            str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        }
    ownership.write_owned_files(run_dir, contents)
    return digests


def _write_adapter(run_dir: Path, inside: str, model: nn.Module, name: str, base_name: str) -> str:
    """One adapter's files, their names behind ``inside``; the SHA-256 of its weights."""
    # a function of its own: these bytes are gone before those of the next adapter are made
    files = adapter_files(model, name, base_name=base_name)
    ownership.write_owned_files(run_dir, {inside + file: files[file] for file in files})
    # of the bytes that were written, not of what a file may hold by the time it is read
    return hashlib.sha256(files[ADAPTER_WEIGHTS]).hexdigest()


def write_start(run_dir: Path, files: Mapping[str, bytes], names: Sequence[str]) -> None:
    """Copies of the adapter that this run's are trained over, in the folder of each: the directory
    it was read from may move or change. Raises DiskError."""
    for name in names if files else ():
        inside = "" if len(names) == 1 else f"{name}/"
        if inside:
            durable.make_directory(run_dir / name, parents=False)
        ownership.write_owned_files(run_dir, {inside + file: files[file] for file in files})


def build_receipt(
    *,
    data: Mapping[str, Any],
    base: Mapping[str, Any],
    code: str,
    saved: Mapping[str, Mapping[str, str]],
    seed: int | Mapping[str, int],
    sizes: Mapping[str, int],
    processes: int = 1,
) -> dict[str, Any]:
    """Digests of everything the result hangs on. ``saved``: {"adapters": {name: SHA-256}}, or
    {"weights": {file: SHA-256}} of a whole model; ``sizes``: trainable and total parameters, and
    the bytes of what was saved; ``processes``: that made the run.
    """
    # those that make a run's numbers and tokens
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    return {
        "data": dict(data),
        "base": dict(base),
        "code": {"sha256": code, "lorry": version("lorry")},
        "environment": {
            "python": platform.python_version(),
            **{p: version(p) for p in packages},
            "machine": platform.machine(),
            "processes": processes,
        },
        "seed": seed,
        **{kind: dict(digests) for kind, digests in saved.items()},
        **sizes,
    }
