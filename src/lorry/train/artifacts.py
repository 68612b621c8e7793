"""What a run leaves in its directory besides metrics and checkpoints: adapter, run.yaml, receipt, contracts, model card."""

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

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "lorry_adapter.json")
RESULTS = (
    "receipt.json", "contracts.json", "samples.json", "evaluation.json", "report.html", "report.png", "README.md",
    "sweep.json", *ADAPTER_FILES,
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
        digests[name] = hashlib.sha256(files["adapter_model.safetensors"]).hexdigest()
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        contents = {p.name: p.read_bytes() for p in sorted(Path(scratch).iterdir()) if p.is_file()}
    durable.write_files(run_dir, contents)
    return digests


def receipt(
    *, data: Mapping[str, Any], base: Mapping[str, Any], code: str, adapters: Mapping[str, str], seed: int | Mapping[str, int]
) -> dict[str, Any]:
    """Digests of everything the result hangs on."""
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    return {
        "data": dict(data),
        "base": dict(base),
        "code": {"sha256": code, "lorry": version("lorry")},
        "environment": {"python": platform.python_version(), **{p: version(p) for p in packages}, "machine": platform.machine()},
        "seed": seed,
        "adapters": dict(adapters),
    }


def card(
    *,
    name: str,
    base: str,
    data: str,
    adapters: int,
    spec: Mapping[str, Any],
    figures: Mapping[str, Any],
    contracts: Sequence[Mapping[str, Any]],
) -> str:
    """README.md of a run: a model card that says what its adapter is (or its several ones are), from what, and what held."""
    lead = "A LoRA adapter" if adapters == 1 else f"{adapters} LoRA adapters, trained in one pass, each in a folder of its name,"
    shown = "\n".join(f"| {key} | {value} |" for key, value in {**spec, **figures}.items())
    held = "\n".join(f"- {c['status'].replace('_', ' ')}: {c['name']} ({c['detail']})" for c in contracts)
    return (
        f"---\nlibrary_name: peft\nbase_model: {json.dumps(base)}\ntags: [lora, lorry]\n---\n\n# {name}\n\n"
        f"{lead} for `{base}`, trained with Lorry on `{data}`.\n\n| | |\n|---|---|\n{shown}\n\n"
        f"## Use\n\n```python\nimport lorry\nmodel, tokenizer = lorry.load({json.dumps(name)})\n"
        f'print(lorry.generate(model, tokenizer, "..."))\n```\n\n## Contracts\n\n{held}\n'
    )
