"""Build the kernels once per machine, compiler and source, and load them through ctypes.

Every .cpp of this folder becomes one shared library, `HOME/kernels/DIGEST-CONTENT.so`. The digest covers sources, compiler and
processor, so a cache directory shared by unlike machines holds one library for each; the content's own digest is in the name
and checked at every load, and a damaged library is built again. OpenMP calls bind to the runtime torch has loaded: one pool of
threads for both.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
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
from lorry.disk.integrity import file_digest

SOURCES = Path(__file__).parent
# LORRY_KERNELS_FLAGS adds to them: a build for a sanitizer, or to measure a flag; it is a library of its own in the cache
ADDED = tuple(shlex.split(os.environ.get("LORRY_KERNELS_FLAGS", "")))
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
WIDE = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
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


def call(name: str, *args: Tensor | int | float | None) -> int:
    """Run a kernel; those named ``*_space`` answer with a number of bytes, the others with 0.

    Tensors (contiguous, on the CPU) go as addresses, whole numbers as long, others as float, None as null.
    Raises ValueError for a tensor that is not contiguous or not on the CPU.
    """
    found = library()
    assert found is not None
    function = getattr(found, name)
    function.restype = ctypes.c_long if name.endswith("_space") else None
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
    return int(function(*given) or 0)


@cache
def _load() -> tuple[ctypes.CDLL | None, Status]:
    if os.environ.get("LORRY_KERNELS") == "0":
        return None, Status(False, "LORRY_KERNELS=0")
    compiler = next((found for name in ("g++", "c++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        return None, Status(False, "no C++ compiler; install g++ for about twice the speed on a CPU")
    try:
        digest, folder = _digest(compiler), home() / "kernels"
        path = _intact(folder, digest) or _compile(compiler, folder, digest)
        loaded = ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as e:
        said = (e.stderr or "").strip().splitlines() or [f"exit code {e.returncode}"]
        return None, Status(False, f"{compiler} failed: {said[0]}")
    except (OSError, RuntimeError) as e:  # RuntimeError: nobody's home is known
        return None, Status(False, f"the built kernels cannot be kept or loaded: {e}")
    return loaded, Status(True, "", digest, bool(loaded.lorry_amx()))


def _digest(compiler: str) -> str:
    """SHA-256 of everything the machine code depends on."""
    parts = [compiler, _run(compiler, "--version"), *FLAGS, *WIDE, *SHAPE, *ADDED]
    parts += [platform.machine(), torch.backends.cpu.get_cpu_capability(), _processor()]
    parts += [p.name + p.read_text() for p in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _processor() -> str:
    """What -march=native reads: the processor's feature flags, where the system tells them."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _run(*command: str) -> str:
    """Run a command and return what it said. Raises CalledProcessError."""
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace").stdout


def _intact(folder: Path, digest: str) -> Path | None:
    """The library of this digest, if its content is what its name says; damaged ones are removed."""
    for path in folder.glob(f"{digest}-*.so"):
        if path.stem == f"{digest}-{file_digest(path)[:16]}":
            return path
        path.unlink(missing_ok=True)
    return None


def _compile(compiler: str, folder: Path, digest: str) -> Path:
    """Compile into a temporary folder, reach the disk, and rename: nobody ever loads half a library."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        objects = []
        for source in sorted(SOURCES.glob("*.cpp")):
            objects.append(str(Path(name) / f"{source.stem}.o"))
            _run(compiler, *FLAGS, *WIDE, *SHAPE, *ADDED, "-c", str(source), "-o", objects[-1])
        made = Path(name) / "made.so"
        # No -fopenmp here: the calls stay unresolved until torch's own OpenMP runtime, loaded before, provides them.
        _run(compiler, *SHAPE, *ADDED, *objects, "-o", str(made))
        with open(made, "rb") as file:
            os.fsync(file.fileno())
        path = folder / f"{digest}-{file_digest(made)[:16]}.so"
        made.replace(path)
    return path
