"""What contract 4 compares: a backend that is made to leak from one token of a sequence to one token of
another, or to score a packed sequence otherwise than alone, is found out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lorry.backends.distributed.deal import deal_batches
from lorry.backends.protocol import ScoringBackend
from lorry.data.batch import Batch, BatchExtra, TokenizedExample, collate
from lorry.evaluate import packing
from lorry.evaluate.packing import PackedSequences, packed_loss_difference, packing_leak

LENGTHS = (5, 9, 7, 3, 8)


def row(length: int, key: int, adapter: int = 0) -> TokenizedExample:
    """Tokens that no other row has, the second half of them supervised."""
    tokens = [100 * key + t for t in range(length)]
    weights = [float(t >= length // 2) for t in range(length)]
    return TokenizedExample(tokens, weights, key=key, adapter=adapter)


@dataclass
class Scorer:
    """Scores of supervised tokens by their sequence's tokens up to them alone, and ``more(batch)`` [T]."""

    more: Callable[[Batch], Tensor] = lambda batch: torch.zeros(len(batch.tokens))
    packs: list[int] = field(default_factory=list)

    def score(
        self, batches: Sequence[Batch], wants: Any, mix: Any = None
    ) -> list[dict[str, Tensor]]:
        self.packs += map(len, batches)
        return [{"logprob": self._of(batch)} for batch in batches]

    def _of(self, batch: Batch) -> Tensor:
        values = torch.zeros(len(batch.tokens))
        for start, stop in batch.segments:
            values[start:stop] = -1 - batch.tokens[start:stop].cumsum(0).remainder(7) / 10
        return torch.where(batch.weights != 0, values + self.more(batch), 0)


def packed_of(scorer: Scorer, rows: Sequence[TokenizedExample], **given: int) -> PackedSequences:
    return PackedSequences(cast(ScoringBackend, scorer), collate(rows), **given)


ROWS = [row(length, key) for key, length in enumerate(LENGTHS, 1)]


def keys(examples: Sequence[TokenizedExample]) -> list[int]:
    return [example.key for example in examples]


def test_the_longest_two_and_the_shortest_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MORE_TOKENS", 0)
    packed = packed_of(Scorer(), ROWS)
    assert keys(packed.examples) == [2, 5, 4]
    # the first lies as it would alone
    assert keys(packed.alone) == [5, 4]
    for count in (1, 2, 3):
        assert len(packed_of(Scorer(), ROWS[:count]).examples) == count
    # each of the ranks has as many
    assert sorted(keys(packed_of(Scorer(), ROWS, ranks=2).examples)) == [1, 2, 3, 4, 5]
    # one of each adapter, neighbours of different ones
    mixed = [row(length, key, key % 2) for key, length in enumerate(LENGTHS, 1)]
    two = packed_of(Scorer(), mixed, adapters=2)
    assert [e.adapter for e in two.examples] == [0, 1, 0]
    assert {e.adapter for e in two.alone} == {0, 1}
    # the longest of each, whichever has the longest of all and the shortest
    uneven = [row(length, key, key > 3) for key, length in enumerate((9, 8, 7, 3, 6, 5), 1)]
    assert keys(packed_of(Scorer(), uneven, adapters=2).examples) == [1, 5, 2]
    several = [row(4, key, key % 5) for key in range(15)]
    five = packed_of(Scorer(), several, adapters=5)
    assert [e.adapter for e in five.examples] == [e.adapter for e in five.alone] == [0, 1, 2, 3, 4]


def test_of_short_sequences_more_are_compared() -> None:
    """Up to eight, and to 256 tokens."""
    packed = packed_of(Scorer(), [row(9, key) for key in range(1, 12)])
    assert (len(packed.examples), len(packed.alone)) == (8, 7)
    packed = packed_of(Scorer(), [row(60, key) for key in range(1, 12)])
    assert (len(packed.examples), len(packed.alone)) == (4, 3)
    packed = packed_of(Scorer(), [row(200, key) for key in range(1, 12)])
    assert (len(packed.examples), len(packed.alone)) == (3, 2)
    # as many for each rank
    packed = packed_of(Scorer(), [row(9, key) for key in range(1, 12)], ranks=2)
    assert (len(packed.examples), len(packed.alone)) == (8, 7)


def test_a_sound_backend_shows_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MORE_TOKENS", 0)
    scorer = Scorer()
    packed = packed_of(scorer, ROWS)
    assert (packing_leak(packed), packed_loss_difference(packed)) == (0, 0)
    # packed once, with each of them reversed, and two alone
    assert scorer.packs == [3, 3, 3, 3, 1, 1]


