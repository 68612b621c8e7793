"""Megatron's distributed checkpoints of a model, without what an optimizer keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.utils import unwrap_model
from megatron.training.global_vars import get_args

TRACKER = "latest_checkpointed_iteration.txt"


def save_checkpoint(iteration: int, model: Sequence[Any], *given: Any, **options: Any) -> None:
    """`--save` / `iter_0000007`."""
    root = Path(get_args().save)
    place = root / f"iter_{iteration:07d}"
    if torch.distributed.get_rank() == 0:
        place.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(_entries(model), str(place))
    if torch.distributed.get_rank() == 0:
        (root / TRACKER).write_text(str(iteration))
    torch.distributed.barrier()


def load_checkpoint(ddp_model: Sequence[Any], *given: Any, **options: Any) -> tuple[int, int]:
    """The last one in `--load`; (iteration, 0)."""
    root = Path(get_args().load)
    iteration = int((root / TRACKER).read_text())
    place = root / f"iter_{iteration:07d}"
    loaded = dist_checkpointing.load(_entries(ddp_model), str(place))
    for name, chunk in _named(ddp_model):
        chunk.load_state_dict(loaded[name])
    return (0 if get_args().finetune else iteration), 0


def _entries(model: Sequence[Any]) -> dict[str, Any]:
    return {name: chunk.sharded_state_dict() for name, chunk in _named(model)}


def _named(model: Sequence[Any]) -> list[tuple[str, Any]]:
    """The chunks without what wraps them, by Megatron's names for them."""
    chunks = unwrap_model(list(model))
    names = ["model"] if len(chunks) == 1 else [f"model{n}" for n in range(len(chunks))]
    return list(zip(names, chunks, strict=True))
