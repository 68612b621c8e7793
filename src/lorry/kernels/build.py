"""Build the kernels once per machine, compiler and source, and load them through ctypes.

Every .cpp of this folder becomes one shared library, `HOME/kernels/DIGEST-CONTENT.so`. The digest
covers sources, compiler, processor and instruction set, so a cache directory shared by unlike machines holds one
library for each; the content's own digest is in the name and checked at every load, and a damaged
library is built again. OpenMP calls bind to the runtime torch has loaded: one pool of threads for
both.

Loading a library runs it. The rule: **nothing is loaded that somebody else could have written.**
The folder and the library belong to this user or to root, and nobody else may write to them; a
folder of ours that others may write to is closed to them, and what they could have altered in it is
built again. A folder of somebody else's is not used: plain torch runs, and the status says what to
do. What is loaded is the very file that was looked at. A compiler has a limit of time, and is
killed with its children.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorry.disk.home import lorry_home
from lorry.disk.integrity import file_digest
from lorry.errors import ConfigError
from lorry.processor import (
    AttentionKernel,
    compiler_flags,
    has_fast_dots,
    isa_in_words,
    processor_flags,
)

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
# LORRY_KERNELS_FLAGS adds to them: a build for a sanitizer, or to measure a flag; it is a library
# of its own in the cache
EXTRA_FLAGS = tuple(shlex.split(os.environ.get("LORRY_KERNELS_FLAGS", "")))
# No -ffast-math: NaN and infinity must pass through the kernels, or broken values would go unseen.
FLAGS = ("-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
# seconds for `--version`, and for all sources side by side: 25 times what they take of one core
PROBE_SECONDS, COMPILE_SECONDS = 30.0, 600.0
# seconds after which a folder that a killed build left is removed; the longest build ends long
# before
ABANDONED_SECONDS = 3600.0
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
BUILD_PREFIX = "building-"  # the temporary folder of a build
LIBRARY_FLAGS = ("-std=c++17", "-shared", "-fPIC", "-w")


@dataclass(frozen=True)
class KernelStatus:
    """Whether the kernels run here; if not, why. ``digest`` names the build, ``amx`` says whether matrix
    tiles are used, ``dots`` whether dot products of bfloat16 pairs, ``isa`` what instruction set it was
    built for.
    """

    active: bool
    reason: str
    digest: str = ""
    amx: bool = False
    dots: bool = False
    isa: str = ""

    @property
    def attention(self) -> AttentionKernel:
        """What computes attention in the formats that the kernels take."""
        if not self.active:
            return "none"
        return "tiles" if self.amx else "dots" if self.dots else "vectors"

    def line(self) -> str:
        """One line for people."""
        if not self.active:
            return f"torch only ({self.reason})"
        ways = {"tiles": ", attention on AMX tiles", "dots": ", attention in bfloat16 dot products"}
        return f"compiled C++ for {self.isa} ({self.digest[:12]}{ways.get(self.attention, '')})"


def load_library() -> ctypes.CDLL | None:
    """The loaded kernels, built first if need be, or None where plain torch has to do. Raises
    ConfigError where LORRY_ISA asks for what this processor lacks.
    """
    return _build_and_load()[0]


def kernel_status() -> KernelStatus:
    """What `load_library` gives here, and why. Raises ConfigError likewise."""
    return _build_and_load()[1]


def call_kernel(name: str, *args: Tensor | int | float | None) -> int:
    """Run a kernel; those named ``*_space`` answer with a number of bytes, the others with 0.

    Tensors (contiguous, on the CPU) go as addresses, whole numbers as long, others as float, None
    as null. Raises ValueError for a tensor that is not contiguous or not on the CPU.
    """
    library = load_library()
    assert library is not None
    function = getattr(library, name)
    function.restype = ctypes.c_long if name.endswith("_space") else None
    arguments: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            if not arg.is_contiguous() or arg.device.type != "cpu":
                raise ValueError(f"{name} takes contiguous tensors on the CPU")
            arguments.append(ctypes.c_void_p(arg.data_ptr()))
        elif arg is None:
            arguments.append(ctypes.c_void_p())
        else:
            arguments.append(ctypes.c_long(arg) if isinstance(arg, int) else ctypes.c_float(arg))
    return int(function(*arguments) or 0)


def kernel_for(name: str, x: Tensor) -> str:
    """The kernel ``name`` for the format of x, of those that are compiled for bfloat16 and
    float32."""
    return f"{name}_fp32" if x.dtype == torch.float32 else name


@cache
def _build_and_load() -> tuple[ctypes.CDLL | None, KernelStatus]:
    if os.environ.get("LORRY_KERNELS") == "0":
        return None, KernelStatus(False, "LORRY_KERNELS=0")
    compiler = next(
        (path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None
    )
    if compiler is None:
        return None, KernelStatus(
            False, "no C++ compiler; install g++ for about twice the speed on a CPU"
        )
    try:
        folder = lorry_home() / "kernels"
    except ConfigError as e:  # nobody's home is known
        return None, KernelStatus(False, f"the built kernels cannot be saved or loaded: {e}")
    try:
        digest = _build_digest(compiler)
        _make_private_folder(folder)
        library = _load_intact(folder, digest)
        if library is None:
            _compile_library(compiler, folder, digest)
            library = _load_intact(folder, digest)
        if library is None:
            return None, KernelStatus(
                False,
                f"the kernels that {compiler} builds cannot be loaded, or lack functions of this version",
            )
    except subprocess.TimeoutExpired as e:
        return None, KernelStatus(
            False,
            (
                f"{compiler} did not finish within {e.timeout:.0f} s and was stopped; "
                "LORRY_KERNELS=0 runs without kernels"
            ),
        )
    except subprocess.CalledProcessError as e:
        messages = (e.stderr or "").strip().splitlines() or [f"exit code {e.returncode}"]
        return None, KernelStatus(False, f"{compiler} failed: {messages[0]}")
    except OSError as e:
        return None, KernelStatus(False, f"the built kernels cannot be saved or loaded: {e}")
    tiles = bool(library.lorry_amx())
    # an older compiler does not know the processor's, and leaves the functions out; one that is told to
    # compile for tiles leaves out the dot products
    dots = not tiles and has_fast_dots() and hasattr(library, "attention_forward")
    return library, KernelStatus(True, "", digest, tiles, dots, isa_in_words())


def _build_digest(compiler: str) -> str:
    """SHA-256 of everything the machine code depends on."""
    parts = [
        compiler,
        _run_command(compiler, "--version", limit=PROBE_SECONDS),
        *FLAGS,
        *compiler_flags(),
        *LIBRARY_FLAGS,
        *EXTRA_FLAGS,
    ]
    # what -march=native reads
    parts += [platform.machine(), platform.processor(), *sorted(processor_flags())]
    parts += [
        p.name + p.read_text() for p in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _run_command(*command: str, limit: float) -> str:
    """Run a command and return its standard output. Raises CalledProcessError, and TimeoutExpired after
    ``limit`` seconds.
    """
    return _run_together([command], limit)[0]


def _run_together(commands: Sequence[Sequence[str]], limit: float) -> list[str]:
    """Run commands side by side and return their standard outputs. Raises CalledProcessError of the
    first that failed, and TimeoutExpired after ``limit`` seconds; none of them is left behind.
    """
    deadline, outputs = time.monotonic() + limit, list[str]()
    processes = list[subprocess.Popen[str]]()
    with _end_by_exception(), ExitStack() as stack:

        def start_all() -> None:
            for command in commands:
                processes.append(stack.enter_context(_start(command)))

        # the limit, Ctrl-C, a signal, a source that failed: g++ is a driver, whose children would go on
        try:
            # handlers of signals run in the main thread: none raises between a start and its place in
            # the list
            with ThreadPoolExecutor(1) as starter:
                starter.submit(start_all).result()
            for process in processes:
                out, err = process.communicate(timeout=max(deadline - time.monotonic(), 0))
                if process.returncode:
                    raise subprocess.CalledProcessError(process.returncode, process.args, out, err)
                outputs.append(out)
        except subprocess.TimeoutExpired as error:
            error.timeout = limit
            _kill(processes)
            raise
        except BaseException:
            _kill(processes)
            raise
    return outputs


class _TerminatedError(BaseException):
    """A signal that ends the process. ``number``: which."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _end_by_exception() -> Iterator[None]:
    """While the block runs SIGTERM and SIGHUP, where they would end the process on the spot, end it once
    the block has cleared up. Blocks nest. A handler that somebody has set, and a signal that is
    ignored, stay as they are; outside the main thread all do.
    """

    def end(number: int, frame: object) -> None:
        for each in handled:  # a second one would come in the midst of clearing up
            signal.signal(each, signal.SIG_IGN)
        raise _TerminatedError(number)

    handled = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if threading.current_thread() is threading.main_thread()
        and signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in handled:
        signal.signal(number, end)
    try:
        yield
    except _TerminatedError as error:
        if not handled:  # of a block around this one, which has more to clear up
            raise
        signal.signal(error.number, signal.SIG_DFL)
        signal.raise_signal(error.number)
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip


