"""What a parameter set answers about ranks whose every tensor is whole on each of them, its gradient
too: a router, which reads and makes what all ranks have, or the only process's base weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor


class WholeOnEachRank(ABC):
    """The part of a `ParameterSet` that says who holds what."""

    @abstractmethod
    def split_like(self, flat: Tensor) -> dict[str, Tensor]: ...

    @property
    def shard(self) -> int | None:
        """None: it is no share."""
        return None

    def frozen_state(self) -> dict[str, Tensor]:
        """Nothing: all of it trains."""
        return {}

    def dot(self, a: Tensor, b: Tensor) -> float:
        """The inner product of two [P] tensors, in float64: both are sums over millions of products."""
        return float(torch.dot(a.double(), b.double()))

    def partial_sums(self) -> list[str]:
        """None: a gradient is the whole one."""
        return []

    def whole_tensors(self, flat: Tensor) -> Mapping[str, Tensor]:
        """Its views by name."""
        return self.split_like(flat)

    def own_part(self, name: str, whole: Tensor) -> Tensor:
        """All of it."""
        return whole
