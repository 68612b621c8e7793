"""The softmax of the vocabulary, a tile of columns at a time: sums over the tiles seen so far, and
slopes with respect to logits.

Nobody needs a whole row of logits for these. Compiled for bfloat16 and float32 on a CPU; everywhere else the
same maths in plain torch. t rows, w columns of a tile, V vocabulary. z = l - peak, p = softmax(l).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.kernels.build import call_kernel, kernel_for, load_library

# e^-200 is nothing: where a moment weighs by the exponential, -inf may stand as this
MIN_LOG_PROB = -200.0


def supports_softmax(x: Tensor) -> bool:
    """Whether the compiled kernels compute on ``x``."""
    return (
        x.dtype in (torch.bfloat16, torch.float32)
        and x.device.type == "cpu"
        and load_library() is not None
    )


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """What sums over logits like ``x`` are kept in: fp32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass
class SoftmaxSums:
    """The sums of t rows after ``columns`` columns. ``state`` [t, 5]: the peak, the sums of e^z,
    e^z z, e^z z^2, and of z; ``top`` [t] int64: the first column that holds the peak. Without
    ``moments`` only the first two sums are kept.
    """

    state: Tensor
    top: Tensor
    moments: bool
    columns: int = 0

    @staticmethod
    def empty(rows: int, like: Tensor, *, moments: bool) -> SoftmaxSums:
        """Nothing seen yet, for logits of the dtype and device of ``like``."""
        state = torch.zeros(rows, 5, dtype=accumulator_dtype(like), device=like.device)
        # below every logit, so the first tile always raises the peak
        state[:, 0] = -torch.inf
        return SoftmaxSums(state, torch.zeros(rows, dtype=torch.int64, device=like.device), moments)

    def first_rows(self, rows: int) -> SoftmaxSums:
        """The first rows alone."""
        return SoftmaxSums(self.state[:rows], self.top[:rows], self.moments, self.columns)

    @staticmethod
    def merge(parts: Sequence[SoftmaxSums]) -> SoftmaxSums:
        """The sums of rows whose columns several have seen, side by side in this order."""
        states = torch.stack([part.state for part in parts])
        peaks = states[..., 0]
        peak = peaks.amax(0)
        # as in `_fold`: a part that has seen nothing finite counts for nothing
        empty = peaks == -torch.inf
        down = torch.where(empty, 0.0, peaks - peak)
        scale = torch.where(empty, 0.0, down.exp())
        _, total, first, second, plain = states.unbind(2)
        columns = [part.columns for part in parts]
        count = torch.tensor(columns, dtype=down.dtype, device=down.device)[:, None]
        merged = torch.zeros_like(states[0])
        merged[:, 0], merged[:, 1] = peak, (scale * total).sum(0)
        if parts[0].moments:
            merged[:, 2] = (scale * (first + down * total)).sum(0)
            merged[:, 3] = (scale * (second + 2 * down * first + down * down * total)).sum(0)
            merged[:, 4] = (plain + down * count).sum(0)
        # of equal peaks the first part's, as argmax has it
        starts = torch.tensor([0, *columns[:-1]], device=down.device).cumsum(0)
        tops = torch.stack([part.top for part in parts]) + starts[:, None]
        top = tops.gather(0, peaks.argmax(0)[None])[0]
        return SoftmaxSums(merged, top, parts[0].moments, sum(columns))

    def fold(self, tile: Tensor, *, write: bool = False) -> Tensor:
        """Take in the next columns [t, w]. Returns [t] what sums relative to the former peak are to
        be multiplied by.

        With ``write`` the tile becomes e^z. A NaN or +inf in a row makes its sums NaN.
        """
        if supports_softmax(tile):
            scale = torch.empty(len(tile), dtype=torch.float32)
            call_kernel(
                kernel_for("softmax_fold", tile),
                tile,
                self.state,
                self.top,
                scale,
                *tile.shape,
                self.columns,
                int(self.moments),
                int(write),
            )
        else:
            scale = self._fold(tile, write)
        self.columns += tile.shape[1]
        return scale

    def _fold(self, tile: Tensor, write: bool) -> Tensor:
        # a clone: unbind gives views of the state that is written below
        former, total, first, second, plain_sum = self.state.clone().unbind(1)
        high, where = tile.max(1)
        peak = torch.maximum(former, high.to(former.dtype))
        # strictly above: of equal peaks the first column stays, as argmax has it
        self.top = torch.where(
            (high > former) | (self.columns == 0), where + self.columns, self.top
        )
        # -inf minus -inf is NaN: a row that has seen nothing finite is rescaled by 0 instead
        empty = former == -torch.inf
        down = torch.where(empty, 0.0, former - peak)
        scale = torch.where(empty, 0.0, down.exp())
        # relative to the new peak, so no exponential exceeds 1
        z = tile.to(former.dtype) - torch.where(peak == -torch.inf, 0.0, peak)[:, None]
        self.state[:, 0] = peak
        if self.moments:
            self.state[:, 4] = plain_sum + down * self.columns + z.sum(1)
            low = z.clamp(min=MIN_LOG_PROB)
        e = z.exp_()
        self.state[:, 1] = scale * total + e.sum(1)
        if self.moments:
            weighed = e * low
            # moments about the former peak become moments about the new one: z' = z + (former -
            # peak)
            self.state[:, 2] = scale * (first + down * total) + weighed.sum(1)
            self.state[:, 3] = scale * (
                second + 2 * down * first + down * down * total
            ) + weighed.mul_(low).sum(1)
        if write:
            tile.copy_(e)
        return scale


def write_slope(tile: Tensor, terms: Tensor, *, moments: bool, out: Tensor) -> Tensor:
    """out = p (a + b y + c y^2) + k of a tile of logits [t, w], p = e^(l - shift), y = l - centre;
    ``out`` may be the tile.

    ``terms`` [t, 6]: shift, centre, a, b, c, k. Without ``moments`` b, c and k are taken for 0.
    """
    if supports_softmax(tile):
        call_kernel(kernel_for("softmax_slope", tile), tile, out, terms, *tile.shape, int(moments))
        return out
    shift, centre, a, b, c, k = (column[:, None] for column in terms.unbind(1))
    logits = tile.to(terms.dtype)
    if not moments:
        return out.copy_((logits - shift).exp_().mul_(a))
    # -inf logits: p is 0 there, but 0 * inf would be NaN
    y = (logits - centre).clamp_(min=MIN_LOG_PROB)
    bend = (y * c).add_(b).mul_(y).add_(a)
    return out.copy_((logits - shift).exp_().mul_(bend).add_(k))


def add_scaled(total: Tensor, part: Tensor, scale: Tensor) -> Tensor:
    """total [t, d] = total * scale [t] + part, in place, in total's dtype."""
    if supports_softmax(part):
        call_kernel(kernel_for("softmax_gather", part), total, part, scale, *part.shape)
        return total
    return total.mul_(scale[:, None]).add_(part)
