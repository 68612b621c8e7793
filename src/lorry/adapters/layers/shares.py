"""A weight of which each rank of a run holds some rows (`backend=fsdp`), and any other: what is here of
it, and all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class WeightShares(Protocol):
    """A model's weights as the ranks of a run hold them, each its rows of every one
    (`backends.distributed.sharded.ShardedWeights`). Every rank makes the same calls in one order."""

    @property
    def shard(self) -> int:
        """The number of this rank's share; ranks that hold a copy have the same."""

    def local_rows(self, weight: Tensor) -> slice:
        """The rows (of dimension 0) that this rank holds."""

    def add_gradients_to(self, grads: Mapping[nn.Parameter, Tensor]) -> None:
        """From now on let each backward pass add the gradients of these weights, summed over all data
        ranks, to this rank's rows of them, fp32."""

    def release(self) -> None:
        """Let go of what passes have gathered."""

    def add_up(self, what: str, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the shares; returns it."""

    def whole_tensors(
        self, shares: Mapping[str, tuple[nn.Parameter, Tensor]]
    ) -> Mapping[str, Tensor]:
        """{name: a tensor of a weight's shape}, of which ``shares`` has this rank's rows. Each is made
        when it is read: by all ranks, or by rank 0 alone while the others follow (`on_main`)."""


def is_sharded(weight: Tensor) -> bool:
    """Whether a weight is a DTensor, of which a rank holds a share."""
    return hasattr(weight, "to_local")


def local_share(weight: Tensor) -> Tensor:
    """This rank's share of a sharded weight, the memory itself; any other weight as it is."""
    return weight.detach().to_local() if is_sharded(weight) else weight.detach()  # type: ignore[attr-defined]


def whole_weight(weight: Tensor) -> Tensor:
    """All of a weight. The shares of a sharded one are joined, for which all ranks come here together."""
    if not is_sharded(weight):
        return weight.detach()
    shares: Any = weight.detach()
    whole: Tensor
    if weight.dtype == torch.int16:
        # gloo sends no integers of 16 bits; numbers of as many are copied bit by bit
        whole = shares.view(torch.bfloat16).full_tensor().view(torch.int16)
    else:
        whole = shares.full_tensor()
    return whole


def shares_of(model: nn.Module) -> WeightShares | None:
    """Who knows which rows of its weights this rank has; None of a model that it has whole."""
    weights = getattr(model, "layer_weights", None)
    return weights if weights is not None and weights.sharded else None


def local_rows(model: nn.Module, weight: Tensor) -> slice:
    """The rows of a weight that `local_share` gives of it."""
    shares = shares_of(model)
    if shares is None or not is_sharded(weight):
        return slice(0, weight.shape[0])
    return shares.local_rows(weight)
