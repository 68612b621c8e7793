"""Megatron-core as it was found: its version, the device it wants, and its process groups over the
processes of a run, made once in the life of a process."""

from __future__ import annotations

import math

import megatron.core
import torch
from megatron.core import parallel_state, tensor_parallel

from lorry.errors import ConfigError
from lorry.models.megatron.layout import TESTED_VERSION
from lorry.notes import NoteCallback


def check_version(add_note: NoteCallback) -> str:
    """That of megatron-core; one that was never tried is told."""
    # the module's own: a checkout on PYTHONPATH is no installed package
    found: str = megatron.core.__version__
    if found.split(".")[:2] != TESTED_VERSION.split(".")[:2]:
        add_note(f"megatron-core {found} was never run with Lorry; {TESTED_VERSION} was")
    return found


def use_device(device: torch.device) -> None:
    """Make this rank's device the current one, which Megatron takes. Raises ConfigError where there is no
    current CUDA device."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        torch.cuda.current_device()
    except (RuntimeError, AssertionError) as e:  # torch without CUDA asserts
        raise ConfigError(
            "backend=megatron needs a CUDA device, which Megatron-core asks for wherever it runs "
            f"({str(e).splitlines()[0]}); give backend=ddp or fsdp"
        ) from e


def join_groups(tensor_size: int, timeout: float) -> None:
    """Make Megatron's groups: neighbours of ``tensor_size`` share a model, as in `ranks.Mesh`. All
    processes call this together. ``timeout``: seconds after which a collective is given up. Raises
    ConfigError where this process has others already."""
    if not torch.distributed.is_initialized():
        # a run of one process has joined nobody
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    if parallel_state.model_parallel_is_initialized():
        size = parallel_state.get_tensor_model_parallel_world_size()
        if size != tensor_size:
            raise ConfigError(
                f"backend.tensor_parallel={tensor_size}: this process has Megatron's groups of {size} "
                "already, and has them once; make the run in a process of its own"
            )
        return
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_size,
        distributed_timeout_minutes=max(1, math.ceil(timeout / 60)),
    )
    # its dropout's, which is off; attention asks for it all the same
    tensor_parallel.model_parallel_cuda_manual_seed(0)