@pytest.mark.parametrize(("source", "sink"), itertools.permutations(range(len(ROWS)), 2))
def test_a_leak_from_any_token_to_any_supervised_one_is_found(source: int, sink: int) -> None:
    """However small: to any sequence from any other."""
    packed = packed_of(Scorer(), ROWS)
    assert len(packed.examples) == len(ROWS)
    (at, end), (first, last) = packed.batch.segments[source], packed.batch.segments[sink]
    into = [t for t in range(first, last) if packed.batch.weights[t]]
    for token, to in itertools.product(range(at, end), into):
        if 2 * token == at + end - 1:
            continue  # the middle of an odd number of tokens, which reversing leaves where it is

        def leaking(batch: Batch, token: int = token, to: int = to) -> Tensor:
            leaked = torch.zeros(len(batch.tokens))
            if len(batch) > 1:
                leaked[to] = 1e-6 * float(batch.tokens[token])
            return leaked

        assert packing_leak(packed_of(Scorer(leaking), ROWS)) > 0, (token, to)


@dataclass
class RanksScorer(Scorer):
    """As ``ranks`` that share a batch score it; on each a sequence hears the one before it, or only
    one of another adapter (``across``)."""

    ranks: int = 1
    across: bool = False

    def _of(self, batch: Batch) -> Tensor:
        found = torch.zeros(len(batch.tokens))
        rows = batch.with_extra(rows=BatchExtra(torch.arange(len(batch.tokens)), "token"))
        for (part,) in deal_batches([rows], self.ranks, 0):
            if part is None:
                continue
            heard = torch.zeros(len(part.tokens))
            neighbours = itertools.pairwise(zip(part.segments, part.adapter.tolist(), strict=True))
            for ((before, _), other), ((start, stop), own) in neighbours:
                if own != other or not self.across:
                    heard[start:stop] = 1e-6 * float(part.tokens[before])
            scores = super()._of(part) + torch.where(part.weights != 0, heard, 0)
            found[part.extra["rows"].values] = scores
        return found


@pytest.mark.parametrize("lengths", [(8,) * 8, (20, *[3] * 7), LENGTHS], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_leak_on_any_rank_is_found(ranks: int, lengths: Sequence[int]) -> None:
    """Sequences of one length go to the ranks in turn: neighbours in the batch are none on a rank."""
    rows = [row(length, key) for key, length in enumerate(lengths, 1)]
    scorer = RanksScorer(ranks=ranks)
    packed = packed_of(scorer, rows, ranks=ranks)
    (one,) = scorer.score([packed.batch], {})
    alone = [scorer.score([collate([example])], {})[0] for example in packed.examples]
    # a rank that has one sequence alone has no leak
    leaks = not torch.equal(one["logprob"], torch.cat([each["logprob"] for each in alone]))
    assert (packing_leak(packed) > 0) == leaks


@pytest.mark.parametrize(
    "lengths", [((8,) * 8,) * 2, ((10, 2), (9, 3)), (LENGTHS, (4, 4, 6)), ((7,) * 6,) * 3], ids=str
)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_leak_between_jobs_is_found_on_any_rank(
    ranks: int, lengths: Sequence[Sequence[int]]
) -> None:
    """Dealt one by one, equal rows of two jobs in turn would give each of two ranks a job of its own."""
    jobs = len(lengths)
    rows = [
        row(length, 1 + job + jobs * n, job)
        for job, own in enumerate(lengths)
        for n, length in enumerate(own)
    ]
    packed = packed_of(RanksScorer(ranks=ranks, across=True), rows, adapters=jobs, ranks=ranks)
    assert packing_leak(packed) > 0
    # and on every rank with as many sequences as there are jobs
    for (part,) in deal_batches([packed.batch], ranks, 0):
        if part is not None and len(part) >= jobs and len(set(map(len, lengths))) == 1:
            assert set(part.adapter.tolist()) == set(range(jobs))


def test_the_loss_of_packed_and_alone_is_compared_by_sequence_and_relative_above_one() -> None:
    """Those behind the first score more the further back they lie, as positions that do not restart
    would have it."""

    def by_place(batch: Batch) -> Tensor:
        return -torch.arange(len(batch.tokens)) / 100

    packed = packed_of(Scorer(by_place), ROWS)
    shifts = [start for start, _ in packed.batch.segments]
    counts = [sum(example.weights) for example in packed.examples]
    more = sum(count * shift / 100 for count, shift in zip(counts[1:], shifts[1:], strict=True))
    alone = -sum(
        float(packed.backend.score([collate([example])], {})[0]["logprob"].sum())
        for example in packed.examples[1:]
    )
    assert alone > sum(counts[1:])
    assert math.isclose(packed_loss_difference(packed), more / alone, rel_tol=1e-5)
