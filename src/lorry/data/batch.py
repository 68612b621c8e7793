"""Batch: what every task hands to every backend. Packed tokens, loss weights, sequence boundaries,
who owns them.

Shape letters used throughout Lorry: T packed tokens, S sequences, K adapters, V vocabulary, D
hidden width, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

ExtraScope = Literal["token", "sequence"]
BASE = -1  # the adapter id that means: the frozen base alone, g = 0


@dataclass(frozen=True)
class BatchExtra:
    """One more tensor that travels with a batch: ``per`` token ``[T, ...]`` or per sequence ``[S,
    ...]``.
    """

    values: Tensor
    per: ExtraScope


@dataclass(frozen=True)
class TokenizedExample:
    """One tokenised sequence before packing.

    ``tokens`` and ``weights`` have equal length; ``weights[t]`` is the weight of token t *as a
    target* (its logits come from t-1), so ``weights[0]`` is 0. ``key`` names the sequence for
    everything random about it (dropout).
    """

    tokens: Sequence[int]
    weights: Sequence[float]
    key: int = 0
    adapter: int = 0
    role: str = ""
    group: int = -1
    extra: Mapping[str, BatchExtra] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """A micro-batch of S packed sequences, T tokens in all. Nothing is padded.

    tokens [T] int64; weights [T] float32, weight of token t as target; starts [S+1] int64, sequence
    s is ``tokens[starts[s]:starts[s+1]]``; adapter [S] int64 (-1 = base); key [S] int64; group [S]
    int64: sequences of one group never part; role: one word per sequence; extra: declared per token
    or per sequence; terms: {loss term: [K] float64}, this batch's weight of each term per adapter,
    which the backend adds up over micro-batches and ranks before the first backward and divides by.
    """

    tokens: Tensor
    weights: Tensor
    starts: Tensor
    adapter: Tensor
    key: Tensor
    group: Tensor
    role: tuple[str, ...]
    extra: Mapping[str, BatchExtra] = field(default_factory=dict)
    terms: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.role)

    @cached_property
    def lengths(self) -> Tensor:
        """[S] int64, tokens of each sequence."""
        return self.starts[1:] - self.starts[:-1]

    @cached_property
    def sequence_of(self) -> Tensor:
        """[T] int64, the sequence each token belongs to."""
        return torch.repeat_interleave(
            torch.arange(len(self), device=self.starts.device), self.lengths
        )

    @cached_property
    def positions(self) -> Tensor:
        """[T] int64, counted from 0 in every sequence."""
        return (
            torch.arange(self.tokens.numel(), device=self.starts.device)
            - self.starts[:-1][self.sequence_of]
        )

    def tokens_read(self, adapter: int) -> Tensor:
        """[n] int64: the tokens of an adapter's sequences behind which there is a supervised one."""
        later = self.weights.new_zeros(len(self), dtype=torch.int64)
        places = torch.where(self.weights != 0, self.positions, 0)
        later.scatter_reduce_(0, self.sequence_of, places, "amax")
        read = (self.positions < later[self.sequence_of]) & (
            self.adapter[self.sequence_of] == adapter
        )
        return self.tokens[read]

    @cached_property
    def segments(self) -> list[tuple[int, int]]:
        """(start, stop) of each sequence as Python ints."""
        edges = self.starts.tolist()
        return list(pairwise(edges))

    @cached_property
    def rows(self) -> Tensor:
        """[t] int64, positions of the supervised tokens (weight != 0), as targets."""
        return torch.nonzero(self.weights, as_tuple=True)[0]

    def sum_by_sequence(self, per_token: Tensor) -> Tensor:
        """Add ``[T]`` values up within each sequence: ``[S]``, differentiable."""
        out = per_token.new_zeros(len(self))
        # out of place: autograd needs the values as they were
        return out.index_add(0, self.sequence_of, per_token)

    def count(self, per: ExtraScope, adapters: int, role: str | None = None) -> Tensor:
        """[K] float64: supervised weight per adapter (``token``) or sequences per adapter
        (``sequence``), of a role or of all.
        """
        keep = torch.tensor(
            [role is None or r == role for r in self.role], device=self.starts.device
        )
        # the base has no loss of its own to be divided by a weight
        keep &= self.adapter >= 0
        if per == "token":
            # [S] float64: in float32 a count above 2^24 would lose tokens
            per_sequence = torch.zeros(len(self), dtype=torch.float64, device=self.starts.device)
            per_sequence.index_add_(0, self.sequence_of, self.weights.double())
        else:
            per_sequence = torch.ones(len(self), dtype=torch.float64, device=self.starts.device)
        total = torch.zeros(adapters, dtype=torch.float64, device=self.starts.device)
        return total.index_add_(0, self.adapter[keep], per_sequence[keep])

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        # from pinned memory the copy need not be waited for
        move = lambda t: t.to(device, non_blocking=True)  # noqa: E731
        return replace(
            self,
            tokens=move(self.tokens),
            weights=move(self.weights),
            starts=move(self.starts),
            adapter=move(self.adapter),
            key=move(self.key),
            group=move(self.group),
            extra={
                name: BatchExtra(move(item.values), item.per) for name, item in self.extra.items()
            },
            terms={name: move(t) for name, t in self.terms.items()},
        )

    def with_extra(self, **extra: BatchExtra) -> Batch:
        """A copy that carries more tensors; lengths are checked."""
        for name, item in extra.items():
            expected = self.tokens.numel() if item.per == "token" else len(self)
            if item.values.shape[0] != expected:
                raise ValueError(
                    f"extra {name!r} is per {item.per} and needs {expected} rows, got {item.values.shape[0]}"
                )
        return replace(self, extra={**self.extra, **extra})

    def with_terms(self, **terms: Tensor) -> Batch:
        """A copy with the weight of each loss term per adapter, ``[K]``."""
        return replace(self, terms={**self.terms, **terms})


def collate(examples: Sequence[TokenizedExample]) -> Batch:
    """Lay examples end to end. Raises ValueError on an empty list, an empty example or uneven
    tokens and weights.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    for example in examples:
        if len(example.tokens) == 0 or len(example.tokens) != len(example.weights):
            raise ValueError(
                f"example {example.key}: {len(example.tokens)} tokens and {len(example.weights)} weights; both must be equal and above 0"
            )
        # its logits would be those of the neighbour that lies before it in the pack
        if example.weights[0]:
            raise ValueError(
                f"example {example.key}: the first token has no logits before it and cannot carry weight {example.weights[0]}"
            )
    lengths = torch.tensor([len(example.tokens) for example in examples])
    # [S + 1]: the end of a sequence is the start of the next, and the last has an end as well
    starts = torch.zeros(len(examples) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=starts[1:])
    # a tensor that some examples lack could not be told apart from zeros afterwards
    names = list(examples[0].extra)
    if any(list(example.extra) != names for example in examples):
        raise ValueError("examples of one batch must carry the same extra tensors")
    extra = {
        n: BatchExtra(
            torch.cat([example.extra[n].values for example in examples]), examples[0].extra[n].per
        )
        for n in names
    }
    return Batch(
        tokens=torch.tensor([t for example in examples for t in example.tokens], dtype=torch.int64),
        weights=torch.tensor(
            [w for example in examples for w in example.weights], dtype=torch.float32
        ),
        starts=starts,
        adapter=torch.tensor([example.adapter for example in examples]),
        key=torch.tensor([example.key for example in examples]),
        group=torch.tensor([example.group for example in examples]),
        role=tuple(example.role for example in examples),
        extra=extra,
    )
