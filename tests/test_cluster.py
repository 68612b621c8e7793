"""`examples/cluster`: each file is what its scheduler reads, and says a command that Lorry has; Slurm's
is run here, with a stand-in for srun, and Ray's by Ray.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.run import get_args_parser

from lorry import cli
from lorry.config import RunConfig, parse_settings
from tests.support import tinyrun

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "examples" / "cluster"
STEPS = 3
# srun, as far as the script uses it: its options are dropped, every task gets its numbers
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$((i % SLURM_NTASKS_PER_NODE)) "$@" &
    tasks+=($!)
done
status=0
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status
"""
SCONTROL = (
    "#!/bin/bash\n[[ $* == 'show hostnames node-[1-2]' ]] && printf '127.0.0.1\\nnode-2\\n'\n"
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cluster")
    tinyrun.model_directory(made / "model")
    tinyrun.write_rows(made / "data.jsonl", tinyrun.rows(12))
    return made


def words_of(folder: Path, out: str) -> list[str]:
    """A short run; the same steps on any number of processes."""
    settings: dict[str, Any] = {
        **tinyrun.DEFAULTS,
        "model": folder / "model",
        "data": folder / "data.jsonl",
        "output_dir": folder / out,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "warmup_ratio": 0,
        "save_strategy": "no",
    }
    return [f"{name}={value}" for name, value in settings.items()]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Tensor]:
    """The adapter of one process."""
    assert cli.main(["sft", *words_of(folder, "alone")]) == 0
    return load_file(folder / "alone" / "adapter_model.safetensors")


def run(command: Sequence[str | Path], environment: dict[str, str]) -> None:
    """Run an example, with this Python as the one that it finds."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD"))}
    ran = subprocess.run(
        [str(word) for word in command],
        env={**outside, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]


def assert_same_adapter(got: Path, true: dict[str, Tensor]) -> None:
    described = yaml.safe_load((got / "run.yaml").read_text())
    assert described["backend"]["name"] == "fsdp"
    tensors = load_file(got / "adapter_model.safetensors")
    assert set(tensors) == set(true)
    moved = 0.0
    for name, value in true.items():
        size = float(torch.linalg.vector_norm(value))
        assert float(torch.linalg.vector_norm(tensors[name] - value)) < 1e-3 * size, name
        moved += size
    assert moved > 0


# --- run


@pytest.mark.timeout(600)
def test_slurm_runs_it_on_two_nodes(folder: Path, alone: dict[str, Tensor], tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    search = f"{tmp_path}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "MASTER_PORT": str(free_port()),
        "PATH": search,
    }
    words = [*words_of(folder, "slurm"), "keep_total=true"]
    run(["bash", CLUSTER / "slurm.sh", *words], slurm)
    assert_same_adapter(folder / "slurm", alone)


@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed (extra ray)")
def test_ray_runs_it_on_two_workers(folder: Path, alone: dict[str, Tensor], tmp_path: Path) -> None:
    words = [*words_of(folder, "ray"), "keep_total=true"]
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    storage = ["--storage", tmp_path / "storage"]
    run([sys.executable, CLUSTER / "ray_train.py", "--workers", "2", *storage, *words], quiet)
    assert_same_adapter(folder / "ray", alone)


# --- read


def torchrun(words: Sequence[str], nodes: int | None, processes: int | None) -> None:
    """The words are torchrun's, and what it starts is a run that Lorry reads."""
    args = get_args_parser().parse_args(words)
    assert args.module
    assert args.training_script == "lorry"
    assert (args.nnodes, args.nproc_per_node) == (
        "1:1" if nodes is None else str(nodes),
        "1" if processes is None else str(processes),
    )
    verb, *settings = args.training_script_args
    assert verb == "sft"
    known = [str(ROOT / "examples" / "sft.yaml") if w.endswith("run.yaml") else w for w in settings]
    assert known != settings
    config = parse_settings(RunConfig, known, print)
    assert config.backend.name == "fsdp"
    assert str(config.output_dir).startswith("/shared/")


def test_slurms_file_asks_for_two_nodes_and_a_task_for_each_gpu() -> None:
    lines = (CLUSTER / "slurm.sh").read_text().splitlines()
    asked = dict(
        line.removeprefix("#SBATCH --").split("=") if "=" in line else (line[10:], "")
        for line in lines
        if line.startswith("#SBATCH")
    )
    assert asked["nodes"] == "2"
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    # the run saves and stops when it is told that its time ends
    assert asked["signal"].startswith("TERM@")
    # and is told so before anything else: Slurm reads its words only above the first command
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < first


def test_skypilots_file_starts_torchrun_on_each_node() -> None:
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert task["num_nodes"] == 2
    told = {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    # the shell's own reading of it, with torchrun in the place of a program that prints its words
    script = 'torchrun() { printf "%s\\0" "$@"; }\n' + task["run"]
    ran = subprocess.run(
        ["bash", "-euc", script], env={**os.environ, **told}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    words = ran.stdout.split("\0")[:-1]
    torchrun(words, 2, 8)
    args = get_args_parser().parse_args(words)
    assert (args.node_rank, args.master_addr) == (1, "10.0.0.1")
    assert any(mount.startswith("/shared") for mount in task["file_mounts"])


def test_kubeflows_job_runs_torchrun_over_a_shared_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    job = yaml.safe_load((CLUSTER / "kubeflow-trainjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    spec = job["spec"]
    assert spec["runtimeRef"]["name"] == "torch-distributed"
    trainer = spec["trainer"]
    assert trainer["numNodes"] == 2
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert trainer["command"] == ["torchrun"]
    # what the runtime sets for torchrun
    monkeypatch.setenv("PET_NNODES", str(trainer["numNodes"]))
    monkeypatch.setenv("PET_NPROC_PER_NODE", str(trainer["numProcPerNode"]))
    torchrun(trainer["args"], 2, 8)
    (patch,) = spec["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    (volume,), (container,) = pod["volumes"], pod["containers"]
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/shared"}]


def test_each_file_says_how_it_is_started() -> None:
    for path in CLUSTER.iterdir():
        assert str(path.relative_to(ROOT)) in path.read_text(), path.name
