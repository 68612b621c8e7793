"""What the plan knows of machines: GPUs by name, this machine's processor, and the matrix rate that was measured here before."""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorry.disk import durable
from lorry.disk.home import home
from lorry.errors import ConfigError
from lorry.plan.constants import GIB

NVIDIA = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True)
class Gpu:
    """Usable memory in bytes, and dense bf16 FLOP/s as the maker gives them."""

    memory: int
    rate: float


GPUS = {
    "a100-40gb": Gpu(int(39.4 * GIB), 312e12),
    "a100-80gb": Gpu(int(79.2 * GIB), 312e12),
    "h100": Gpu(int(79.1 * GIB), 989e12),
    "h200": Gpu(int(139.8 * GIB), 989e12),
    "b200": Gpu(int(178.0 * GIB), 2250e12),
    "l40s": Gpu(int(44.4 * GIB), 362e12),
    "rtx4090": Gpu(int(23.5 * GIB), 165e12),
}


def has_cuda() -> bool:
    """Whether an NVIDIA driver sees a GPU, without importing torch."""
    return NVIDIA.is_dir() and any(NVIDIA.iterdir())


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def threads() -> int:
    """CPU threads this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rate_key(device: str, precision: str, count: int) -> str:
    """What a measured rate depends on."""
    return f"{processor()} x{count} {precision}" if device == "cpu" else f"cuda {platform.node()} {precision}"


def known_rate(key: str) -> float | None:
    """A rate measured here earlier, FLOP/s; None if there is none, or the file is not ours."""
    try:
        value = json.loads((home() / "rates.json").read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError):
        return None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e18 else None


def keep_rate(key: str, rate: float) -> None:
    """Remember a rate for the next plan. Raises DiskError."""
    file = home() / "rates.json"
    try:
        rates = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        rates = {}
    text = json.dumps({**(rates if isinstance(rates, dict) else {}), key: rate}, indent=2, sort_keys=True) + "\n"
    durable.make_directory(file.parent)
    durable.write_files(file.parent, {file.name: text.encode()})


def _flags() -> set[str]:
    """The processor's features, as the kernel of the system lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {"bf16"} if platform.machine() == "arm64" else set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.partition(":")[2].split()}


def dtype_of_auto() -> Literal["float32", "bfloat16"] | None:
    """What dtype=auto is told to mean, whatever this machine has: ``LORRY_DTYPE=float32`` or ``bfloat16``; None: it decides.

    So that one machine can run what another kind would run. Raises ConfigError for another value.
    """
    match os.environ.get("LORRY_DTYPE", ""):
        case "":
            return None
        case "float32" | "bfloat16" as word:
            return word
        case word:
            raise ConfigError(f"LORRY_DTYPE={word!r} in the environment; give float32 or bfloat16, or leave it out")


def fast_bfloat16() -> bool:
    """Whether this processor multiplies matrices in bfloat16 itself; models/load.py asks torch the same."""
    return bool(_flags() & {"amx_bf16", "avx512_bf16", "bf16", "svebf16"})


def has_tiles() -> bool:
    """Whether the attention kernel will run: matrix tiles, and a compiler to build it with (kernels/build.py)."""
    compiler = any(map(shutil.which, ("g++", "c++", "clang++"))) and os.environ.get("LORRY_KERNELS") != "0"
    return compiler and {"amx_tile", "amx_bf16"} <= _flags()
