"""Build the kernels once per machine, compiler and source, and load them through ctypes.

Every .cpp of this folder becomes one shared library in `HOME/kernels/DIGEST.so`. The digest covers sources, compiler and
processor, so a cache directory shared by unlike machines holds one library for each. OpenMP calls bind to the runtime torch
has loaded: one pool of threads for both.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorry.disk.home import home

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
SHAPE = ("-std=c++17", "-shared", "-fPIC", "-w")


@dataclass(frozen=True)
class Status:
    """Whether the kernels run here; if not, why. ``digest`` names the build, ``amx`` whether matrix tiles are used."""

    active: bool
    reason: str
    digest: str = ""
    amx: bool = False

    def line(self) -> str:
        """One line for people."""
        if not self.active:
            return f"torch only ({self.reason})"
        return f"compiled C++ ({self.digest[:12]}{', attention on AMX tiles' if self.amx else ''})"


def library() -> ctypes.CDLL | None:
    """The loaded kernels, built first if need be, or None where plain torch has to do."""
    return _load()[0]


def status() -> Status:
    """What `library` gives here, and why."""
    return _load()[1]


def call(name: str, *args: Tensor | int | float | None) -> None:
    """Run a kernel: tensors (contiguous, on the CPU) go as addresses, whole numbers as long, others as float, None as null.

    Raises ValueError for a tensor that is not contiguous or not on the CPU.
    """
    found = library()
    assert found is not None
    given: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            if not arg.is_contiguous() or arg.device.type != "cpu":
                raise ValueError(f"{name} takes contiguous tensors on the CPU")
            given.append(ctypes.c_void_p(arg.data_ptr()))
        elif arg is None:
            given.append(ctypes.c_void_p())
        else:
            given.append(ctypes.c_long(arg) if isinstance(arg, int) else ctypes.c_float(arg))
    getattr(found, name)(*given)


@cache
def _load() -> tuple[ctypes.CDLL | None, Status]:
    if os.environ.get("LORRY_KERNELS") == "0":
        return None, Status(False, "LORRY_KERNELS=0")
    compiler = next((found for name in ("g++", "c++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        return None, Status(False, "no C++ compiler; install g++ for about twice the speed on a CPU")
    try:
        digest = _digest(compiler)
        path = home() / "kernels" / f"{digest}.so"
        if not path.is_file():
            _compile(compiler, path)
        loaded = ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as e:
        return None, Status(False, f"{compiler} failed: {(e.stderr or '').strip().splitlines()[:1]}")
    except OSError as e:
        return None, Status(False, f"the built kernels cannot be kept or loaded: {e}")
    return loaded, Status(True, "", digest, bool(loaded.lorry_amx()))


def _digest(compiler: str) -> str:
    """SHA-256 of everything the machine code depends on."""
    parts = [compiler, subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout]
    parts += [*FLAGS, *SHAPE, platform.machine(), torch.backends.cpu.get_cpu_capability(), _processor()]
    parts += [p.name + p.read_text() for p in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _processor() -> str:
    """What -march=native reads: the processor's feature flags, where the system tells them."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _compile(compiler: str, path: Path) -> None:
    """Compile into a temporary file beside ``path`` and rename it there, so that nobody ever loads half a library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = []
        for source in sorted(SOURCES.glob("*.cpp")):
            objects.append(str(Path(folder) / f"{source.stem}.o"))
            command = [compiler, *FLAGS, *SHAPE, "-c", str(source), "-o", objects[-1]]
            subprocess.run(command, check=True, capture_output=True, text=True)
        made = Path(folder) / path.name
        # No -fopenmp here: the calls stay unresolved until torch's own OpenMP runtime, loaded before, provides them.
        subprocess.run([compiler, *SHAPE, *objects, "-o", str(made)], check=True, capture_output=True, text=True)
        made.replace(path)
