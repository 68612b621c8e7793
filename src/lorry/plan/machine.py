"""What the plan knows of machines: GPUs by name, and what tells this machine from every other."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from lorry.errors import ConfigError
from lorry.plan.constants import GIB
from lorry.processor import (
    AttentionKernel,
    cpuinfo_values,
    has_fast_dots,
    isa_in_words,
    mkl_is_slow,
    processor_flags,
    processor_name,
)

NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
# What changes torch's speed from outside: threads it takes unasked, instruction sets it is held to.
IDENTITY_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY", "LORRY_KERNELS", "LORRY_ISA", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip


@dataclass(frozen=True)
class GpuSpec:
    """Usable memory in bytes, and dense bf16 FLOP/s as the maker gives them."""

    memory: int
    rate: float


# below the nominal size: what the driver and ECC keep is gone before a process starts
GPUS = {
    "a100-40gb": GpuSpec(int(39.4 * GIB), 312e12),
    "a100-80gb": GpuSpec(int(79.2 * GIB), 312e12),
    "h100": GpuSpec(int(79.1 * GIB), 989e12),
    "h200": GpuSpec(int(139.8 * GIB), 989e12),
    "b200": GpuSpec(int(178.0 * GIB), 2250e12),
    "l40s": GpuSpec(int(44.4 * GIB), 362e12),
    "rtx4090": GpuSpec(int(23.5 * GIB), 165e12),
}


def has_cuda() -> bool:
    """Whether an NVIDIA driver sees a GPU, without importing torch."""
    return NVIDIA_GPUS.is_dir() and any(NVIDIA_GPUS.iterdir())


def available_cores() -> set[int]:
    """The numbers of the CPU cores that this process may use."""
    # not os.cpu_count(): a container or taskset may leave this process fewer
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def available_threads() -> int:
    """CPU threads this process may use."""
    return len(available_cores())


def machine_identity(device: str, precision: str, threads_asked: int | None) -> dict[str, Any]:
    """What a measured rate holds for: plain values, equal only for ways of computing that are
    alike.

    A processor's name alone says little: cloud machines of one name differ in instruction sets,
    cores and neighbours. ``threads_asked``: None, as many as torch takes by itself. Raises
    ConfigError where LORRY_ISA asks for what this processor lacks.
    """
    # a digest: the flags are some 150 words, and only their being equal counts
    flags = hashlib.sha256(" ".join(sorted(processor_flags())).encode()).hexdigest()[:16]
    return {
        "host": platform.node(),
        "processor": [
            processor_name(),
            *cpuinfo_values("cpu family", "model", "stepping"),
            f"flags {flags}",
        ],
        "cores": available_threads(),
        "gpus": list_gpus() if device == "cuda" else [],
        "device": device,
        "precision": precision,
        "threads": threads_asked,
        "kernels": attention_kernel() if device == "cpu" else "none",
        **(
            {"matmul": "kernel"}
            if (device, precision) == ("cpu", "float32") and has_matmul()
            else {}
        ),
        "torch": torch_version(),
        "environment": {
            name: os.environ[name] for name in IDENTITY_VARIABLES if name in os.environ
        },
    }


def list_gpus() -> list[str]:
    """Names of the GPUs that the NVIDIA driver lists."""
    try:
        texts = [(gpu / "information").read_text() for gpu in sorted(NVIDIA_GPUS.iterdir())]
    except OSError:
        return []
    lines = [line for text in texts for line in text.splitlines()]
    return [line.partition(":")[2].strip() for line in lines if line.startswith("Model")]


def torch_version() -> str:
    """torch's version without importing it; empty where it is not installed."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def load_average() -> float | None:
    """Processes that want a core, over the last minute; None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None


def dtype_of_auto() -> Literal["float32", "bfloat16"] | None:
    """What dtype=auto is told to mean, whatever this machine has: ``LORRY_DTYPE=float32`` or
    ``bfloat16``; None: it decides.

    So that one machine can run what another kind would run. Raises ConfigError for another value.
    """
    match os.environ.get("LORRY_DTYPE", ""):
        case "":
            return None
        case "float32" | "bfloat16" as word:
            return word
        case word:
            raise ConfigError(
                f"LORRY_DTYPE={word!r} in the environment; give float32 or bfloat16, or leave it out"
            )


def attention_kernel() -> AttentionKernel:
    """Which attention will run on this CPU: kernels need a compiler to build them with
    (kernels/build.py), the better ones matrix tiles or fast dot products. Raises ConfigError where LORRY_ISA asks for what this processor lacks.
    """
    compiler = (
        any(map(shutil.which, ("g++", "c++", "clang++"))) and os.environ.get("LORRY_KERNELS") != "0"
    )
    if not compiler:
        return "none"
    return "tiles" if isa_in_words() == "amx" else "dots" if has_fast_dots() else "vectors"


def has_matmul() -> bool:
    """Whether a kernel multiplies float32 on this CPU, and not torch's library (kernels/matmul.py). Raises
    ConfigError likewise."""
    return mkl_is_slow() and attention_kernel() != "none"
