"""The magnitudes of DoRA (Liu et al. 2024, arXiv 2402.09353), as a linear's product and an embedding use
them:

    y = c * (W x + s B A x) + b    c = m / n    n_o = |row o of W + s B A|, of no gradient

m [O] trains. n is made from A and B once between two writes of theirs, without the sum it is the norm of:

    n^2 = |W|^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B (A A^T)) * B)

A row where these nearly cancel is summed itself. What the base has of frozen adapters under every mix
(`AdaptableLayer.base_terms`) counts as W. For an embedding's table [V, D], W is its transpose. O out, I in,
r rank, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorry.kernels import call_kernel, load_library, matmul

if TYPE_CHECKING:
    from lorry.adapters.layers.adaptable import AdaptableLayer
    from lorry.adapters.layers.slot import AdapterSlot

ROW_BLOCK = 256  # rows of W + s B A that are ever there at a time
# of |W|^2 + |s B A|^2: below it the three sums have lost two bits and more, and the row is summed itself
CANCELS_BELOW = 0.25


@runtime_checkable
class MatrixProduct(Protocol):
    """A base product (`product.FrozenLinear`) that can show its matrix."""

    def matrix(self) -> Tensor:
        """[O,I], as it multiplies; what it is opened into may be the next product's."""


@dataclass(frozen=True, slots=True)
class OutputScale:
    """What a DoRA term makes of a linear's output, its own tokens' rows u + b, u = W x + s B A x.

    ``factor``: c [O]; ``norm``: n [O]; ``inverse``: 1/m [O], 0 where m is; ``bias``: b [O] or None;
    ``shift``: (1 - c) b as far as this process adds b; ``dead``: the rows where m is 0 and n is not [n]
    int64 or None: nothing of u is left in their outputs.
    """

    factor: Tensor
    norm: Tensor
    inverse: Tensor
    bias: Tensor | None
    shift: Tensor | None
    dead: Tensor | None

    def scale_output(self, y: Tensor) -> None:
        """u + b -> c u + b, in place; y [T,O] contiguous."""
        if _takes_kernel(y):
            call_kernel("scale_rows", y, self.factor, self.shift, y, *y.shape)
            return
        # in fp32 at least: c near 1 would be 1 in bfloat16
        wide = torch.promote_types(y.dtype, torch.float32)
        scaled = y.to(wide).mul_(self.factor)
        y.copy_(scaled if self.shift is None else scaled.add_(self.shift))

    def backward(self, g: Tensor, y: Tensor, into: Tensor) -> Tensor:
        """Write c g, the gradient of u, into ``into`` from g, that of y (all [T,O], contiguous; ``into``
        may be g), and give the gradient of m [O]; of ``dead`` rows 0."""
        wide = torch.promote_types(g.dtype, torch.float32)
        if _takes_kernel(g, y, into):
            sums = torch.empty(2, g.shape[1])
            call_kernel("scale_rows_backward", g, y, self.factor, into, sums, *g.shape)
            dots, total = sums
        else:
            wide_g = g.to(wide)
            dots, total = (wide_g * y.to(wide)).sum(0), wide_g.sum(0)
            into.copy_(wide_g * self.factor)
        # c u = y - b, and dm = sum over tokens of g u / n
        inner = dots if self.bias is None else dots - total * self.bias.to(wide)
        return inner * self.inverse


def _takes_kernel(*tensors: Tensor) -> bool:
    return (
        all(
            t.dtype == torch.bfloat16 and t.device.type == "cpu" and t.is_contiguous()
            for t in tensors
        )
        and load_library() is not None
    )


