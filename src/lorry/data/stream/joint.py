"""Several jobs in one stream: micro-batches that hold the sequences of several jobs, side by side
in the order of the jobs.

A job keeps its own rows, order, batch size and accumulation: what it reads in a step is what it
would read alone. The first micro-batches of all jobs are laid end to end, then the second ones, and
so on; so each low-rank term covers one contiguous range of tokens. Small ones share a forward pass,
which is faster; large ones follow one another, which takes no longer and keeps the activations
those of one job. Neither changes a result. One job alone is the case of K = 1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, zip_longest
from typing import Any

import torch

from lorry.data.batch import Batch, BatchExtra
from lorry.data.stream.dataset import BatchStream
from lorry.data.stream.pack import sequence_key


class JointStream:
    """The streams of K jobs as one. ``streams``: by adapter name, in the order of their numbers;
    ``seeds``: each job's own; ``room``: jobs share a micro-batch while it has at most so many
    tokens.
    """

    def __init__(
        self, streams: Mapping[str, BatchStream], seeds: Mapping[str, int], room: int
    ) -> None:
        self.streams, self.seeds, self.room = dict(streams), dict(seeds), room

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step, counted from 0."""
        own = [
            [assign_adapter(batch, number, self.seeds[name]) for batch in stream.batches(step)]
            for number, (name, stream) in enumerate(self.streams.items())
        ]
        batches = list[Batch]()
        # jobs with fewer micro-batches are absent from the later ones
        for side_by_side in zip_longest(*own):
            batches += join_within(
                [batch for batch in side_by_side if batch is not None], self.room
            )
        return batches

    def state(self) -> dict[str, Any]:
        """Where every stream stands, as JSON."""
        return {name: stream.state() for name, stream in self.streams.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go to a position. Raises DataError when the data is not what it was."""
        for name, stream in self.streams.items():
            stream.load_state(state[name])


def assign_adapter(batch: Batch, adapter: int, seed: int) -> Batch:
    """A job's batch: its sequences belong to an adapter, and its seed is part of their keys, so
    that whoever is beside them their dropout is that of the job alone. Seed 0 leaves keys as they
    are.
    """
    return replace(
        batch,
        adapter=torch.full_like(batch.adapter, adapter),
        key=batch.key ^ sequence_key(seed, -1),
    )


def join_within(batches: Sequence[Batch], room: int) -> list[Batch]:
    """Neighbours joined for as long as they have at most ``room`` tokens together."""
    groups, tokens = list[list[Batch]](), 0
    for batch in batches:
        tokens += batch.tokens.numel()
        # one that is larger than the room stands alone: it has been packed for its own job
        if not groups or tokens > room:
            groups.append([])
            tokens = batch.tokens.numel()
        groups[-1].append(batch)
    return [join_batches(group) for group in groups]


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Batches laid end to end as one; their groups stay apart. Raises ValueError where they carry
    other extra tensors.
    """
    # the very object: a run of one job is what it would be without this room
    if len(batches) == 1:
        return batches[0]
    # a tensor that one of them lacks could only be made up
    names = list(batches[0].extra)
    if any(list(b.extra) != names or list(b.terms) != list(batches[0].terms) for b in batches):
        raise ValueError("batches that are joined must carry the same extra tensors and terms")
    # tokens before each batch
    offsets = [0, *accumulate(b.tokens.numel() for b in batches)]
    # groups count from 0; -1 means none
    first = [
        0,
        *accumulate(int(b.group.max()) + 1 for b in batches),
    ]
    return Batch(
        tokens=torch.cat([b.tokens for b in batches]),
        weights=torch.cat([b.weights for b in batches]),
        starts=torch.cat(
            [
                batches[0].starts[:1],
                *(b.starts[1:] + at for b, at in zip(batches, offsets, strict=False)),
            ]
        ),
        adapter=torch.cat([b.adapter for b in batches]),
        key=torch.cat([b.key for b in batches]),
        group=torch.cat(
            [
                torch.where(b.group < 0, b.group, b.group + at)
                for b, at in zip(batches, first, strict=False)
            ]
        ),
        role=tuple(role for b in batches for role in b.role),
        extra={
            n: BatchExtra(torch.cat([b.extra[n].values for b in batches]), batches[0].extra[n].per)
            for n in names
        },
        terms={n: sum((b.terms[n] for b in batches[1:]), t) for n, t in batches[0].terms.items()},
    )


def select_sequences(batch: Batch, sequences: Sequence[int]) -> Batch:
    """Some sequences of a batch, in the order given; terms are left out, since their weights were
    those of the whole.
    """
    # places of the tokens in the whole batch, sequence by sequence
    spans = [torch.arange(*batch.segments[s]) for s in sequences]
    tokens, chosen = torch.cat(spans), torch.tensor(sequences)
    pick = {"token": tokens, "sequence": chosen}
    return Batch(
        tokens=batch.tokens[tokens],
        weights=batch.weights[tokens],
        starts=torch.tensor([0, *accumulate(len(span) for span in spans)]),
        adapter=batch.adapter[chosen],
        key=batch.key[chosen],
        group=batch.group[chosen],
        role=tuple(batch.role[s] for s in sequences),
        extra={name: BatchExtra(e.values[pick[e.per]], e.per) for name, e in batch.extra.items()},
    )


def keep_adapters(batches: Sequence[Batch], adapters: Collection[int]) -> list[Batch]:
    """The batches without the sequences of other adapters, whose terms weigh nothing then; a batch
    left empty is left out.
    """
    selected = []
    for batch in batches:
        rows = [s for s, adapter in enumerate(batch.adapter.tolist()) if adapter in adapters]
        if rows:
            # zero, not left out: the backend adds terms up by name and adapter
            gone = {
                n: t * torch.tensor([float(k in adapters) for k in range(len(t))]).to(t)
                for n, t in batch.terms.items()
            }
            selected.append(replace(select_sequences(batch, rows), terms=gone))
    return selected


def interleave_adapters(batch: Batch, adapters: int) -> Batch:
    """The same sequences with those of different adapters beside each other: the first of each, the
    second of each, and so on.
    """
    of_each = [
        [s for s, adapter in enumerate(batch.adapter.tolist()) if adapter == k]
        for k in range(adapters)
    ]
    return select_sequences(
        batch, [s for side_by_side in zip_longest(*of_each) for s in side_by_side if s is not None]
    )


def count_adapter_tokens(batches: Sequence[Batch], adapters: int) -> list[int]:
    """Tokens of each adapter's sequences."""
    total = torch.zeros(adapters, dtype=torch.int64)
    for batch in batches:
        # BASE (-1) is no index
        own = batch.adapter >= 0
        total.index_add_(0, batch.adapter[own], batch.lengths[own])
    return total.tolist()
