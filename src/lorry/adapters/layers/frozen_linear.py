"""The product of a linear without its adapters: dense, cast as autocast does, or whatever a packed base and a
variant put in its place.

T tokens, I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lorry.errors import ContractError
from lorry.kernels import matmul


class FrozenLinear(Protocol):
    """The product of a linear without its adapters, y [T,O] of x [T,I]; `DenseLinear` is the dense one.

    `BankLinear.use_product` puts another in its place: a 4-bit weight multiplies as it is stored,
    and a variant adds a term of its own, with parameters of its own, to the product that it wraps.
    """

    @property
    def dtype(self) -> torch.dtype:
        """Of x, y and the gradients; the compute copies of the adapters have it too."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""

    @property
    def requires_grad(self) -> bool:
        """Whether a parameter wants a gradient."""

    def parameters(self) -> Sequence[Tensor]:
        """Those that may train."""

    def forward(self, x: Tensor) -> Tensor:
        """x [T,I] -> y [T,O], a new tensor: the terms are added into it."""

    def backward(self, g: Tensor, into: Tensor | None) -> Tensor:
        """The gradient of x from g [T,O], that of y; added to ``into`` [T,I] if there is one."""

    def parameter_gradients(self, x: Tensor, g: Tensor) -> list[Tensor]:
        """The gradients of those of `parameters` that want one, in that order; x and g as above."""


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """A base product: weight [O,I], or [I,O] when ``transposed`` (Conv1D), and bias [O] or None."""

    weight: Tensor
    bias: Tensor | None
    transposed: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def parameters(self) -> Sequence[Tensor]:
        """Weight, and bias if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def matrix(self) -> Tensor:
        """W [O,I]."""
        return self.weight.t() if self.transposed else self.weight

    def forward(self, x: Tensor) -> Tensor:
        # .t() is a view: mm reads either layout without a copy
        w = self.weight if self.transposed else self.weight.t()
        return matmul.mm(x, w) if self.bias is None else matmul.addmm(self.bias, x, w)

    def backward(self, g: Tensor, into: Tensor | None) -> Tensor:
        w = self.weight.t() if self.transposed else self.weight
        return matmul.mm(g, w) if into is None else matmul.addmm_(into, g, w)

    @property
    def requires_grad(self) -> bool:
        """Whether weight or bias want a gradient."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def parameter_gradients(self, x: Tensor, g: Tensor) -> list[Tensor]:
        """Gradients of weight and bias, of those that train: one that does not costs no product."""
        gradients = []
        if self.weight.requires_grad:
            # the gradient lies in the stored weight's layout, so that it can be added to it as it
            # is
            gradients.append(matmul.mm(x.t(), g) if self.transposed else matmul.mm(g.t(), x))
        if self.bias is not None and self.bias.requires_grad:
            # one bias for all tokens: its gradient is the sum over them
            gradients.append(g.sum(0))
        return gradients


@dataclass(frozen=True, slots=True)
class CastLinear:
    """A base product computed in another dtype than its own, as autocast does: the weight is cast
    where it is used, so nothing keeps the copy until backward.
    """

    linear: FrozenLinear
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.linear.shape

    @property
    def requires_grad(self) -> bool:
        """Whether a parameter wants a gradient."""
        return self.linear.requires_grad

    def parameters(self) -> Sequence[Tensor]:
        """Those of the product itself, in their own dtype."""
        return self.linear.parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self._cast().forward(x)

    def backward(self, g: Tensor, into: Tensor | None) -> Tensor:
        return self._cast().backward(g, into)

    def parameter_gradients(self, x: Tensor, g: Tensor) -> list[Tensor]:
        """In the dtype of x and g; autograd casts them to the parameters'."""
        return self.linear.parameter_gradients(x, g)

    def matrix(self) -> Tensor:
        """W [O,I], cast."""
        return self._cast().matrix()

    def _cast(self) -> DenseLinear:
        dense = self.linear
        if not isinstance(dense, DenseLinear):
            raise ContractError(
                f"a linear whose product computes in {dense.dtype} cannot follow autocast to "
                f"{self.dtype}; switch autocast off, or to {dense.dtype}"
            )
        bias = None if dense.bias is None else dense.bias.to(self.dtype)
        return DenseLinear(dense.weight.to(self.dtype), bias, dense.transposed)
