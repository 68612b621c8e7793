"""Statistics of the vocabulary's softmax and their slopes with respect to the hidden state, without
a whole row of logits.

A frozen head is read a tile of the vocabulary at a time, as blocked attention reads keys: a tile's
logits [t, w] stay in cache while they are formed, folded into running sums, and multiplied back. If
one score of one chosen token carries the gradient, one pass and two products give value and slope;
otherwise backward forms the tiles once more (three products for any number of scores). An adapted
head gives whole rows, a chunk at a time, and `LogitsStatistics` takes those. Where ranks share the
vocabulary (tensor parallel), each reads its own rows of the head, the sums are merged, and a slope
with respect to the hidden state is this rank's part of it. t rows, n scores, k chosen tokens, d
width, V vocabulary.
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

from lorry.adapters.tensor_parallel.slices import DimensionSlice, LayerSlices
from lorry.kernels import matmul
from lorry.kernels.softmax import SoftmaxSums, accumulator_dtype, add_scaled, write_slope
from lorry.models.scoring.vocab import SoftmaxSummary, VocabRows, VocabStatistic

GROUP_ROWS = 1024  # rows that share a pass over the head
TILE_ELEMENTS = 1 << 21  # logits in a tile: 4 MiB of bfloat16
# rows are padded to a multiple: oneDNN compiles, and keeps, a kernel for every new shape
ROUND_ROWS = 64


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
        # by the function itself: two statistics of the target token gather it once
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
            # one pass multiplies the tile back before the upstream gradient is known: only a single
            # score's can be a factor afterwards
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

    def summary_gradients(self, softmax: SoftmaxSummary, upstream: Tensor) -> list[Tensor]:
        """The gradients [t,k], [t], [t], [t] of sum(values * upstream) with respect to chosen,
        mean, variance and uniform.
        """
        leaves = [
            x.detach().requires_grad_()
            for x in (softmax.chosen, softmax.mean, softmax.variance, softmax.uniform)
        ]
        chosen, mean, variance, uniform = leaves
        has_gradient = torch.tensor([s.gradient for s in self.statistics], device=upstream.device)
        # an infinite one, too, is nothing to a score without gradient
        upstream = torch.where(has_gradient, upstream, 0)
        with torch.enable_grad():
            values = self.values(
                replace(softmax, chosen=chosen, mean=mean, variance=variance, uniform=uniform)
            )
            total = (values * upstream.to(values.dtype)).sum()
        # of a total and not of `values` at an upstream gradient, whose shape torch would import sympy to
        # compare: a third of a second of every run, for the same bits
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        return [
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(leaves, grads, strict=True)
        ]

    def slopes(
        self, sums: SoftmaxSums, softmax: SoftmaxSummary, vocab: int, upstream: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What d sum(values * upstream) / d logits is made of: ``terms`` [t,6] for
        `kernels.softmax.write_slope`, and the chosen tokens' own entries [t,k], formed whole in
        fp32: where p is near 1, p - 1 is no difference of rounded numbers.
        """
        # by autograd on [t]-sized leaves; the chain to [t, V] is the closed form below
        token_grads, mean, variance, uniform = self.summary_gradients(softmax, upstream)
        a, k = -token_grads.sum(1) - uniform, uniform / vocab
        b = c = torch.zeros_like(a)
        peak, total, first, *_ = sums.state.unbind(1)
        shift = centre = peak + total.log()
        y = torch.zeros_like(token_grads)
        if self.moments:
            a, b, c = a - variance * softmax.variance, mean + 2 * variance, variance
            # centred at the mean, so that the polynomial in y does not cancel for large |log p|
            centre, y = peak + first / total, softmax.chosen - softmax.mean[:, None]
        bend = a[:, None] + y * (b[:, None] + y * c[:, None])
        entries = _sum_equal_ids(self.ids, token_grads) + softmax.chosen.exp() * bend + k[:, None]
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
        # of z relative to the peak; log p = z - log_total, whose variance is the same
        mean, variance = first / total - log_total, second / total - (first / total).square()
        uniform = plain / vocab - log_total
    # a NaN or infinity in the row: no token is the most likely one
    top = torch.where(total.isfinite(), sums.top, -1)
    return SoftmaxSummary(
        logits - peak[:, None] - log_total[:, None], mean, variance, uniform, top, vocab
    )


# --- a frozen head, by tiles


