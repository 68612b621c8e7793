"""Statistics of the vocabulary's softmax and their slopes with respect to the hidden state, without
a whole row of logits.

A frozen head is read a tile of the vocabulary at a time, as blocked attention reads keys: a tile's
logits [t, w] stay in cache while they are formed, folded into running sums, and multiplied back. If
one score of one chosen token carries the gradient, one pass and two products give value and slope;
otherwise backward forms the tiles once more (three products for any number of scores). An adapted
head gives whole rows, a chunk at a time, and `LogitsStatistics` takes those. t rows, n scores, k
chosen tokens, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorry.kernels.softmax import SoftmaxSums, accumulator_dtype, add_scaled, write_slope
from lorry.models.scoring.vocab import SoftmaxSummary, VocabRows, VocabStatistic

GROUP_ROWS = 1024  # rows that share a pass over the head
TILE_ELEMENTS = 1 << 21  # logits in a tile: 4 MiB of bfloat16
ROUND_ROWS = (
    64  # rows are padded to a multiple: oneDNN compiles, and keeps, a kernel for every new shape
)


@dataclass(frozen=True)
class StatisticsRequest:
    """Statistics wanted at t rows; their chosen tokens are the columns of ``ids`` [t,k], ``cuts``
    says which are whose.
    """

    statistics: Sequence[VocabStatistic]
    rows: VocabRows
    ids: Tensor
    cuts: Sequence[slice]

    @staticmethod
    def of(statistics: Sequence[VocabStatistic], rows: VocabRows) -> StatisticsRequest:
        """Statistics that choose their tokens by the same function share columns."""
        columns: dict[Callable[[VocabRows], Tensor], slice] = {}
        parts: list[Tensor] = []
        for s in statistics:
            if s.tokens not in columns:
                start = sum(p.shape[1] for p in parts)
                parts.append(s.tokens(rows))
                columns[s.tokens] = slice(start, start + parts[-1].shape[1])
        return StatisticsRequest(
            statistics, rows, torch.cat(parts, 1), [columns[s.tokens] for s in statistics]
        )

    @property
    def moments(self) -> bool:
        return any(s.moments for s in self.statistics)

    @property
    def gradient(self) -> bool:
        return any(s.gradient for s in self.statistics)

    @property
    def one_pass(self) -> bool:
        """Whether a single score carries a gradient, and it looks at a single token."""
        return (
            sum(s.gradient for s in self.statistics) == 1
            and not self.moments
            and self.ids.shape[1] == 1
        )

    def values(self, softmax: SoftmaxSummary) -> Tensor:
        """[t,n]."""
        parts = [
            s.of(replace(softmax, chosen=softmax.chosen[:, cut]), self.rows)
            for s, cut in zip(self.statistics, self.cuts, strict=True)
        ]
        return torch.stack(parts, 1)

    def pull(self, softmax: SoftmaxSummary, upstream: Tensor) -> list[Tensor]:
        """The gradients [t,k], [t], [t], [t] of sum(values * upstream) with respect to chosen,
        mean, variance and uniform.
        """
        leaves = [
            x.detach().requires_grad_()
            for x in (softmax.chosen, softmax.mean, softmax.variance, softmax.uniform)
        ]
        chosen, mean, variance, uniform = leaves
        with torch.enable_grad():
            values = self.values(
                replace(softmax, chosen=chosen, mean=mean, variance=variance, uniform=uniform)
            )
        wanted = torch.tensor([s.gradient for s in self.statistics], device=upstream.device)
        # an infinite one, too, is nothing to a score without gradient
        upstream = torch.where(wanted, upstream, 0).to(values.dtype)
        found = torch.autograd.grad(values, leaves, upstream, allow_unused=True)
        return [
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(leaves, found, strict=True)
        ]

    def slopes(
        self, sums: SoftmaxSums, softmax: SoftmaxSummary, vocab: int, upstream: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What d sum(values * upstream) / d logits is made of: ``terms`` [t,6] for
        `kernels.softmax.write_slope`, and the chosen tokens' own entries [t,k], formed whole in
        fp32: where p is near 1, p - 1 is no difference of rounded numbers.
        """
        own, mean, variance, uniform = self.pull(softmax, upstream)
        a, k = -own.sum(1) - uniform, uniform / vocab
        b = c = torch.zeros_like(a)
        peak, total, first, *_ = sums.state.unbind(1)
        shift = centre = peak + total.log()
        y = torch.zeros_like(own)
        if self.moments:
            a, b, c = a - variance * softmax.variance, mean + 2 * variance, variance
            centre, y = peak + first / total, softmax.chosen - softmax.mean[:, None]
        bend = a[:, None] + y * (b[:, None] + y * c[:, None])
        entries = _sum_equal_ids(self.ids, own) + softmax.chosen.exp() * bend + k[:, None]
        return torch.stack([shift, centre, a, b, c, k], 1), entries