def _kill(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Those that run, with their children."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _make_private_folder(folder: Path) -> None:
    """Make the folder, for this user alone to write. Raises PermissionError where it is somebody
    else's.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (os.getuid(), 0):
        raise PermissionError(
            f"{folder} does not belong to this user; set LORRY_HOME to a folder that does"
        )
    if status.st_mode & OTHERS_MAY_WRITE and status.st_uid == os.getuid():
        folder.chmod(stat.S_IMODE(status.st_mode) & ~OTHERS_MAY_WRITE)
    elif status.st_mode & OTHERS_MAY_WRITE:
        raise PermissionError(
            f"others may write to {folder}; set LORRY_HOME to a folder of your own"
        )


def _load_intact(folder: Path, digest: str) -> ctypes.CDLL | None:
    """The library of this digest, loaded, if it is ours alone, its content what its name says, and
    its functions there; else it is removed, so that it is built anew."""
    for path in folder.glob(f"{digest}-*.so"):
        if (library := _load_checked(path, digest)) is not None:
            return library
        path.unlink(missing_ok=True)
    return None


def _load_checked(path: Path, digest: str) -> ctypes.CDLL | None:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    status = os.fstat(file)
    trusted = (
        stat.S_ISREG(status.st_mode)
        and status.st_uid in (os.getuid(), 0)
        and not status.st_mode & OTHERS_MAY_WRITE
    )
    if trusted:
        with open(file, "rb", closefd=False) as opened:
            trusted = (
                path.stem == f"{digest}-{hashlib.file_digest(opened, 'sha256').hexdigest()[:16]}"
            )
    if not trusted:
        os.close(file)
        return None
    # By its descriptor, which nobody can exchange; it stays open, since the loader knows libraries
    # by these names.
    by_descriptor = Path(f"/proc/self/fd/{file}")
    try:
        library = ctypes.CDLL(str(by_descriptor if by_descriptor.exists() else path))
    except OSError:
        return None
    return library if all(hasattr(library, name) for name in _exported_functions()) else None


def _exported_functions() -> list[str]:
    """The names that every build exports: what lines of the sources that begin with LORRY declare, the
    parameters by name or by a macro, whatever the processor."""
    text = "\n".join(p.read_text() for p in sorted(SOURCES.glob("*.cpp")))
    for_all = re.sub(r"^#if.*?^#endif", "", text, flags=re.MULTILINE | re.DOTALL)
    return ["lorry_amx", *re.findall(r"^LORRY \w+ (\w+)", for_all, flags=re.MULTILINE)]


def _remove_abandoned(folder: Path) -> None:
    """What killed builds left: nobody is at work in a folder that old."""
    for leftover in [*folder.glob(f"{BUILD_PREFIX}*"), *folder.glob("tmp*")]:
        if (
            leftover.is_dir()
            and not leftover.is_symlink()
            and time.time() - leftover.lstat().st_mtime > ABANDONED_SECONDS
        ):
            shutil.rmtree(leftover, ignore_errors=True)


def _compile_library(compiler: str, folder: Path, digest: str) -> Path:
    """Compile into a temporary folder, reach the disk, and rename: nobody ever loads half a
    library.
    """
    _remove_abandoned(folder)
    # at once, unlike the notes of whoever asked: it is what they wait for
    log.warning(
        "compiling the kernels for this processor (%s), which is done once and takes up to a minute",
        isa_in_words(),
    )
    with (
        _end_by_exception(),
        tempfile.TemporaryDirectory(dir=folder, prefix=BUILD_PREFIX) as name,
    ):
        objects = {
            source: str(Path(name) / f"{source.stem}.o") for source in sorted(SOURCES.glob("*.cpp"))
        }
        command = (compiler, *FLAGS, *compiler_flags(), *LIBRARY_FLAGS, *EXTRA_FLAGS, "-c")
        _run_together(
            [(*command, str(source), "-o", object_) for source, object_ in objects.items()],
            COMPILE_SECONDS,
        )
        library = Path(name) / "library.so"
        # No -fopenmp here: the calls stay unresolved until torch's own OpenMP runtime, loaded
        # before, provides them.
        _run_command(
            compiler,
            *LIBRARY_FLAGS,
            *EXTRA_FLAGS,
            *objects.values(),
            "-o",
            str(library),
            limit=COMPILE_SECONDS,
        )
        library.chmod(0o700)  # whatever the umask allows others
        with open(library, "rb") as file:
            os.fsync(file.fileno())
        path = folder / f"{digest}-{file_digest(library)[:16]}.so"
        library.replace(path)
    return path
