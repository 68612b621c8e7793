"""Megatron-core on a CPU, for tests alone: it asks for a current CUDA device, streams and generators
wherever it runs. Nothing that is shipped imports this (`tests/integrations/megatron` says so).

    with cuda_on_cpu():
        model = GPTModel(...)

What is replaced while the block runs, and by what:
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class NoStream:
    """A stream and an event of a device that has none: what is asked of it has happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass


def rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def itself(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


def nothing(*args: Any, **kwargs: Any) -> None:
    pass


REPLACED: dict[str, Any] = {
    "torch.cuda.current_device": lambda: CPU,
    "torch.Tensor.cuda": itself,
    "torch.cuda.synchronize": nothing,
    "torch.cuda.Stream": NoStream,
    "torch.cuda.stream": lambda stream: nullcontext(),
    "torch.cuda.current_stream": NoStream,
    "torch.cuda.Event": NoStream,
    "torch.cuda.get_rng_state": rng_state,
    "torch.cuda.set_rng_state": set_rng_state,
    "torch.cuda.manual_seed": lambda seed: torch.manual_seed(seed),
    "megatron.core.tensor_parallel.random._get_cuda_rng_state": rng_state,
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": set_rng_state,
}
__doc__ += "\n".join(f"    {name}" for name in REPLACED) + "\n    any device that says cuda\n"  # type: ignore[operator]


class DeviceRewrite(TorchFunctionMode):
    """`device="cuda"` of a torch function is the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = CPU
        args = tuple(
            CPU if isinstance(a, torch.device | str) and str(a).startswith("cuda") else a
            for a in args
        )
        return func(*args, **kwargs)


@contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """The replacements, undone at the end."""
    with ExitStack() as stack:
        for name, value in REPLACED.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(DeviceRewrite())
        yield
