"""What the low-rank product reads of adapters: the compute copies of their A's and B's at linears that read the
same input, who has what share of them, and one term of the mix as such a stack.

T tokens, I in, O out, R rank, S the sum of the ranks of a stack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lorry.adapters.dropout import SeededDropout
from lorry.adapters.variants.magnitude import OutputScale
from lorry.errors import ContractError
from lorry.kernels import adapter_products, matmul


@dataclass(frozen=True, slots=True)
class AdapterShare:
    """One linear's share of a stack: which linear, its rows of the stacked A, lora_B [O,R]
    (compute copy) and its scale. ``trained``: those of the rows that masters have a gradient of, None
    for all; ``output_scale``: of a DoRA adapter.
    """

    layer: int
    rows: slice
    lora_B: Tensor
    scale: float
    trained: slice | None = None
    output_scale: OutputScale | None = None

    @property
    def gradient_rows(self) -> slice:
        """The rows of the stacked A that masters have a gradient of."""
        return self.rows if self.trained is None else self.trained


@dataclass(frozen=True, slots=True)
class SlotShare:
    """One adapter's part of a linear's share, where several share a stack: the number of that
    share, where in the gradients of the stacked A and of the share's lora_B the adapter's rows and
    columns lie, and what the gradient of those columns is yet to be multiplied with: its scale,
    unless `rank_scales` has it.
    """

    part: int
    rows: slice
    columns: slice
    scale: float


@dataclass(frozen=True, slots=True)
class SlotBias:
    """One adapter's bias at a linear: ``values`` [O], ``scale`` times the master; ``column``: of the
    gates that multiplies it, None where nothing does."""

    layer: int
    values: Tensor
    scale: float
    column: int | None


class MasterVersion(NamedTuple):
    """What of an adapter's values is read where it lies, a tensor at a module, and its version counter
    as it was."""

    module: str
    values: Tensor
    version: int


@dataclass(frozen=True, slots=True)
class ComputeCopies:
    """The copies of masters that products read, and what of a stack hangs on nothing but the adapters.

    lora_A [S,I]: the stacked copies; ``slots``: whose masters are where (None for one ungated adapter,
    whose ``parts`` are that); ``columns`` [S] int64: the column of the gates [tokens, C] that
    multiplies each of its ranks, None where nothing does; ``rank_scales`` [S]: the scale of each rank,
    None where the parts have it in theirs or in lora_B; ``biases``: of the slots that have one;
    ``in_use``: what says, by being alive, that these copies are read; ``masters``: what they are no
    copies of.
    """

    lora_A: Tensor
    parts: Sequence[AdapterShare]
    slots: Sequence[SlotShare] | None = None
    columns: Tensor | None = None
    rank_scales: Tensor | None = None
    biases: Sequence[SlotBias] = ()
    in_use: object | None = None
    masters: Sequence[MasterVersion] = ()

    def storages(self) -> set[int]:
        """The addresses of the memory that products read of adapters."""
        read = (self.lora_A, *(part.lora_B for part in self.parts))
        return {values.untyped_storage().data_ptr() for values in read}

    def refuse_written(self) -> None:
        """Raises ContractError where a master that is read in place was written since: a gradient would
        be that of other values."""
        for module, values, version in self.masters:
            if values._version != version:
                raise ContractError(
                    f"{module}: its adapter was written between a forward pass and the backward pass of it, "
                    "whose gradients would be of the new values; write before the one or after the other"
                )


@dataclass(slots=True)
class StackedAdapters:
    """One term of the mix at linears that read the same input; or several for the same tokens, as
    one. ``num_slots``: how many pairs of masters it stands for.

    ``tokens``: which rows of x; ``term_rows``: which of those the term is for, where a few more are
    taken along; ``routed``: whether its gates are the router's; ``vectors``: which of the slots have a
    vector [O] beside A and B, all of them a magnitude (``scaled``), or a bias. ``mark_stale`` is called when
    gradients for the masters are made: they are about to change. ``make_copies`` is called when a
    product first asks for them: where whole MLPs run in place of a product, none does.
    """

    tokens: slice
    num_slots: int
    make_copies: Callable[[], ComputeCopies]
    dropout: SeededDropout | None
    mark_stale: Callable[[], None]
    term_rows: slice | None = None
    routed: bool = False
    vectors: Sequence[int] = ()
    scaled: bool = False
    made_copies: ComputeCopies | None = field(default=None, init=False, repr=False)

    @property
    def copies(self) -> ComputeCopies:
        """What products read."""
        if self.made_copies is None:
            self.made_copies = self.make_copies()
        return self.made_copies

    @property
    def lora_A(self) -> Tensor:
        """[S,I], as `ComputeCopies` has it; and so have the others."""
        return self.copies.lora_A

    @property
    def parts(self) -> Sequence[AdapterShare]:
        """Each linear's share."""
        return self.copies.parts

    @property
    def own_tokens(self) -> slice:
        """The rows of x that the term is for, without those that are taken along."""
        if self.term_rows is None:
            return self.tokens
        first = self.tokens.start
        return slice(first + self.term_rows.start, first + self.term_rows.stop)

    @property
    def columns(self) -> Tensor | None:
        """[S] int64: the gates' column of each rank."""
        return self.copies.columns

    @property
    def rank_scales(self) -> Tensor | None:
        """[S]: the scale of each rank."""
        return self.copies.rank_scales

    def plain_parts(self, gates: Tensor | None) -> list[adapter_products.AdapterPart] | None:
        """The shares as `adapter_products` takes them, of one adapter whose ranks nothing multiplies but its
        scale, in rows that are all the term's own; else None."""
        if gates is not None or self.dropout is not None or self.term_rows is not None:
            return None
        copies = self.copies
        if copies.slots is not None or copies.rank_scales is not None:
            return None
        # a scale of 0 adds nothing, whatever the ranks hold
        if any(part.trained is not None or part.scale == 0 for part in copies.parts):
            return None
        return [
            adapter_products.AdapterPart(part.lora_B, part.rows.start, part.scale)
            for part in copies.parts
        ]

    def slot_shares(self) -> Sequence[SlotShare]:
        """Where the masters' gradients lie in those of the stacked copies, pair by pair."""
        if self.copies.slots is not None:
            return self.copies.slots
        shares, at = list[SlotShare](), 0
        for i, part in enumerate(self.parts):
            rows = slice(at, at + part.gradient_rows.stop - part.gradient_rows.start)
            shares.append(SlotShare(i, rows, slice(None), part.scale))
            at = rows.stop
        return shares

    def trained_ranks(self, low: Tensor) -> Tensor:
        """Of low [tokens, S] the columns that masters have a gradient of."""
        if all(part.trained is None for part in self.parts):
            return low
        return torch.cat([low[:, part.gradient_rows] for part in self.parts], 1)

    def weigh(self, low: Tensor, gates: Tensor | None) -> Tensor:
        """low [tokens, S], each rank times its scale and gate."""
        if self.rank_scales is not None:
            low = low * self.rank_scales
        if gates is None:
            return low
        assert self.columns is not None
        return low * gates.to(low.dtype).index_select(1, self.columns)

    def gate_gradient(self, h: Tensor, raw: Tensor, gates: Tensor) -> Tensor:
        """The gradient of gates [tokens, C], in their dtype: d y / d g = sum over its ranks of
        h * (s B^T dy), both [tokens, S]."""
        assert self.columns is not None
        if self.rank_scales is not None:
            raw = raw * self.rank_scales
        # in fp32, since the products may cancel; a product with 0 and 1 sums the ranks of a column
        ranks = F.one_hot(self.columns, gates.shape[1]).to(
            torch.promote_types(h.dtype, torch.float32)
        )
        return ((h.to(ranks.dtype) * raw.to(ranks.dtype)) @ ranks).to(gates.dtype)

    def zero_other_rows(self, low: Tensor) -> Tensor:
        """low [tokens, S], with zeros in the rows that are not this term's: what they add anywhere
        is nothing.
        """
        if self.term_rows is not None:
            # zeroed rather than sliced away: the product keeps a shape that oneDNN has compiled
            # already
            low[: self.term_rows.start] = 0
            low[self.term_rows.stop :] = 0
        return low

    def add_product(self, to: Tensor, low: Tensor, up: Tensor, scale: float = 1.0) -> None:
        """to [T,O] += scale * low [tokens,S] up [S,O] in this term's rows. The rows taken along
        stay as they are, bit for bit, even where 0 * up is no number."""
        # a view of a slice, so that addmm_ writes into `to` itself
        rows = to[self.tokens]
        if self.term_rows is None:
            matmul.addmm_(rows, low, up, alpha=scale)
            return
        # saved and put back instead of trusting low's zeros: 0 * inf and 0 * NaN are NaN, and -0.0
        # + 0.0 loses its sign
        before, after = rows[: self.term_rows.start].clone(), rows[self.term_rows.stop :].clone()
        matmul.addmm_(rows, low, up, alpha=scale)
        rows[: self.term_rows.start], rows[self.term_rows.stop :] = before, after

    def own_rows(self, y: Tensor) -> Tensor:
        """The rows of y [T,O] that are this term's, a view."""
        rows = y[self.tokens]
        return rows if self.term_rows is None else rows[self.term_rows]

    def dropout_input(self, x: Tensor) -> Tensor:
        """Inverted dropout on this term's rows of x."""
        return (
            x[self.tokens]
            if self.dropout is None
            else self.dropout.apply(x[self.tokens], self.tokens)
        )

    def masked_input(self, x: Tensor) -> Tensor:
        """`drop`, with zeros in the rows that are not this term's."""
        rows = self.dropout_input(x)
        return (
            rows
            if self.term_rows is None
            # without dropout `rows` is a view of x, which must not be zeroed; dropout made a new
            # tensor already
            else self.zero_other_rows(rows.clone() if self.dropout is None else rows)
        )