def _sum_equal_ids(ids: Tensor, values: Tensor) -> Tensor:
    """[t,k]: each column's value plus those of the row's other columns with the same id."""
    if ids.shape[1] == 1:
        return values
    sorted_ids, order = ids.sort(1)
    group = F.pad((sorted_ids[:, 1:] != sorted_ids[:, :-1]).cumsum(1), (1, 0))
    sums = torch.zeros_like(values).scatter_add_(1, group, values.gather(1, order))
    return torch.empty_like(values).scatter_(1, order, sums.gather(1, group))


def finish_softmax(sums: SoftmaxSums, logits: Tensor, vocab: int) -> SoftmaxSummary:
    """The statistics after the last tile, with the chosen tokens' ``logits`` [t,k]."""
    peak, total, first, second, plain = sums.state.unbind(1)
    log_total = total.log()
    mean = variance = uniform = torch.full_like(peak, torch.nan)
    if sums.moments:
        mean, variance = first / total - log_total, second / total - (first / total).square()
        uniform = plain / vocab - log_total
    top = torch.where(total.isfinite(), sums.top, -1)
    return SoftmaxSummary(
        logits - peak[:, None] - log_total[:, None], mean, variance, uniform, top, vocab
    )


# --- a frozen head, by tiles


class HeadPass:
    """A pass over the head for a group of rows: their hidden states, padded, and a workspace for
    the tiles.
    """

    def __init__(self, hidden: Tensor, head: Tensor, ids: Tensor) -> None:
        self.real, self.head = len(hidden), head
        self.hidden = F.pad(hidden, (0, 0, 0, -len(hidden) % ROUND_ROWS))
        rows = len(self.hidden)
        self.width = max(TILE_ELEMENTS // rows // 64 * 64, 64)
        self.space = hidden.new_empty(rows * min(self.width, len(head)))
        self.part = hidden.new_empty(rows, hidden.shape[1])
        self.edges = [*range(0, len(head), self.width), len(head)]
        self.k = ids.shape[1]
        # the chosen (row, token) pairs, by token: each tile has a stretch of them
        self.token, self.pair = ids.flatten().sort()
        self.cuts = torch.searchsorted(
            self.token, torch.tensor(self.edges, device=ids.device)
        ).tolist()

    def tiles(self) -> Iterator[tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]]:
        """Logits [rows, w] (only until the next), the head's rows [w, d], which chosen pairs are
        here, and where in the tile.
        """
        for (start, stop), (first, last) in zip(
            pairwise(self.edges), pairwise(self.cuts), strict=True
        ):
            weight = self.head[start:stop]
            tile = self.space[: len(self.hidden) * (stop - start)].view(-1, stop - start)
            pair = self.pair[first:last]
            where = (pair // self.k, self.token[first:last] - start)
            yield torch.mm(self.hidden, weight.t(), out=tile), weight, pair, where

    def read(self, sums: SoftmaxSums) -> Tensor:
        """Fold every tile into ``sums``. Returns the chosen tokens' logits, [real,k]."""
        logits = self._chosen()
        for tile, _, pair, where in self.tiles():
            logits[pair] = tile[where].to(logits.dtype)
            sums.fold(tile)
        return logits.view(self.real, self.k)

    def read_and_pull(self, sums: SoftmaxSums) -> tuple[Tensor, Tensor]:
        """Also sum e^(l - peak) times the head's rows, over all tokens but the chosen: ([real,k],
        [real,d]).
        """
        logits = self._chosen()
        total = torch.zeros(self.part.shape, dtype=logits.dtype, device=logits.device)
        for tile, weight, pair, where in self.tiles():
            logits[pair] = tile[where].to(logits.dtype)
            scale = sums.fold(tile, write=True)
            tile[where] = 0
            add_scaled(total, torch.mm(tile, weight, out=self.part), scale)
        return logits.view(self.real, self.k), total[: self.real]

    def push(self, terms: Tensor, entries: Tensor, *, moments: bool) -> Tensor:
        """The slopes `Asked.slopes` describes times the head: [real, d]."""
        terms = F.pad(terms, (0, 0, 0, len(self.hidden) - self.real))
        flat = entries.flatten().to(self.space.dtype)
        total = torch.zeros(self.part.shape, dtype=terms.dtype, device=terms.device)
        ones = torch.ones_like(terms[:, 0])
        for tile, weight, pair, where in self.tiles():
            write_slope(tile, terms, moments=moments, out=tile)
            tile[where] = flat[pair]
            add_scaled(total, torch.mm(tile, weight, out=self.part), ones)
        return total[: self.real]

    def sums(self, *, moments: bool) -> SoftmaxSums:
        return SoftmaxSums.empty(len(self.hidden), self.hidden, moments=moments)

    def _chosen(self) -> Tensor:
        return torch.zeros(
            self.real * self.k, dtype=accumulator_dtype(self.hidden), device=self.hidden.device
        )


def compute_statistics(
    hidden: Tensor, head: Tensor, wanted: Sequence[VocabStatistic], rows: VocabRows
) -> Tensor:
    """[t,n] at least fp32: statistics of softmax(hidden [t,d] @ head [V,d]^T), differentiable in
    ``hidden``.
    """
    t = len(hidden)
    if not t:
        return hidden.new_zeros(0, len(wanted), dtype=accumulator_dtype(hidden))
    size = -(-t // -(-t // GROUP_ROWS))
    size += -size % ROUND_ROWS
    parts = []
    for i, group in enumerate(hidden.split(size)):
        asked = StatisticsRequest.of(wanted, rows.cut(i * size, (i + 1) * size))
        parts.append(
            (OnePassStatistics if asked.one_pass else TwoPassStatistics).apply(group, head, asked)
        )
    return torch.cat(parts)


class OnePassStatistics(torch.autograd.Function):
    """`apply(hidden [t,d], head [V,d], asked) -> [t,n]` where `Asked.one_pass` holds; keeps d score
    / d hidden [t,d]: u ((1 - p) head[token] - sum over the others of p_v head[v])."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, asked: StatisticsRequest) -> Tensor:
        over = HeadPass(hidden, head, asked.ids)
        sums = over.sums(moments=False)
        if not ctx.needs_input_grad[0]:
            logits = over.read(sums)
            return asked.values(finish_softmax(sums.first_rows(len(hidden)), logits, len(head)))
        logits, others = over.read_and_pull(sums)
        sums = sums.first_rows(len(hidden))
        softmax = finish_softmax(sums, logits, len(head))
        values = asked.values(softmax)
        rise = asked.pull(softmax, torch.ones_like(values))[0]
        own = head[asked.ids[:, 0]].to(others.dtype).mul_(-torch.expm1(softmax.chosen))
        ctx.save_for_backward(own.sub_(others.div_(sums.state[:, 1:2])).mul_(rise).to(hidden.dtype))
        ctx.column = next(j for j, s in enumerate(asked.statistics) if s.gradient)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return (kept * grads[0][:, ctx.column, None]).to(kept.dtype), None, None


class TwoPassStatistics(torch.autograd.Function):
    """`apply(hidden [t,d], head [V,d], asked) -> [t,n]` for any statistics; backward forms the
    tiles once more.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, asked: StatisticsRequest) -> Tensor:
        over = HeadPass(hidden, head, asked.ids)
        sums = over.sums(moments=asked.moments)
        logits = over.read(sums)
        sums = sums.first_rows(len(hidden))
        ctx.save_for_backward(hidden, head, logits)
        ctx.asked, ctx.sums = asked, sums
        return asked.values(finish_softmax(sums, logits, len(head)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, logits = ctx.saved_tensors
        asked: StatisticsRequest = ctx.asked
        if not asked.gradient:
            return torch.zeros_like(hidden), None, None
        terms, entries = asked.slopes(
            ctx.sums, finish_softmax(ctx.sums, logits, len(head)), len(head), grads[0]
        )
        return (
            HeadPass(hidden, head, asked.ids)
            .push(terms, entries, moments=asked.moments)
            .to(hidden.dtype),
            None,
            None,
        )


# --- whole rows, from a head that is adapted


class LogitsStatistics(torch.autograd.Function):
    """`apply(logits [t,V], asked) -> [t,n]`; the gradient is formed in the logits' dtype, nothing
    else of their size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, asked: StatisticsRequest) -> Tensor:
        sums = SoftmaxSums.empty(len(logits), logits, moments=asked.moments)
        sums.fold(logits)
        ctx.save_for_backward(logits)
        ctx.asked, ctx.sums, ctx.chosen = (
            asked,
            sums,
            logits.gather(1, asked.ids).to(sums.state.dtype),
        )
        return asked.values(finish_softmax(sums, ctx.chosen, logits.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        asked: StatisticsRequest = ctx.asked
        if not asked.gradient:
            return torch.zeros_like(logits), None
        softmax = finish_softmax(ctx.sums, ctx.chosen, logits.shape[1])
        terms, entries = asked.slopes(ctx.sums, softmax, logits.shape[1], grads[0])
        made = write_slope(logits, terms, moments=asked.moments, out=torch.empty_like(logits))
        return made.scatter_(1, asked.ids, entries.to(made.dtype)), None