class MagnitudeFunction(torch.autograd.Function):
    """`apply(u [T,D], m [D], n [D], mark_stale)` -> m/n u; n has no gradient. ``mark_stale``: called when
    gradients are made, since what n was made of is about to change."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, m: Tensor, n: Tensor, mark_stale: Callable[[], None]
    ) -> Tensor:
        ctx.mark_stale = mark_stale
        ctx.save_for_backward(u, m, n)
        return u * _ratio(m.to(n.dtype), n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, m, n = ctx.saved_tensors
        ctx.mark_stale()
        dm = _ratio((grads[0] * u).sum(0), n).to(m.dtype) if ctx.needs_input_grad[1] else None
        return grads[0] * _ratio(m.to(n.dtype), n), dm, None, None


def _ratio(values: Tensor, norm: Tensor) -> Tensor:
    """values / n; 0 where n is: a row of zeros has no direction."""
    return torch.where(norm > 0, values / norm, 0.0)


@torch.no_grad()
def output_scale(layer: AdaptableLayer, slot: AdapterSlot) -> OutputScale:
    """Of a slot that has a magnitude, from its masters as they are now. Ranks that share the layer call it
    together."""
    assert slot.magnitude is not None
    norm = weight_norm(layer, slot)
    m = slot.magnitude.detach().to(norm.dtype)
    factor = _ratio(m, norm)
    dead = ((m == 0) & (norm > 0)).nonzero()[:, 0]
    bias, added = getattr(layer, "bias", None), None
    if bias is not None:
        bias = bias.detach().to(norm.dtype)
        added = None if layer.slices and layer.slices.columns and layer.slices.ranks.rank else bias
    return OutputScale(
        factor,
        norm,
        torch.where((m != 0) & (norm > 0), 1 / m, 0.0),
        bias,
        None if added is None else added * (1 - factor),
        dead if dead.numel() else None,
    )


@torch.no_grad()
def weight_norm(layer: AdaptableLayer, slot: AdapterSlot) -> Tensor:
    """n [O] of W + s B A, fp32 at least."""
    matrix = layer.matrix().detach()
    # between passes each rank has a share of a weight that is cut (FSDP2); all of them come here then
    if (whole := getattr(matrix, "full_tensor", None)) is not None:
        matrix = whole()
    wide = torch.promote_types(matrix.dtype, torch.float32)
    (a, b), s = (factor.to(wide) for factor in slot.factors()), slot.scale
    start = start_terms(layer)
    # rounded as the products read it; of W itself no copy in another dtype is made
    cross = matmul.mm(matrix, a.to(matrix.dtype).t()).to(wide)
    for k in start:
        own_a, own_b = (factor.to(wide) for factor in k.factors())
        cross += k.scale * (own_b @ (own_a @ a.t()))
    base, own = base_squares(layer, matrix, start), s * s * ((b @ (a @ a.t())) * b).sum(1)
    parts = torch.stack([base + own, base + own + 2 * s * (cross * b).sum(1)])
    whole, squares = _sum_over_ranks(layer, parts)
    low = (squares < CANCELS_BELOW * whole).nonzero()[:, 0]
    if low.numel():
        exact = row_squares(matrix, [*start, slot], low, wide)
        squares[low] = _sum_over_ranks(layer, exact)
    return squares.clamp_(min=0).sqrt()


def start_terms(layer: AdaptableLayer) -> list[AdapterSlot]:
    """What of frozen adapters counts as the base's own here."""
    return [layer.slots[term.adapter] for term in layer.base_terms]


def base_squares(layer: AdaptableLayer, matrix: Tensor, start: Sequence[AdapterSlot]) -> Tensor:
    """|W|^2 [O] of each row, remembered: the base is frozen."""
    stored = layer.weight
    key = (stored.data_ptr(), stored._version, matrix.dtype, tuple(k.slot_id for k in start))
    if layer.row_squares is None or layer.row_squares[0] != key:
        wide = torch.promote_types(matrix.dtype, torch.float32)
        rows = torch.arange(len(matrix), device=matrix.device)
        layer.row_squares = (key, row_squares(matrix, start, rows, wide))
    return layer.row_squares[1]


def row_squares(
    matrix: Tensor, terms: Sequence[AdapterSlot], rows: Tensor, dtype: torch.dtype
) -> Tensor:
    """[n]: the squared norms of these rows of W and the terms on it, a block at a time."""
    out = []
    for some in rows.split(ROW_BLOCK):
        block = matrix[some].to(dtype)
        for term in terms:
            a, b = term.factors()
            block = block.addmm(b[some].to(dtype), a.to(dtype), alpha=term.scale)
        out.append(block.square().sum(1))
    return torch.cat(out)


def _sum_over_ranks(layer: AdaptableLayer, squares: Tensor) -> Tensor:
    """Where each rank has some columns of W, their sums together."""
    cut = layer.slices
    return squares if cut is None or cut.columns is None else cut.ranks.add_up(squares)
