"""Dropout as a function of names: (seed, step, sequence key, site). No mask is stored, no generator
has a state.

Whether element n of a sequence's input is kept is a hash of the four names and n, so packing,
accumulation, adapters beside, recompute and restarts do not matter, and backward asks the same
question again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorry.adapters.seeds import derive_seed
from lorry.adapters.tensor_parallel.slices import DimensionSlice
from lorry.kernels import call_kernel, load_library

# real keys are at least 0
PADDING_KEY = -1  # the sequence key of padding; nothing reads what is drawn for it
WORD_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class DropoutNoise:
    """The dropout of one forward pass over packed sequences: their ``keys`` [S] and ``starts``
    [S+1].

    A ``site`` names an input (layer and place); projections that read the same input share its
    mask. ``rows``: only these tokens.
    """

    seed: int
    step: int
    keys: tuple[int, ...]
    starts: tuple[int, ...]
    rows: Tensor | None = None

    def at(
        self, site: str, p: float, columns: DimensionSlice | None = None
    ) -> SeededDropout | None:
        """The dropout of one input; ``columns``: of which this rank has these alone."""
        seeds = [derive_seed("dropout", self.seed, self.step, key, site) for key in self.keys]
        return SeededDropout(
            torch.tensor(seeds, dtype=torch.int64), torch.tensor(self.starts), p, self.rows, columns
        )

    def padded(self, total: int) -> DropoutNoise:
        """With padding behind the sequences, up to ``total`` tokens."""
        return DropoutNoise(
            self.seed, self.step, (*self.keys, PADDING_KEY), (*self.starts, total), self.rows
        )


@dataclass(frozen=True, kw_only=True)
class GeneratorNoise(DropoutNoise):
    """The dropout of plain `model(x)` calls in a training loop that is not ours: as of `nn.Dropout`.

    Every linear draws a mask for itself, its seed from torch's default generator (of the CPU), while
    ``model`` is in training mode. So `torch.manual_seed`, activation checkpointing and the generator
    states that a trainer saves count.
    """

    seed: int = 0
    step: int = 0
    keys: tuple[int, ...] = ()
    starts: tuple[int, ...] = (0,)
    model: nn.Module

    def at(
        self, site: str, p: float, columns: DimensionSlice | None = None
    ) -> SeededDropout | None:
        """The dropout of one call; None in evaluation mode."""
        if not self.model.training:
            return None
        seeds, starts = torch.randint(2**62, (1,)), torch.tensor(self.starts)
        return _OneCallDropout(seeds, starts, p, columns=columns)


@dataclass(frozen=True)
class SeededDropout:
    """Inverted dropout at one input: kept elements are multiplied by 1/(1-p). seeds [S], starts
    [S+1] int64; ``columns``: of an input that is cut over ranks, which part this one has.
    """

    seeds: Tensor
    starts: Tensor
    p: float
    rows: Tensor | None = field(default=None, repr=False)
    columns: DimensionSlice | None = None

    @property
    def threshold(self) -> int:
        """Of 2^16: half a hash below it drops."""
        # p just below 1 would round to 2^16 and drop every element
        return min(round(self.p * 2.0**16), 0xFFFF)

    def apply(self, x: Tensor, tokens: slice) -> Tensor:
        """x [n, width], the batch's rows ``tokens``; or a gradient with respect to the result,
        which passes the same mask.
        """
        keep_scale = 1.0 / (1.0 - self.p)
        if (
            # the kernel walks consecutive tokens; picked rows take the plain path of the same hash
            self.rows is None
            and x.dtype == torch.bfloat16
            and x.device.type == "cpu"
            and load_library() is not None
        ):
            x = x.contiguous()
            y = torch.empty_like(x)
            call_kernel(
                "dropout_rows",
                x,
                y,
                *self._kernel_arguments(tokens),
                *x.shape,
                *self._place(x.shape[1]),
                self.threshold,
                keep_scale,
            )
            return y
        # multiplied in fp32 and rounded once, as the kernel does it
        values = x if x.dtype == torch.float64 else x.float()
        return (values * (self.mask(x.shape[1], x.device, tokens) * keep_scale)).to(x.dtype)

    def mask(self, width: int, device: torch.device, tokens: slice = slice(None)) -> Tensor:
        """Bool [n, width], True = kept, for the rows ``tokens`` of the batch (of ``rows``, where
        only some are in it).
        """
        total = int(self.starts[-1])
        if self.rows is not None:
            return self._hash_mask(width, self.rows.to(device)[tokens])
        first, last, _ = tokens.indices(total)
        if device.type == "cpu" and load_library() is not None:
            mask = torch.empty(last - first, width, dtype=torch.bool)
            call_kernel(
                "dropout_mask",
                mask,
                *self._kernel_arguments(tokens),
                last - first,
                width,
                *self._place(width),
                self.threshold,
            )
            return mask
        return self._hash_mask(width, torch.arange(first, last, device=device))

    def _place(self, width: int) -> tuple[int, int]:
        """(the width of a whole row, where in it the ``width`` columns here begin)."""
        return (width, 0) if self.columns is None else (self.columns.whole, self.columns.offset)

    def _kernel_arguments(self, tokens: slice) -> Sequence[Tensor | int]:
        return self.seeds, self.starts, len(self.seeds), tokens.start or 0

    def _hash_mask(self, width: int, row: Tensor) -> Tensor:
        """The same as the kernel's for any rows of the batch, in 64-bit integers, where ``row`` is."""
        seeds, starts = self.seeds.to(row.device), self.starts.to(row.device)
        # the place inside the sequence counts, not in the batch: packing does not change the mask
        sequence = torch.searchsorted(starts, row, right=True) - 1
        low, high = (seeds & WORD_MASK)[sequence, None], (seeds >> 32)[sequence, None]
        whole, offset = self._place(width)
        column = torch.arange(width, device=row.device)
        n = (row - starts[sequence])[:, None] * whole + offset + column
        # one 32-bit hash (xxHash32's primes and a murmur3 finaliser) serves two elements, 16 bits
        # each
        x = (((n >> 1) & WORD_MASK) * 0x9E3779B1 + low) & WORD_MASK
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & WORD_MASK
        x = (((x ^ (x >> 13)) + high) * 0xC2B2AE35) & WORD_MASK
        x = ((x ^ (x >> 16)) * 0x27D4EB2F) & WORD_MASK
        x = x ^ (x >> 15)
        return torch.where(n % 2 == 1, x >> 16, x & 0xFFFF) >= self.threshold


class _OneCallDropout(SeededDropout):
    """Of all rows that it is given, as one sequence: how many a call has, only the call knows."""

    def apply(self, x: Tensor, tokens: slice) -> Tensor:
        rows = SeededDropout(self.seeds, torch.tensor([0, len(x)]), self.p)
        return rows.apply(x, slice(0, len(x)))
