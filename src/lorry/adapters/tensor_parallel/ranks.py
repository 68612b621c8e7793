"""The processes that hold the slices of one model, as its layers see them, and their collectives
behind autograd.

All of them run the same tokens at the same time, so they come to every collective alike and a sum
has the same bits on each. Names and gradients are those of Megatron-LM (Shoeybi et al. 2019, arXiv
1909.08053, section 3): an input that all ranks have is copied to them, and its gradient is the sum
of theirs; a sum over ranks has a gradient that all of them have already.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class TensorRanks(Protocol):
    """``rank`` of ``size`` processes. Its calls are collectives: every rank makes the same ones, in
    the same order, with tensors of the same shape and dtype."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def add_up(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the ranks; returns it."""

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in the order of the ranks."""


class CopyToRanks(torch.autograd.Function):
    """`apply(x, ranks) -> x`, each rank's use of which gives a part of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorRanks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # a clone: the sum is made in place, and the gradient may be another node's too
        return ctx.ranks.add_up(grads[0].contiguous().clone()), None


class ReduceFromRanks(torch.autograd.Function):
    """`apply(x, ranks)` -> the sum of every rank's x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorRanks) -> Tensor:
        return ranks.add_up(x.contiguous().clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None
