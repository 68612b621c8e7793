"""What the layers of a model ask for their weights: these lie whole on the device, or a layer has them
only while it runs (`backends.distributed.sharded`).

    with model.layer_weights.forward_pass():
        for i, block in enumerate(blocks):
            model.layer_weights.reach(i)
            x = block(x)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from lorry.adapters.layers.shares import WeightShares


class LayerWeights(Protocol):
    """The weights of a model's layers, in the order they run, and of all the rest (embedding, final
    norm, head), which are there from the beginning of a pass on.
    """

    @property
    def sharded(self) -> bool:
        """Whether this rank holds only a share of them between passes."""

    def forward_pass(self) -> AbstractContextManager[None]:
        """While the block runs, the layers can be reached from the lowest up."""

    def backward_pass(self) -> AbstractContextManager[None]:
        """While the block runs, the layers can be reached from the highest down."""

    def reach(self, layer: int) -> None:
        """Have the weights of a layer whole, and those of the layer before no more."""

    def keep_rest(self) -> None:
        """Have what is no layer's from now on, also between passes; every rank calls it."""

    def values_from(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """The values of a weight from a flat position to another; every rank asks for the same."""

    def resize(self, module: nn.Module, name: str, rows: int) -> None:
        """Give a module's parameter that is no layer's so many rows, zeros behind those that it has; a new
        parameter takes its place. Every rank calls it, between passes."""


class WholeWeights:
    """The weights of a model that lie whole on its device."""

    sharded = False

    def forward_pass(self) -> AbstractContextManager[None]:
        """Nothing to fetch."""
        return _NOTHING

    def backward_pass(self) -> AbstractContextManager[None]:
        """Nothing to fetch."""
        return _NOTHING

    def reach(self, layer: int) -> None:
        """It is there."""

    def keep_rest(self) -> None:
        """It stays anyway."""

    def values_from(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """A view of them."""
        return weight.detach().reshape(-1)[start:stop]

    def resize(self, module: nn.Module, name: str, rows: int) -> None:
        """It has them all."""
        grown = with_rows(module.get_parameter(name).detach(), rows)
        setattr(module, name, nn.Parameter(grown, requires_grad=False))


def with_rows(weight: Tensor, rows: int) -> Tensor:
    """[rows, ...]: the first of a weight, zeros behind its last one."""
    added = weight.new_zeros(max(rows - weight.shape[0], 0), *weight.shape[1:])
    return torch.cat([weight[:rows], added])


_NOTHING = nullcontext()
WHOLE_WEIGHTS = WholeWeights()


class WeightShards(LayerWeights, WeightShares, Protocol):
    """The weights of a model of which each rank has read its own share."""

    def keep(self, weight: Tensor, share: Tensor) -> Tensor:
        """This rank's rows of ``weight``, which have just been read, in the memory where they stay."""

    def parameter(self, weight: Tensor, share: Tensor) -> nn.Parameter:
        """What takes the place of ``weight``, a parameter without memory: this rank's rows of it."""

    def values_at(self, weight: Tensor, positions: Tensor) -> Tensor:
        """The values [n] of a weight at flat positions [n] int64; every rank asks for the same."""

    def agree(self, what: str) -> None:
        """Raise where another rank has failed on its way here."""


# (a model without memory, its layers in the order they run) -> what this rank holds of it
Sharder = Callable[[nn.Module, Sequence[nn.Module]], WeightShards]
