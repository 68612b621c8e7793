"""A bank's adapters on Megatron-core's parallel linears: Hugging Face's projections as bank layers without
a product of their own, and what adds their terms to the output of the linear that fuses them.

Megatron's linear multiplies its weight and sums over ranks as ever. A term reads what the linear reads,
and sums over ranks by itself, as wide as its rank (`LayerSlices.sums_ranks`). T tokens, I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.linear import BankLinear, LinearGroup
from lorry.adapters.tensor_parallel.slices import LayerSlices
from lorry.models.megatron.layout import RowOrder


@dataclass(frozen=True, slots=True)
class NoProduct:
    """The `FrozenLinear` of a projection whose product another linear makes: nothing. ``shape``: (O, I)
    of this rank."""

    shape: tuple[int, int]
    dtype: torch.dtype
    requires_grad = False

    def parameters(self) -> Sequence[Tensor]:
        """None."""
        return ()

    def forward(self, x: Tensor) -> Tensor:
        """x [T,I] -> zeros [T,O], into which the terms are added."""
        return x.new_zeros(len(x), self.shape[0])

    def backward(self, g: Tensor, into: Tensor | None) -> Tensor:
        """``into`` as it is, or zeros [T,I]."""
        return g.new_zeros(len(g), self.shape[1]) if into is None else into

    def parameter_gradients(self, x: Tensor, g: Tensor) -> list[Tensor]:
        """None."""
        return []


class FusedProjection(BankLinear):
    """One of the projections whose rows a linear of Megatron-core's holds, under Hugging Face's path:
    adapters sit on it, and it is never called. ``part``: which of them, in the linear's ``order``."""

    def __init__(
        self, path: str, linear: nn.Module, order: RowOrder, part: int, slices: LayerSlices | None
    ) -> None:
        # not BankLinear's: the weight is the linear's parameter, and no second one
        AdaptableLayer.__init__(self, path)
        self.holders = (linear,)
        self.order, self.part, self.slices = order, part, slices
        self.register_parameter("bias", None)
        self.transposed = False
        weight = linear.get_parameter("weight")
        shape = (order.groups * order.sizes[part], weight.shape[1])
        self.product = NoProduct(shape, weight.dtype)
        self.group = LinearGroup([self])

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # of the linear
        """[O, I]: this rank's rows of it, in Hugging Face's order."""
        return self.order.split(self.holders[0].get_parameter("weight"))[self.part]


class TermsHook:
    """A forward hook of a linear of Megatron-core's, (output, bias) of x [length, sequences, I], that adds
    the terms of the ambient call to the output. ``site``: the name of x for dropout."""

    def __init__(self, projections: Sequence[FusedProjection], order: RowOrder, site: str) -> None:
        self.group, self.order, self.site = LinearGroup(projections), order, site

    def __call__(
        self, linear: nn.Module, inputs: tuple[Any, ...], returned: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None] | None:
        linears, (output, bias), x = self.group.linears, returned, inputs[0]
        call = linears[0].resolve(None)
        if not any(each.terms(call) for each in linears):
            return None
        length, sequences, _ = x.shape
        # sequence by sequence, as a frame's call counts its tokens
        rows = x.transpose(0, 1).reshape(length * sequences, -1)
        terms = self.order.fuse(self.group.forward(rows, call, self.site), -1)
        return output + terms.view(sequences, length, -1).transpose(0, 1), bias
