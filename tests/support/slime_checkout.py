"""slime's own code on a CPU, from a checkout (LORRY_SLIME=DIR, and LORRY_MEGATRON=DIR for the
Megatron-LM that it runs on), for tests alone. It takes numpy 1.26, and Ray, wandb and psutil installed.

What is replaced, beside what `cuda_shim.py` replaces: slime's accelerator by one of the CPU; packages that
are not installed (SGLang and its router, torch_memory_saver, pynvml) by modules of which every attribute is a mock.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

import torch

ABSENT = ("sglang", "sglang_router", "torch_memory_saver", "pynvml")


class MockedModule(ModuleType):
    """A package that has whatever is asked of it."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = mock.MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class MockedPackages(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules of packages that are not installed."""

    def __init__(self) -> None:
        self._names = {name for name in ABSENT if importlib.util.find_spec(name) is None}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        known = name.partition(".")[0] in self._names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return MockedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def cpu_accelerator() -> Any:
    """slime's accelerator of CUDA, with what needs a device answered for the CPU."""
    from slime.utils.accelerator.cuda import CUDAAccelerator

    def cpu(*given: Any) -> torch.device:
        return torch.device("cpu")

    def nothing(*given: Any) -> None: ...

    answers = {
        "is_available": lambda self: True,
        "device": cpu,
        "device_name": lambda self, index=None: "cpu",
        "current_device": lambda self: "cpu",
        "device_count": lambda self: 1,
        "communication_backend": lambda self, default="nccl": "gloo",
        "mem_get_info": lambda self, device=None: (0, 0),
        "memory_allocated": lambda self, device=None: 0,
        "memory_reserved": lambda self, device=None: 0,
        **dict.fromkeys(("set_device", "synchronize", "empty_cache", "ipc_collect"), nothing),
    }
    return type("CpuAccelerator", (CUDAAccelerator,), answers)()


def mock_absent_packages() -> None:
    """Let slime be imported where packages of GPUs are not installed."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not any(isinstance(finder, MockedPackages) for finder in sys.meta_path):
        sys.meta_path.append(MockedPackages())


@contextmanager
def slime_on_cpu() -> Iterator[None]:
    """slime's accelerator is the CPU while the block runs."""
    from slime.utils import accelerator

    accelerator.set_accelerator(cpu_accelerator())
    try:
        yield
    finally:
        accelerator.reset_accelerator()