@dataclass(frozen=True)
class OutputHead:
    """A frozen head, weight [V,d]; or of one whose rows ranks share (``slices``), this rank's."""

    weight: Tensor
    slices: LayerSlices | None = None

    @property
    def part(self) -> DimensionSlice:
        """Which rows are here."""
        rows = None if self.slices is None else self.slices.rows
        return DimensionSlice(len(self.weight), 1, 0) if rows is None else rows

    @property
    def vocab(self) -> int:
        """V, of all ranks."""
        return self.part.whole

    @property
    def first(self) -> int:
        """The token of the first row here."""
        return self.part.offset

    def gather(self, logits: Tensor) -> Tensor:
        """Whole rows [t,V] from the columns that are here."""
        return logits if self.slices is None else self.part.gather(logits, self.slices.ranks)

    def holds(self, ids: Tensor) -> Tensor:
        """Whether the row of each token is here."""
        return (ids >= self.first) & (ids < self.first + len(self.weight))

    def merge(self, sums: SoftmaxSums, chosen: Tensor) -> tuple[SoftmaxSums, Tensor]:
        """Over all ranks, the sums of each and the chosen tokens' logits [t,k], 0 where the token is
        another rank's."""
        if self.slices is None:
            return sums, chosen
        # one message; tokens are exact in fp32 up to 2^24
        packed = torch.cat([sums.state, sums.top[:, None].to(chosen.dtype), chosen], 1)
        parts = self.slices.ranks.gather(packed)
        width = sums.state.shape[1]
        merged = SoftmaxSums.merge(
            [
                SoftmaxSums(p[:, :width], p[:, width].long(), sums.moments, self.part.of(rank).size)
                for rank, p in enumerate(parts)
            ]
        )
        return merged, torch.stack([part[:, width + 1 :] for part in parts]).sum(0)


