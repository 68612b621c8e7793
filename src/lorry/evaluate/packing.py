"""Whether a sequence's scores hang on what else lies in its batch: a few sequences packed, packed beside
others, and alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from lorry.backends.distributed.deal import deal_batches
from lorry.backends.protocol import ScoringBackend
from lorry.data.batch import Batch, BatchExtra, TokenizedExample, collate
from lorry.data.stream.joint import interleave_adapters, select_sequences
from lorry.evaluate.loss import mean_nll
from lorry.models.scoring.score import TokenScore, log_prob

# a first, a middle and a last one: the boundaries behind them are made as these are
PACKED_SEQUENCES = 3
ALONE_SEQUENCES = 2
# of short ones more, up to so many tokens: a mean over few is of rounding as much as of packing
MOST_SEQUENCES, MORE_TOKENS = 8, 256


class PackedSequences:
    """A few sequences of a batch end to end: as many as there are ``adapters``, three at least, and so
    many for each of the ``ranks`` that they are dealt to; of short ones up to eight. Of each adapter the longest comes first, then
    the next longest, which torch's attention pads to the longest where they are much alike, then the
    shortest; those of different adapters are neighbours, on the rank too that they are dealt to, since
    a leak between jobs would not show within one.
    """

    def __init__(
        self, backend: ScoringBackend, batch: Batch, adapters: int = 1, ranks: int = 1
    ) -> None:
        # of one job all, whatever adapters they name
        numbers = batch.adapter.tolist() if adapters > 1 else [0] * len(batch)
        order = [
            s
            for k in range(max(adapters, 1))
            for s in _longest_first([n for n, own in enumerate(numbers) if own == k], batch)
        ]
        ordered = select_sequences(batch, order)
        if adapters > 1:
            ordered = interleave_adapters(ordered, adapters)
        self.backend, self.ranks = backend, ranks
        # one of each adapter that the batch has: as a group they are dealt to one rank
        together = len(set(numbers)) if ranks > 1 else 1
        examples = [
            replace(example, group=place // together if together > 1 else -1)
            for place, example in enumerate(split_examples(ordered))
        ]
        # as many groups for each rank
        step = together * ranks
        least = math.ceil(max(PACKED_SEQUENCES, adapters) / together) * step
        self.examples = examples[: _count_short(examples, least, step=step)]
        # the first sequence of a pack lies as it would alone
        backwards = self.examples[:0:-1] or self.examples
        self.alone = self.examples[-_count_short(backwards, max(ALONE_SEQUENCES, adapters)) :]

    @cached_property
    def batch(self) -> Batch:
        return collate(self.examples)

    @cached_property
    def scores(self) -> Tensor:
        """[T] log-probability of every supervised token, scored once."""
        return score_batch(self.backend, self.batch)

    @cached_property
    def places(self) -> list[int]:
        """How many of them come before each on its rank."""
        numbers = BatchExtra(torch.arange(len(self.examples)), "sequence")
        places = [0] * len(self.examples)
        for passes in deal_batches([self.batch.with_extra(number=numbers)], self.ranks, 0):
            for part in passes:
                numbered = [] if part is None else part.extra["number"].values.tolist()
                for place, number in enumerate(numbered):
                    places[number] = place
        return places


def _longest_first(sequences: Sequence[int], batch: Batch) -> list[int]:
    """The longest of these sequences, the next longest, the shortest, and the others."""
    by_length = sorted(sequences, key=lambda s: -int(batch.lengths[s]))
    return [*by_length[:2], *by_length[2:][-1:], *by_length[2:-1]]


def _count_short(examples: Sequence[TokenizedExample], least: int, *, step: int = 1) -> int:
    """How many of the examples: ``least``, and of short ones more, ``step`` at a time."""
    count = least
    while (
        count + step <= min(len(examples), MOST_SEQUENCES)
        and sum(len(e.tokens) for e in examples[: count + step]) <= MORE_TOKENS
    ):
        count += step
    return count


def packing_leak(packed: PackedSequences) -> float:
    """Largest change of a sequence's scores when the tokens of others are reversed: exactly 0 if
    nothing leaks, since shapes, and with them every kernel and its rounding, stay the same; rounding
    where `CausalLM.shapes_follow_tokens`. Of one sequence the change when it is scored again."""
    # so few passes that no sequence of a rank is reversed wherever another is (Sperner's theorem): each is
    # watched while any other is reversed
    count, passes = max(packed.places) + 1, 1
    while math.comb(passes, passes // 2) < count:
        passes += 1
    reversed_in = list(itertools.combinations(range(passes), passes // 2))
    worst = 0.0
    for number in range(passes):
        reverses = [number in reversed_in[place] for place in packed.places]
        watched = [
            slice(*segment)
            for segment, own in zip(packed.batch.segments, reverses, strict=True)
            if not own
        ]
        if not watched:
            continue
        others_reversed = [
            # reversed and not drawn anew: experts and vocabulary tiles see the same tokens
            replace(example, tokens=list(example.tokens)[::-1]) if own else example
            for example, own in zip(packed.examples, reverses, strict=True)
        ]
        after = score_batch(packed.backend, collate(others_reversed))
        worst = max([worst, *(float((after[w] - packed.scores[w]).abs().max()) for w in watched)])
    return worst


def packed_loss_difference(packed: PackedSequences) -> float:
    """Difference between the mean loss of sequences as they are packed and alone, relative to the loss
    where that is above 1: rounding and nothing more, if packing changes nothing."""
    alone, tokens = mean_nll(packed.backend, [collate([e]) for e in packed.alone])
    first = len(packed.examples) - len(packed.alone)
    weighted = (packed.scores.double() * packed.batch.weights.double())[
        packed.batch.segments[first][0] :
    ]
    # per token, and relative above a loss of 1: rounding grows with the loss
    return abs(-float(weighted.sum()) - alone) / max(tokens, alone)


def repeat_difference(packed: PackedSequences) -> float:
    """Largest change of a score when the same sequences are scored again: 0, unless a processor,
    its memory or a library gives other results for the same numbers."""
    again = score_batch(packed.backend, packed.batch)
    return float((packed.scores - again).abs().max())


def score_batch(backend: ScoringBackend, batch: Batch) -> Tensor:
    """[T] log-probability of every supervised token, 0 elsewhere."""
    # a copy: whoever scores may do so in the same memory the next time
    return backend.score([batch], {"logprob": TokenScore(log_prob)})[0]["logprob"].clone()


def split_examples(batch: Batch) -> list[TokenizedExample]:
    """The sequences of a batch, apart again."""
    examples = []
    for s, (start, stop) in enumerate(batch.segments):
        tokens, weights = batch.tokens[start:stop].tolist(), batch.weights[start:stop].tolist()
        examples.append(
            TokenizedExample(
                tokens,
                weights,
                adapter=int(batch.adapter[s]),
                key=int(batch.key[s]),
                # what a sequence runs under may hang on it
                role=batch.role[s],
            )
        )
    return examples
