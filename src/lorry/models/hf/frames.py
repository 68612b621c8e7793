"""Packed tokens as padded batches and back, with the call that goes with them: for models that know
no packing.

A frame is a few packed sequences of similar length laid out as [S, L]. Its call says, for frame
positions, what the packed call says for packed positions. T packed tokens, S sequences, L padded
length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lorry.adapters.dropout import PADDING_KEY, DropoutNoise
from lorry.adapters.mix import AdapterContext, Mix, MixTerm

TokenSpan = tuple[int, int]


@dataclass(frozen=True)
class PaddedFrame:
    """spans: (start, stop) in the packed tokens; padding stands on the right, or on the left for
    generation.
    """

    spans: Sequence[TokenSpan]
    device: torch.device
    left: bool = False

    @cached_property
    def length(self) -> int:
        return max(stop - start for start, stop in self.spans)

    @cached_property
    def offsets(self) -> list[int]:
        """Where each sequence begins in the flattened frame."""
        # left padding shifts a sequence right by what it lacks
        pads = [self.length - (stop - start) if self.left else 0 for start, stop in self.spans]
        return [i * self.length + pad for i, pad in enumerate(pads)]

    @cached_property
    def rows(self) -> Tensor:
        """[n] packed position of every real token, in frame order."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.spans]).to(self.device)

    @cached_property
    def positions(self) -> Tensor:
        """[n] flattened frame position of the same tokens."""
        parts = [
            torch.arange(o, o + stop - start)
            for o, (start, stop) in zip(self.offsets, self.spans, strict=True)
        ]
        return torch.cat(parts).to(self.device)

    def pad(self, packed: Tensor) -> Tensor:
        """[T] -> [S, L], zero at the padding."""
        flat = packed.new_zeros(len(self.spans) * self.length)
        return flat.index_copy(0, self.positions, packed.index_select(0, self.rows)).view(
            len(self.spans), self.length
        )

    def mask(self) -> Tensor:
        """[S, L] int64, 1 at real tokens."""
        flat = torch.zeros(len(self.spans) * self.length, dtype=torch.int64, device=self.device)
        return flat.index_fill(0, self.positions, 1).view(len(self.spans), self.length)

    def unpad(self, framed: Tensor) -> Tensor:
        """[S, L, D] -> [n, D], the real tokens in frame order."""
        return framed.flatten(0, 1).index_select(0, self.positions)

    def adapter_context(self, call: AdapterContext) -> AdapterContext:
        """The same mix and noise for this frame's positions. A sequence that a term covers only in
        part gets a gate of zeros elsewhere; so does the padding under a tensor gate."""
        # a term without tokens in this frame gives none
        terms = [framed for term in call.mix.terms for framed in self._term(term)]
        noise = None if call.noise is None else self._noise(call.noise)
        return replace(call, mix=Mix(tuple(terms), call.mix.router), noise=noise)

    def _term(self, term: MixTerm) -> list[MixTerm]:
        gate = term.gate
        if term.rows is None and not isinstance(gate, Tensor):
            return [term]
        start, stop = (
            (0, max(b for _, b in self.spans))
            if term.rows is None
            else (term.rows.start, term.rows.stop)
        )
        # spans [a, b) that overlap [start, stop)
        touched = [i for i, (a, b) in enumerate(self.spans) if a < stop and b > start]
        if not touched:
            return []
        whole = all(start <= a and b <= stop for a, b in (self.spans[i] for i in touched))
        # neighbours in the frame: only then is one slice of it the term's
        whole = whole and touched[-1] - touched[0] == len(touched) - 1
        if whole and not isinstance(gate, Tensor):
            if len(touched) == len(self.spans):
                return [replace(term, rows=None)]
            return [
                replace(term, rows=slice(touched[0] * self.length, (touched[-1] + 1) * self.length))
            ]
        # a term that ends inside a sequence: a gate per token, 0 outside
        inside = (self.rows >= start) & (self.rows < stop)
        rows, positions = self.rows[inside], self.positions[inside]
        values = (
            gate[rows - start]
            if isinstance(gate, Tensor)
            else torch.full(rows.shape, float(gate), device=self.device)
        )
        return [
            replace(
                term,
                rows=None,
                gate=values.new_zeros(len(self.spans) * self.length).index_copy(
                    0, positions, values
                ),
            )
        ]

    def _noise(self, noise: DropoutNoise) -> DropoutNoise:
        assert noise.rows is None, "a call with selected positions is for the output head only"
        key_at = dict(zip(noise.starts[:-1], noise.keys, strict=True))
        keys, starts = [], [0]
        for i, (offset, (start, stop)) in enumerate(zip(self.offsets, self.spans, strict=True)):
            # padding before, the sequence, padding behind; empty stretches are left out below
            for key, edge in (
                (PADDING_KEY, offset),
                (key_at[start], offset + stop - start),
                (PADDING_KEY, (i + 1) * self.length),
            ):
                if edge > starts[-1]:
                    keys.append(key)
                    starts.append(edge)
        return DropoutNoise(noise.seed, noise.step, tuple(keys), tuple(starts))


def build_padded_frames(
    segments: Sequence[TokenSpan], device: torch.device, slack: float = 1.25
) -> list[PaddedFrame]:
    """Right-padded frames of sequences of similar length: none is padded to more than ``slack``
    times its own.
    """
    groups: list[list[TokenSpan]] = []
    for span in sorted(segments, key=lambda s: s[1] - s[0]):
        shortest = groups[-1][0] if groups else None
        if shortest is not None and span[1] - span[0] <= slack * (shortest[1] - shortest[0]):
            groups[-1].append(span)
        else:
            groups.append([span])
    return [PaddedFrame(sorted(group), device) for group in groups]


def unpad_frames(parts: Sequence[tuple[PaddedFrame, Tensor]]) -> Tensor:
    """Per frame [n, D] -> [T, D] in packed order."""
    if len(parts) == 1:
        return parts[0][1].index_select(0, torch.argsort(parts[0][0].rows))
    # frames are sorted by length; this puts tokens back in packed order
    order = torch.argsort(torch.cat([frame.rows for frame, _ in parts]))
    return torch.cat([part for _, part in parts]).index_select(0, order)


def depends_on_position(call: AdapterContext) -> bool:
    """Whether a call treats tokens differently by where they stand (per-sequence terms, gates, a
    router, dropout).
    """
    return (
        call.noise is not None
        or call.router is not None
        or any(t.rows is not None or isinstance(t.gate, Tensor) for t in call.mix.terms)
    )
