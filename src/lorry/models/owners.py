"""Sequences whose adapters have weights of their own in the base's place (`variants.own_weights`): a pass has
those of one adapter at most, so a batch of several owners is run in parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lorry.adapters.bank import AdapterBank
from lorry.adapters.mix import AdapterContext, Mix, MixTerm
from lorry.data.batch import Batch, BatchExtra

Owners = frozenset[str]


def owning_adapters(model: nn.Module) -> Owners:
    """Those of a model's adapters that have weights of their own."""
    bank: AdapterBank | None = model.__dict__.get("lorry_bank")
    adapters = {} if bank is None else bank.adapters
    return frozenset(
        name
        for name, adapter in adapters.items()
        if any(one.replaces is not None for one in adapter.further.values())
    )


def owners_in(mix: Mix, owning: Owners) -> Owners:
    """Those that are active somewhere in a mix."""
    return owning & {term.adapter for term in mix.terms}


@dataclass(frozen=True)
class BatchPart:
    """Some ``sequences`` [s] of a batch, where their tokens are in it (``rows`` [t]), a batch of them, and
    their call."""

    sequences: Tensor
    rows: Tensor
    batch: Batch
    call: AdapterContext


def parts_by_owner(model: nn.Module, batch: Batch, call: AdapterContext) -> list[BatchPart] | None:
    """A batch in parts of one owner each; None where the whole batch has one, or none."""
    owning = owning_adapters(model)
    if not any(t.rows is not None and t.adapter in owning for t in call.mix.terms):
        return None
    sequences_of: dict[Owners, list[int]] = {}
    for s, (start, stop) in enumerate(batch.segments):
        terms = [
            t
            for t in call.mix.terms
            if t.rows is None or (t.rows.start < stop and start < t.rows.stop)
        ]
        owners = owners_in(Mix(tuple(terms)), owning)
        sequences_of.setdefault(owners, []).append(s)
    return [_part(batch, call, sequences) for sequences in sequences_of.values()]


def _part(batch: Batch, call: AdapterContext, chosen: list[int]) -> BatchPart:
    spans = [torch.arange(*batch.segments[s]) for s in chosen]
    rows, sequences = torch.cat(spans), torch.tensor(chosen)
    ends = torch.tensor([0, *(len(span) for span in spans)]).cumsum(0)
    on, total = batch.tokens.device, len(rows)
    rows, sequences = rows.to(on), sequences.to(on)
    part = replace(
        batch,
        tokens=batch.tokens[rows],
        weights=batch.weights[rows],
        starts=ends.to(on),
        adapter=batch.adapter[sequences],
        key=batch.key[sequences],
        group=batch.group[sequences],
        role=tuple(batch.role[s] for s in chosen),
        extra={
            name: BatchExtra(e.values[rows if e.per == "token" else sequences], e.per)
            for name, e in batch.extra.items()
        },
    )
    mix = call.mix.narrow(rows)
    noise = call.noise
    if noise is not None:
        # dropout is of a sequence's key and place, whatever stands beside it
        keys = tuple(noise.keys[s] for s in chosen)
        noise = replace(noise, keys=keys, starts=tuple(ends.tolist()))
    context = replace(call, mix=replace(mix, terms=_joined(mix.terms, total)), noise=noise)
    return BatchPart(sequences, rows, part, context)


def _joined(terms: Sequence[MixTerm], total: int) -> tuple[MixTerm, ...]:
    """The terms of ``total`` tokens, those that were apart in the whole batch as one."""
    joined = list[MixTerm]()
    for term in terms:
        before = next(
            (
                n
                for n, t in enumerate(joined)
                if t.rows is not None
                and term.rows is not None
                and t.rows.stop == term.rows.start
                and not isinstance(t.gate, Tensor)
                and replace(t, rows=term.rows) == term
            ),
            None,
        )
        if before is None:
            joined.append(term)
            continue
        rows = joined[before].rows
        assert rows is not None
        assert term.rows is not None
        joined[before] = replace(term, rows=slice(rows.start, term.rows.stop))
    return tuple(replace(t, rows=None) if t.rows == slice(0, total) else t for t in joined)
