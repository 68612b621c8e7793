"""What the batches of an unlearning step are made of: roles, the tokens that count, answers that
belong together.

A sequence's role is "forget", "retain" or "alternate": another answer to the question of a forget
or a retain sequence, in that one's group. S sequences, T packed tokens.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from lorry.data.batch import Batch, BatchExtra
from lorry.data.stream.joint import select_sequences
from lorry.errors import DataError

FORGET, RETAIN, ALTERNATE = "forget", "retain", "alternate"


def has_role(batch: Batch, *roles: str) -> Tensor:
    """[S] bool."""
    return torch.tensor([role in roles for role in batch.role], device=batch.starts.device)


def role_weights(batch: Batch, *roles: str) -> BatchExtra:
    """[T] float32: the batch's weights at the sequences of some roles, 0 elsewhere."""
    has_weight = has_role(batch, *roles)[batch.sequence_of]
    return BatchExtra(torch.where(has_weight, batch.weights, 0.0), "token")


def full_weights(batch: Batch, *roles: str) -> BatchExtra:
    """[T] float32: 1 at every token but the first of the sequences of some roles, prompts included."""
    has_weight = has_role(batch, *roles)[batch.sequence_of] & (batch.positions > 0)
    return BatchExtra(has_weight.float(), "token")


def weights_by_adapter(batch: Batch, name: str, adapters: int) -> Tensor:
    """[K] float64: an extra's per-token weights, added up per adapter."""
    # float64: a step's total weight divides its loss, and fp32 sums depend on their order
    per_sequence = batch.sum_by_sequence(batch.extra[name].values.double())
    own = batch.adapter >= 0
    total = torch.zeros(adapters, dtype=torch.float64, device=batch.starts.device)
    return total.index_add_(0, batch.adapter[own], per_sequence[own])


def without_first_tokens(batch: Batch, weights: Tensor, counts: Tensor) -> Tensor:
    """[T]: ``weights`` without those of the first ``counts`` [S] supervised tokens of every answer,
    an answer being a run of supervised tokens: a chat has several.
    """
    on = weights != 0
    before = torch.cat([on.new_zeros(1), on[:-1]])
    begins = on & (~before | (batch.positions == 0))
    running = on.long().cumsum(0)
    # how many supervised tokens lay before the answer that a token is part of
    offset = torch.where(begins, running - 1, 0).cummax(0).values
    return torch.where(running - offset > counts[batch.sequence_of], weights, 0.0)


def partners(batch: Batch, role: str) -> tuple[Tensor, Tensor]:
    """(sequences of a role [n], the alternate of each [n]), int64. Raises DataError for one without
    an alternate in its group, or with several.
    """
    members: dict[tuple[int, int], list[int]] = {}
    group, adapter = batch.group.tolist(), batch.adapter.tolist()
    for s, of in enumerate(batch.role):
        if of == ALTERNATE:
            members.setdefault((group[s], adapter[s]), []).append(s)
    own = [s for s, of in enumerate(batch.role) if of == role]
    for s in own:
        # with two, which of them is meant would hang on their order in the batch
        count = len(members.get((group[s], adapter[s]), [])) if group[s] >= 0 else 0
        if count != 1:
            raise DataError(
                f"the {role} sequence with key {int(batch.key[s])} has {count} "
                "alternate answers in its group; exactly one is needed"
            )
    others = [members[group[s], adapter[s]][0] for s in own]
    device = batch.starts.device
    return (
        torch.tensor(own, dtype=torch.int64, device=device),
        torch.tensor(others, dtype=torch.int64, device=device),
    )


def append_token(batch: Batch, *roles: str) -> Batch:
    """The batch with one more token, unsupervised, behind each sequence of some roles: a target that
    the logits of the last token can be scored at. No other token can see it.
    """
    longer = has_role(batch, *roles).tolist()
    index: list[int] = []
    for (start, stop), more in zip(batch.segments, longer, strict=True):
        index += [*range(start, stop), *([-1] if more else [])]
    # [T'] the token that each place takes, -1 where the new one goes
    at = torch.tensor(index)
    real, source = at >= 0, at.clamp(min=0)

    def spread(values: Tensor) -> Tensor:
        rows = values[source]
        return torch.where(real.view(-1, *[1] * (rows.dim() - 1)), rows, torch.zeros_like(rows))

    lengths = [n + more for n, more in zip(batch.lengths.tolist(), longer, strict=True)]
    return replace(
        batch,
        tokens=spread(batch.tokens),
        weights=spread(batch.weights),
        starts=torch.tensor([0, *accumulate(lengths)]),
        extra={
            n: BatchExtra(spread(e.values), "token") if e.per == "token" else e
            for n, e in batch.extra.items()
        },
    )


def delayed_weights(batch: Batch, name: str) -> BatchExtra:
    """[T]: an extra's weights one token later, so that a score of a target t is one of the logits at
    t, not t-1. Each sequence with a weight at its last token needs `append_token` first.
    """
    values = batch.extra[name].values
    # the first of a sequence would take the last of the one before it
    later = torch.cat([values.new_zeros(1), values[:-1]])
    return BatchExtra(torch.where(batch.positions > 0, later, 0.0), "token")


def split_parts(batch: Batch) -> list[Batch]:
    """The sequences of a batch that are about what is to be forgotten, and those about what is to be
    retained, alternates with the row they belong to; a part without any is left out.
    """
    # a group's number is one of its adapter: jobs in one batch count from 0 each
    places = list(zip(batch.group.tolist(), batch.adapter.tolist(), strict=True))
    retain_places = {
        place for place, role in zip(places, batch.role, strict=True) if role == RETAIN
    }
    retain = [
        role == RETAIN or (role == ALTERNATE and place in retain_places)
        for place, role in zip(places, batch.role, strict=True)
    ]
    parts = [[s for s, of in enumerate(retain) if of == which] for which in (False, True)]
    return [select_sequences(batch, part) for part in parts if part]


def replace_by_alternates(batch: Batch, role: str) -> Batch:
    """Every sequence of a role gives way to its alternate, which takes the role: what it asks is
    learnt with the other answer, and its own answer need not be read.
    """
    own, others = (side.tolist() for side in partners(batch, role))
    promoted, gone = set(others), set(own)
    renamed = tuple(role if s in promoted else of for s, of in enumerate(batch.role))
    remaining = [s for s in range(len(batch)) if s not in gone]
    return select_sequences(replace(batch, role=renamed), remaining)


def repeated_alternates(batch: Batch, role: str) -> BatchExtra:
    """[T] int64: at the supervised tokens of a role, the supervised tokens of the alternate, its end
    of turn among them, again and again from its first; 0 elsewhere.
    """
    ids = torch.zeros_like(batch.tokens)
    for own, other in zip(*(side.tolist() for side in partners(batch, role)), strict=True):
        (start, stop), (first, last) = batch.segments[own], batch.segments[other]
        at = start + torch.nonzero(batch.weights[start:stop], as_tuple=True)[0]
        words = batch.tokens[first:last][batch.weights[first:last] != 0]
        # an answer may be shorter than the refusal, which is then cut, or longer: it begins again
        ids[at] = words[torch.arange(len(at)) % len(words)]
    return BatchExtra(ids, "token")
