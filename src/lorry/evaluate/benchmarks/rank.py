"""Log-likelihoods of answers: what the model gives each option of a question, or the right answer
of one.

    answer_likelihoods(scorer, encoder, [[c1, c2], [c3]], mix)
    # [[AnswerLikelihood, AnswerLikelihood], [AnswerLikelihood]]

Options that are one token each after the same prompt share one pass over it: their tokens are read
off one distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lorry.adapters.mix import Mix
from lorry.data.batch import BASE, BatchExtra, TokenizedExample, collate
from lorry.data.encoding.encode import TOO_LONG, ExampleEncoder
from lorry.data.reading.bad_rows import BadRow
from lorry.data.reading.content import Conversation
from lorry.errors import DataError, ModelError
from lorry.generation.scorer import ModelScorer
from lorry.models.scoring.score import TokenScore, log_prob
from lorry.models.scoring.vocab import SoftmaxSummary, VocabRows, VocabStatistic
from lorry.models.shared_prefixes import split_into_passes

RANK_BATCH_TOKENS = 2048  # tokens that a pass runs, unless a single sequence is longer


@dataclass(frozen=True)
class AnswerLikelihood:
    """Of an answer after its prompt: summed log-probability in nats, tokens, and the prompt tokens
    that had to be cut.
    """

    total: float
    tokens: int
    cut: int = 0

    @property
    def mean(self) -> float:
        """Per token."""
        return self.total / self.tokens


@dataclass(frozen=True)
class AnswerSequence:
    """Tokens of which those from ``start`` on are the answer. ``options``: [k] ids, one of which is
    the last token.
    """

    tokens: list[int]
    start: int
    cut: int
    options: tuple[int, ...] = ()


def answer_likelihoods(
    scorer: ModelScorer,
    encoder: ExampleEncoder,
    answers: Sequence[Sequence[Conversation]],
    mix: Mix,
    *,
    closed: bool = False,
) -> list[list[AnswerLikelihood]]:
    """Of the last answer of each conversation, without the end of turn behind it (``closed``: with
    it). Raises DataError for one that cannot be encoded."""
    # a perplexity counts the end of turn, as training does; a ranking does not
    ends = frozenset(() if closed else encoder.stop_tokens())
    sequences = [
        [_answer_sequence(encoder, conversation, ends) for conversation in group]
        for group in answers
    ]
    merged = [_merge_options(group) for group in sequences]
    all_sequences = [sequence for group in merged for sequence in group]
    scores = iter(_score_sequences(scorer, all_sequences, mix))
    likelihoods = list[list[AnswerLikelihood]]()
    for group in merged:
        rows = [next(scores) for _ in group]
        # merged: one sequence with a score per option; else a sequence per option with one score
        values = rows[0] if group[0].options else [row[0] for row in rows]
        lengths = (
            [len(s.tokens) - s.start for s in group] if not group[0].options else [1] * len(values)
        )
        cuts = [s.cut for s in group] if not group[0].options else [group[0].cut] * len(values)
        likelihoods.append(
            [AnswerLikelihood(*each) for each in zip(values, lengths, cuts, strict=True)]
        )
    return likelihoods


def _answer_sequence(
    encoder: ExampleEncoder, conversation: Conversation, ends: frozenset[int]
) -> AnswerSequence:
    """The conversation as it would be trained, its last answer marked."""
    encoded = encoder.encode(conversation)
    if isinstance(encoded, BadRow):
        raise DataError(f"a question cannot be encoded: {encoded.reason}")
    tokens, weights = encoded[-1].tokens, encoded[-1].weights
    stop = len(weights) - next(i for i, w in enumerate(reversed(weights)) if w)
    # [start, stop) is the last run of learnt tokens; 1: a first token has no probability
    start = next((i + 1 for i in range(stop - 1, -1, -1) if not weights[i]), 1)
    # every model gives its end of turn after any option; it would only add noise to the ranking
    while stop - 1 > start and tokens[stop - 1] in ends:
        stop -= 1
    return AnswerSequence(tokens[:stop], start, encoded[-1].cut)


def answer_fits(encoder: ExampleEncoder, conversation: Conversation) -> bool:
    """Whether the last answer, with its header, is no longer than the encoder's max_length."""
    encoded = encoder.encode(conversation)
    return not (isinstance(encoded, BadRow) and encoded.kind == TOO_LONG)


