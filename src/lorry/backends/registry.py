"""Backends by name: `backend.name` of a run chooses one. A new one is a module beside this one (or in
`distributed/`) and a line here. Whatever asks a model, or trains one, gets what runs it from here.
"""

from __future__ import annotations

from collections.abc import Callable

from lorry.adapters.mix import Mix
from lorry.backends.distributed.communicator import ONE_PROCESS, Communicator
from lorry.backends.distributed.ddp import DataParallelBackend
from lorry.backends.distributed.fsdp import FullyShardedBackend
from lorry.backends.distributed.scorer import SharedModelScorer
from lorry.backends.local import LocalBackend
from lorry.backends.protocol import Backend
from lorry.generation.scorer import ModelScorer
from lorry.models.causal_lm import CausalLM

# (model, names that train, {name: OptimSettings}) -> the backend
BACKENDS: dict[str, Callable[..., Backend]] = {
    "single": LocalBackend,
    "ddp": DataParallelBackend,
    "fsdp": FullyShardedBackend,
    "megatron": DataParallelBackend,  # over another model: `distributed.megatron.converter_of`
}


def open_scorer(
    model: CausalLM,
    communicator: Communicator = ONE_PROCESS,
    mix: Mix | None = None,
    *,
    share_prefixes: bool = False,
) -> ModelScorer:
    """A model that is only asked, on one process or, on every rank alike, by all of them. ``mix``,
    ``share_prefixes``: as `ModelScorer` has them.
    """
    if communicator.size == 1:
        return ModelScorer(model, mix, share_prefixes=share_prefixes)
    return SharedModelScorer(model, communicator, mix, share_prefixes=share_prefixes)