class HeadPass:
    """A pass over the head for a group of rows: their hidden states, padded, and a workspace for
    the tiles. Sums and chosen logits are those of the rows here (`OutputHead.merge`).
    """

    def __init__(self, hidden: Tensor, output_head: OutputHead, ids: Tensor) -> None:
        self.rows, self.head = len(hidden), output_head.weight
        head, self.first = self.head, output_head.first
        self.hidden = F.pad(hidden, (0, 0, 0, -len(hidden) % ROUND_ROWS))
        rows = len(self.hidden)
        # about equal tiles of whole multiples of 64 columns; an odd one, since rows that are a power of two
        # apart would share their places in a cache
        count = -(-len(head) * rows // TILE_ELEMENTS)
        self.width = (-(-len(head) // (64 * max(count, 1))) | 1) * 64
        self.space = hidden.new_empty(rows * min(self.width, len(head)))
        self.part = hidden.new_empty(rows, hidden.shape[1])
        self.edges = [*range(0, len(head), self.width), len(head)]
        self.k = ids.shape[1]
        # the chosen (row, token) pairs, by token: each tile has a stretch of them
        # sorted by token, so the pairs of a tile are one slice, found by binary search
        self.token, self.pair = ids.flatten().sort()
        self.cuts = torch.searchsorted(
            self.token, torch.tensor(self.edges, device=ids.device) + self.first
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
            where = (pair // self.k, self.token[first:last] - self.first - start)
            yield matmul.mm(self.hidden, weight.t(), out=tile), weight, pair, where

    def read(self, sums: SoftmaxSums) -> Tensor:
        """Fold every tile into ``sums``. Returns the chosen tokens' logits, [rows,k]."""
        logits = self._chosen()
        for tile, _, pair, where in self.tiles():
            logits[pair] = tile[where].to(logits.dtype)
            sums.fold(tile)
        return logits.view(self.rows, self.k)

    def read_with_weighted_sum(self, sums: SoftmaxSums) -> tuple[Tensor, Tensor]:
        """Also sum e^(l - peak) times the head's rows, over all tokens but the chosen: ([rows,k],
        [rows,d]).
        """
        logits = self._chosen()
        total = torch.zeros(self.part.shape, dtype=logits.dtype, device=logits.device)
        for tile, weight, pair, where in self.tiles():
            logits[pair] = tile[where].to(logits.dtype)
            scale = sums.fold(tile, write=True)
            # the chosen token is left out of the sum: its part is added in full precision later
            tile[where] = 0
            add_scaled(total, matmul.mm(tile, weight, out=self.part), scale)
        return logits.view(self.rows, self.k), total[: self.rows]

    def hidden_gradient(self, terms: Tensor, entries: Tensor, *, moments: bool) -> Tensor:
        """The slopes `StatisticsRequest.slopes` describes times the head: [rows, d]."""
        terms = F.pad(terms, (0, 0, 0, len(self.hidden) - self.rows))
        flat = entries.flatten().to(self.space.dtype)
        total = torch.zeros(self.part.shape, dtype=terms.dtype, device=terms.device)
        ones = torch.ones_like(terms[:, 0])
        for tile, weight, pair, where in self.tiles():
            write_slope(tile, terms, moments=moments, out=tile)
            # chosen entries replaced whole: p - 1 near p = 1 loses all digits in bf16
            tile[where] = flat[pair]
            add_scaled(total, matmul.mm(tile, weight, out=self.part), ones)
        return total[: self.rows]

    def sums(self, *, moments: bool) -> SoftmaxSums:
        return SoftmaxSums.empty(len(self.hidden), self.hidden, moments=moments)

    def _chosen(self) -> Tensor:
        return torch.zeros(
            self.rows * self.k, dtype=accumulator_dtype(self.hidden), device=self.hidden.device
        )


def compute_statistics(
    hidden: Tensor, head: OutputHead, wanted: Sequence[VocabStatistic], rows: VocabRows
) -> Tensor:
    """[t,n] at least fp32: statistics of softmax(hidden [t,d] @ head [V,d]^T), differentiable in
    ``hidden``.
    """
    t = len(hidden)
    if not t:
        return hidden.new_zeros(0, len(wanted), dtype=accumulator_dtype(hidden))
    # equal groups instead of full ones and a remainder: fewer distinct shapes
    size = -(-t // -(-t // GROUP_ROWS))
    size += -size % ROUND_ROWS
    parts = []
    for i, group in enumerate(hidden.split(size)):
        request = StatisticsRequest.of(wanted, rows.cut(i * size, (i + 1) * size))
        parts.append(
            (OnePassStatistics if request.one_pass else TwoPassStatistics).apply(
                group, head, request
            )
        )
    return torch.cat(parts)


class OnePassStatistics(torch.autograd.Function):
    """`apply(hidden [t,d], head, request) -> [t,n]` where `StatisticsRequest.one_pass` holds;
    keeps d score / d hidden [t,d]: u ((1 - p) head[token] - sum over the others of p_v head[v])."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: OutputHead, request: StatisticsRequest) -> Tensor:
        head_pass = HeadPass(hidden, head, request.ids)
        own = head_pass.sums(moments=False)
        if not ctx.needs_input_grad[0]:
            logits = head_pass.read(own)
            sums, logits = head.merge(own.first_rows(len(hidden)), logits)
            return request.values(finish_softmax(sums, logits, head.vocab))
        logits, others = head_pass.read_with_weighted_sum(own)
        own = own.first_rows(len(hidden))
        sums, logits = head.merge(own, logits)
        if sums is not own:
            # relative to this rank's peak so far
            others.mul_((own.state[:, :1] - sums.state[:, :1]).exp())
        softmax = finish_softmax(sums, logits, head.vocab)
        values = request.values(softmax)
        token_grad = request.summary_gradients(softmax, torch.ones_like(values))[0]
        # -expm1(log p) = 1 - p without cancellation where p is near 1
        target_part = _target_rows(head, request.ids[:, 0]).to(others.dtype)
        target_part.mul_(-torch.expm1(softmax.chosen))
        ctx.save_for_backward(
            target_part.sub_(others.div_(sums.state[:, 1:2])).mul_(token_grad).to(hidden.dtype)
        )
        ctx.column = next(j for j, s in enumerate(request.statistics) if s.gradient)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dhidden,) = ctx.saved_tensors
        return (dhidden * grads[0][:, ctx.column, None]).to(dhidden.dtype), None, None


def _target_rows(head: OutputHead, ids: Tensor) -> Tensor:
    """[t,d]: the head's row of each token; zeros where it is another rank's."""
    if head.slices is None:
        return head.weight[ids]
    here = head.holds(ids)
    return head.weight[torch.where(here, ids - head.first, 0)].mul_(here[:, None])


class TwoPassStatistics(torch.autograd.Function):
    """`apply(hidden [t,d], head, request) -> [t,n]` for any statistics; backward forms the tiles
    once more.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: OutputHead, request: StatisticsRequest) -> Tensor:
        head_pass = HeadPass(hidden, head, request.ids)
        own = head_pass.sums(moments=request.moments)
        logits = head_pass.read(own)
        sums, logits = head.merge(own.first_rows(len(hidden)), logits)
        # the weight through autograd's hands, which see a write to it before backward
        ctx.save_for_backward(hidden, head.weight, logits)
        ctx.request, ctx.sums, ctx.slices = request, sums, head.slices
        return request.values(finish_softmax(sums, logits, head.vocab))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, logits = ctx.saved_tensors
        request: StatisticsRequest = ctx.request
        if not request.gradient:
            return torch.zeros_like(hidden), None, None
        head = OutputHead(weight, ctx.slices)
        terms, entries = request.slopes(
            ctx.sums, finish_softmax(ctx.sums, logits, head.vocab), head.vocab, grads[0]
        )
        return (
            HeadPass(hidden, head, request.ids)
            .hidden_gradient(terms, entries, moments=request.moments)
            .to(hidden.dtype),
            None,
            None,
        )


# --- whole rows, from a head that is adapted


class LogitsStatistics(torch.autograd.Function):
    """`apply(logits [t,V], request) -> [t,n]`; the gradient is formed in the logits' dtype, nothing
    else of their size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, request: StatisticsRequest) -> Tensor:
        sums = SoftmaxSums.empty(len(logits), logits, moments=request.moments)
        sums.fold(logits)
        ctx.save_for_backward(logits)
        ctx.request, ctx.sums, ctx.chosen = (
            request,
            sums,
            logits.gather(1, request.ids).to(sums.state.dtype),
        )
        return request.values(finish_softmax(sums, ctx.chosen, logits.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        request: StatisticsRequest = ctx.request
        if not request.gradient:
            return torch.zeros_like(logits), None
        softmax = finish_softmax(ctx.sums, ctx.chosen, logits.shape[1])
        terms, entries = request.slopes(ctx.sums, softmax, logits.shape[1], grads[0])
        dlogits = write_slope(logits, terms, moments=request.moments, out=torch.empty_like(logits))
        return dlogits.scatter_(1, request.ids, entries.to(dlogits.dtype)), None
