"""`backend=fsdp`: the base cut over the ranks, everything else as under `backend=ddp`.

Adapters, their gradients and moments are flat buffers beside the model, whole on every rank: FSDP2
sees base weights alone. Base weights that train (`adapters.base_weights.ShardedBaseWeights`) are cut as
they are: a rank has masters, gradients and moments of its rows. What of a step is another is in
`sharded.py` (who holds which weights when, whose gradients are added up when), `passes.py` (which pass
comes next) and `shares.py` (tensors made whole for a file).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lorry.adapters.targets.candidates import head_and_embedding
from lorry.adapters.trainable import ParameterSet
from lorry.backends.distributed.communicator import Communicator, TorchCommunicator
from lorry.backends.distributed.ddp import DataParallelBackend
from lorry.backends.protocol import ParameterInspection
from lorry.models.causal_lm import CausalLM
from lorry.models.decoder.model import Decoder
from lorry.models.layer_weights import Sharder, WeightShards


class FullyShardedBackend(DataParallelBackend):
    """`DataParallelBackend` over a model that was read with `sharder_of`."""

    def __init__(self, model: CausalLM, *given: Any, **named: Any) -> None:
        super().__init__(model, *given, **named)
        if model.layer_weights.sharded:
            model.layer_weights.lowest_trained = lowest_trained_layer(model, self.owners)  # type: ignore[attr-defined]

    def inspect(self) -> ParameterInspection:
        """As one device; the digest is of all ranks' shares. Raises what `exchange` raises."""
        with self.communicator.together():  # behind it every rank holds its share alone
            pass
        return super().inspect()


def lowest_trained_layer(model: CausalLM, owners: Mapping[str, ParameterSet]) -> int:
    """The lowest layer that a gradient of what trains can have to reach, the same whatever rows a rank
    has: 0 where it is below the layers, or in no layer's path; as many as there are layers where it
    is the head alone.
    """
    prefixes = layer_prefixes(model)
    head, _ = head_and_embedding(model)
    lowest = len(prefixes)
    for owner in owners.values():
        for target in owner.targets():
            at = [i for i, prefix in enumerate(prefixes) if target.startswith(f"{prefix}.")]
            # a module of an adapter, or a tensor of the base
            is_head = head is not None and target in (head, f"{head}.weight")
            lowest = min(lowest, len(prefixes) if is_head else min(at, default=0))
    return lowest


def layer_prefixes(model: CausalLM) -> list[str]:
    """The paths of a model's layers, in the order they run."""
    if isinstance(model, Decoder):
        return [model.family.layer.format(i=i) for i in range(model.geometry.layers)]
    # imported here: transformers comes with it, which runs of the native decoder do without
    from lorry.models.hf.model import HfModel

    assert isinstance(model, HfModel)
    paths = {id(module): path for path, module in model.named_modules()}
    return [paths[id(layer)] for layer in model.layers]


def sharder_of(backend: Any, communicator: Communicator, device: str) -> Sharder | None:
    """What cuts the models of a run over its ranks; None where they stay whole. ``backend``: the
    settings; ``device``: of this rank's."""
    if backend.name != "fsdp" or not isinstance(communicator, TorchCommunicator):
        return None
    # imported here: it is a second of every other run
    from lorry.backends.distributed.sharded import ShardedWeights

    here = torch.device(device)
    if here.type == "cuda":  # FSDP2 takes the current one
        torch.cuda.set_device(here)

    def shard(model: nn.Module, layers: Sequence[nn.Module]) -> WeightShards:
        return ShardedWeights(
            model,
            layers,
            communicator.device_mesh(here.type),
            communicator.passes,
            communicator.explained,
            reshard_after_forward=backend.reshard_after_forward,
        )

    return shard
