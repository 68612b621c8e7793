"""What a run leaves in its directory besides metrics and checkpoints: adapter, run.yaml, receipt, contracts."""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from lorry.bank.peft_io import adapter_files
from lorry.disk import durable

WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = ("adapter_config.json", WEIGHTS, "lorry_adapter.json")
# of a run that trained the base's own weights; a large model lies in several files beside its index
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json")
SHARDS = "model-*-of-*.safetensors"
RESULTS = (
    "receipt.json", "contracts.json", "samples.json", "evaluation.json", "report.html", "report.png", "README.md",
    "losses.json", "sweep.json", *ADAPTER_FILES,
)  # fmt: skip


def write_json(run_dir: Path, name: str, value: Any) -> None:
    """One JSON file of a run, whole or not at all."""
    durable.make_directory(run_dir)
    durable.write_files(run_dir, {name: (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()})


def write_text(run_dir: Path, name: str, text: str) -> None:
    """One text file of a run, whole or not at all."""
    durable.make_directory(run_dir)
    durable.write_files(run_dir, {name: text.encode()})


def adapter_folder(run_dir: Path, name: str, adapters: int) -> Path:
    """Where an adapter of a run lies: one alone in the run directory itself, several in a folder each."""
    return run_dir if adapters == 1 else run_dir / name


def write_adapters(run_dir: Path, model: nn.Module, tokenizer: Any, names: Sequence[str], base_name: str) -> dict[str, str]:
    """The adapter(s) in PEFT's format, and the tokenizer: one adapter in the run directory itself, several in a folder each.

    Returns {adapter: SHA-256 of its weights file}.
    """
    digests = {}
    for name in names:
        folder = adapter_folder(run_dir, name, len(names))
        files = adapter_files(model, name, base_name=base_name)
        durable.make_directory(folder)
        durable.write_files(folder, files)
        digests[name] = hashlib.sha256(files[WEIGHTS]).hexdigest()
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        contents = {p.name: p.read_bytes() for p in sorted(Path(scratch).iterdir()) if p.is_file()}
    durable.write_files(run_dir, contents)
    return digests


def receipt(
    *,
    data: Mapping[str, Any],
    base: Mapping[str, Any],
    code: str,
    saved: Mapping[str, Mapping[str, str]],
    seed: int | Mapping[str, int],
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    """Digests of everything the result hangs on. ``saved``: {"adapters": {name: SHA-256}}, or {"weights": {file: SHA-256}} of a
    whole model; ``sizes``: trainable and total parameters, and the bytes of what was saved."""
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    return {
        "data": dict(data),
        "base": dict(base),
        "code": {"sha256": code, "lorry": version("lorry")},
        "environment": {"python": platform.python_version(), **{p: version(p) for p in packages}, "machine": platform.machine()},
        "seed": seed,
        **{kind: dict(digests) for kind, digests in saved.items()},
        **sizes,
    }