def truncate_prompt(
    encoder: ExampleEncoder, conversation: Conversation, room: int | None
) -> tuple[list[int], int]:
    """(the tokens to generate the last answer from, how many of them were cut so that ``room``
    tokens hold the rest): cut as training cuts. Raises ModelError where nothing fits."""
    ids = encoder.prompt(conversation)
    if room is None or len(ids) <= room:
        return ids, 0
    if room < 2:
        raise ModelError(
            "max_new_tokens leaves no room for a prompt in the model's context; "
            "lower max_new_tokens"
        )
    # cut by the same code as in training, so that a prompt loses the same tokens
    short_encoder = copy(encoder)
    short_encoder.max_length = room + 1  # the answer is at least one token
    sequence = _answer_sequence(short_encoder, conversation, frozenset())
    return sequence.tokens[: sequence.start], len(ids) - sequence.start


def _merge_options(group: Sequence[AnswerSequence]) -> list[AnswerSequence]:
    """One sequence for options that differ in their only token; else the group as it is."""
    first = group[0]
    # one token each after the same prompt
    same = all(len(s.tokens) == s.start + 1 and s.tokens[:-1] == first.tokens[:-1] for s in group)
    if len(group) < 2 or not same:
        return list(group)
    return [
        AnswerSequence(first.tokens, first.start, first.cut, tuple(s.tokens[-1] for s in group))
    ]


def _score_sequences(
    scorer: ModelScorer, sequences: Sequence[AnswerSequence], mix: Mix
) -> list[list[float]]:
    """Per sequence its answer's log-probability, or those of its options."""
    scores: list[list[float]] = [[] for _ in sequences]
    # sequences of a batch must want as many scores each
    for width in sorted({len(s.options) for s in sequences}):
        same_width = [n for n, s in enumerate(sequences) if len(s.options) == width]
        # options of one question side by side: the scorer runs what they have in common once
        for places in split_into_passes(
            scorer.model, mix, [sequences[n].tokens for n in same_width], RANK_BATCH_TOKENS
        ):
            numbers = [same_width[at] for at in places]
            batch = collate([_ranking_example(sequences[n], n) for n in numbers])
            wants = (
                {str(j): TokenScore(_option_statistic(j)) for j in range(width)}
                if width
                else {"0": TokenScore(log_prob)}
            )
            token_scores = scorer.score([batch], wants, mix)[0]
            sums = [batch.sum_by_sequence(token_scores[name].double()).tolist() for name in wants]
            for at, number in enumerate(numbers):
                scores[number] = [column[at] for column in sums]
    return scores


def _ranking_example(sequence: AnswerSequence, key: int) -> TokenizedExample:
    # 1 at every token of the answer, whatever the row weighs it by in training
    weights = [0.0] * sequence.start + [1.0] * (len(sequence.tokens) - sequence.start)
    ids = torch.tensor([sequence.options] * len(sequence.tokens))
    extra = {"options": BatchExtra(ids, "token")} if sequence.options else {}
    return TokenizedExample(sequence.tokens, weights, key=key, adapter=BASE, extra=extra)


def _option_tokens(rows: VocabRows) -> Tensor:
    """[t,k]: the tokens of the options."""
    return rows.extra["options"]


def _option_statistic(j: int) -> VocabStatistic:
    """log p of the j-th option's token."""
    return VocabStatistic(partial(_option_column, j=j), _option_tokens)


def _option_column(p: SoftmaxSummary, rows: VocabRows, j: int) -> Tensor:
    return p.chosen[:, j]
