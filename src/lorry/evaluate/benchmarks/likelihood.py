"""How likely texts are as continuations of others, through training's own score path: what option
tasks are ranked by.

Text becomes tokens as in the lm-evaluation-harness (Gao et al., its `HFLM`): context and
continuation are encoded together and cut where the context's own encoding ends, white space at the
context's end belongs to the continuation, an empty context is the BOS token (EOS where there is
none), and what does not fit is cut from the left. Sequences are packed, not padded; the last token
of a sequence is never run, and pairs that differ in it alone (options of one token) are one
sequence. k last tokens.

Try: loglikelihoods(model, tokenizer, [("The sky is", " blue"), ("The sky is", " green")])
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorry.adapters.mix import AdapterContext, Mix
from lorry.data.batch import BatchExtra, TokenizedExample, collate
from lorry.errors import ConfigError, DataError, ModelError, NonFiniteError
from lorry.generation.engine import evaluation_mode
from lorry.generation.request import resolve_constant_mix
from lorry.models.causal_lm import PackedInput, with_prompt_gates
from lorry.models.scoring.score import log_prob, score_supervised_tokens
from lorry.models.scoring.vocab import VocabStatistic
from lorry.models.shared_prefixes import hidden_sharing_prefixes, split_into_passes

# of one forward pass without gradients; logits are made by tiles, so they do not count
LOGLIKELIHOOD_BATCH_TOKENS = 4096
# tokens, for a model that does not say how many it takes; the harness assumes as many
UNKNOWN_CONTEXT = 2048

top_statistic = VocabStatistic(lambda p, rows: p.top.to(p.chosen.dtype), gradient=False)


class ContinuationLikelihood(NamedTuple):
    """``total``: log p(continuation | context), nats; ``tokens`` of the continuation; ``greedy``:
    each was the likeliest.
    """

    total: float
    tokens: int
    greedy: bool


@dataclass(frozen=True)
class TokenPair:
    """Token ids of a context (at least one) and of its continuation (at least one)."""

    context: Sequence[int]
    continuation: Sequence[int]


class HarnessTokenizer:
    """A tokenizer as the harness uses it. ``prefix``: the id that stands for an empty context.
    Raises ModelError without one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # BOS, else EOS: the rule of the harness' HFLM
        prefix = (
            tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        )
        if prefix is None:
            raise ModelError(
                "the tokenizer has neither a BOS nor an EOS token, one of which is "
                "needed as an empty context"
            )
        self.prefix = int(prefix)
        self._prefix_text = str(tokenizer.decode([self.prefix]))

    def ids(self, text: str) -> list[int]:
        """With the tokenizer's own special tokens, unless the text brings the opening one along (a
        chat template's).
        """
        return self._encode(text, not text.startswith(self._prefix_text))

    def pair(self, context: str, continuation: str) -> TokenPair:
        """Raises DataError when nothing is left to be scored."""
        if context == "":
            # without special tokens: the prefix stands for them, unless the text brings it along
            ids = self._encode(continuation, False)
            pair_ids = (
                TokenPair(ids[:1], ids[1:])
                if ids[:1] == [self.prefix]
                else TokenPair([self.prefix], ids)
            )
        else:
            # the space at its end goes with the continuation: " blue" is a token, and "blue" after
            # a lone space two others
            context_ids, whole_ids = self.ids(context.rstrip()), self.ids(context + continuation)
            pair_ids = (
                # cut by number of tokens, as the harness does, even where a token spans the seam
                TokenPair(context_ids, whole_ids[len(context_ids) :])
                if context_ids
                else TokenPair([self.prefix], whole_ids)
            )
        # it would score 0, and be the likeliest of all options
        if not pair_ids.continuation:
            raise DataError(
                f"the continuation {continuation!r} of {context[-60:]!r} has no "
                "tokens of its own, so it has no score"
            )
        return pair_ids

    def _encode(self, text: str, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def loglikelihoods(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    adapter: Mix | str | None = None,
    *,
    batch_tokens: int = LOGLIKELIHOOD_BATCH_TOKENS,
) -> list[ContinuationLikelihood]:
    """[(total, tokens, greedy)] of (context, continuation) texts, in their order: what the harness
    would be told.

    ``adapter``: a name, a Mix of constants (`Mix.none()`: the base), or None: what a plain
    `model(x)` uses. ``batch_tokens``: tokens in one pass, unless one sequence is longer. Raises
    ConfigError, DataError (nothing to score), NonFiniteError.
    """
    wording = HarnessTokenizer(tokenizer)
    pairs_of_tokens = [wording.pair(*pair) for pair in pairs]
    scores = dict(
        score_pairs(
            model,
            pairs_of_tokens,
            mix=resolve_constant_mix(model, adapter),
            batch_tokens=batch_tokens,
            limit=max_model_length(model),
        )
    )
    return [scores[at] for at in range(len(pairs_of_tokens))]


def max_model_length(model: Any) -> int:
    """Tokens that the model can take."""
    return int(model.context or UNKNOWN_CONTEXT)


@dataclass
class ScoringRow:
    """One sequence to run, for every pair whose tokens but the last are these."""

    inputs: tuple[int, ...]
    finals: list[int] = field(default_factory=list)
    # (number of the pair, its tokens, its place in finals)
    members: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def wanted(self) -> int:
        """How many of its targets, counted from the end."""
        return max(count for _, count, _ in self.members)

    def add(self, number: int, count: int, final: int) -> None:
        if final not in self.finals:
            self.finals.append(final)
        self.members.append((number, count, self.finals.index(final)))


def score_pairs(
    model: Any, pairs: Sequence[TokenPair], *, mix: Mix, batch_tokens: int, limit: int
) -> Iterator[tuple[int, ContinuationLikelihood]]:
    """(number of the pair, its score), batch by batch, equal beginnings side by side. ``limit``:
    tokens the model takes at once; contexts are cut from the left to fit. Raises DataError for a
    continuation longer than that, and for a text without a context under a router of the prompt;
    NonFiniteError.
    """
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens is {batch_tokens}; it must be at least 1")
    # one token is what stands for an empty context: as `models.scoring.score.prompt_lengths` has it
    bare = [number for number, pair in enumerate(pairs) if len(pair.context) < 2]
    if mix.sequence_router is not None and bare:
        raise DataError(
            f"continuation {bare[0]} has no context ({len(bare)} such), and the mixture's router reads prompts alone; "
            "ask one expert by name, or a task with prompts"
        )
    rows = group_scoring_rows(pairs, limit, by_context=mix.sequence_router is not None)
    for numbers in split_into_passes(model, mix, [row.inputs for row in rows], batch_tokens):
        batch = [rows[number] for number in numbers]
        with torch.no_grad(), evaluation_mode(model):
            # a whole batch before it is handed out: in between the model must be as it was
            scores = list(_score_batch(model, batch, mix))
        yield from scores


def group_scoring_rows(
    pairs: Sequence[TokenPair], limit: int, *, by_context: bool = False
) -> list[ScoringRow]:
    """Pairs by what is run for them. ``by_context``: pairs share a row only where their contexts
    are equal too, since what a router makes of them is.
    """
    rows: dict[tuple[tuple[int, ...], int], ScoringRow] = {}
    for number, pair in enumerate(pairs):
        count = len(pair.continuation)
        if count > limit:
            raise DataError(
                f"continuation {number} has {count} tokens, but the model's context "
                f"is {limit}; shorten it"
            )
        # limit + 1: the last token is only a target and is never run
        kept_tokens = (*pair.context, *pair.continuation)[-(limit + 1) :]
        inputs = kept_tokens[:-1]
        row = rows.setdefault((inputs, count if by_context else 0), ScoringRow(inputs))
        row.add(number, count, kept_tokens[-1])
    return list(rows.values())


def _score_batch(
    model: Any, rows: Sequence[ScoringRow], mix: Mix
) -> Iterator[tuple[int, ContinuationLikelihood]]:
    """Score a batch. Input i is followed by target i, which `score_supervised_tokens` wants at
    place i + 1.
    """
    width = max(len(row.finals) for row in rows)
    targets, weights, finals = [0], [0.0], [[0] * width]
    for row in rows:
        row_targets = [*row.inputs[1:], row.finals[0]]
        targets += row_targets
        weights += [0.0] * (len(row_targets) - row.wanted) + [1.0] * row.wanted
        finals += [[token] * width for token in row_targets[:-1]]
        # every row is as wide as the widest; its own first last token fills it up, and is not read
        finals.append((row.finals + row.finals[:1] * width)[:width])
    batch = collate(
        [
            TokenizedExample(
                targets, weights, extra={"finals": BatchExtra(torch.tensor(finals), "token")}
            )
        ]
    ).to(model.device)
    packed, call = PackedInput.of([row.inputs for row in rows], model.device), AdapterContext(mix)
    # the first scored token is no part of the context, and inputs lack the last
    call = with_prompt_gates(
        model, packed, call, [len(row.inputs) + 1 - row.wanted for row in rows]
    )
    hidden = hidden_sharing_prefixes(model, packed, call).last
    assert hidden is not None
    table = score_supervised_tokens(
        model,
        hidden,
        batch,
        [top_statistic, log_prob, *(_final_statistic(j) for j in range(1, width))],
        call,
    )
    # table [scored tokens, 1 + k]: the likeliest token's id, then log p of the k last tokens
    lines, likeliest = table[:, 1:].double().cpu(), table[:, 0].long().cpu()
    start = 0
    for row in rows:
        stop = start + row.wanted
        yield from _pair_likelihoods(row, lines[start:stop], likeliest[start:stop].tolist())
        start = stop


def _pair_likelihoods(
    row: ScoringRow, lines: Tensor, likeliest: Sequence[int]
) -> Iterator[tuple[int, ContinuationLikelihood]]:
    """The scores of a row's pairs; lines [scored tokens, k]: log p of each target, and in the last
    line of the k last tokens.
    """
    # the scored tokens that all pairs of the row share; the last is each pair's own
    steady = lines[:, 0].tolist()[:-1]
    hits = [
        a == b for a, b in zip(likeliest, row.inputs[len(row.inputs) - len(steady) :], strict=False)
    ]
    for number, count, final in row.members:
        values = [*steady[len(steady) - (count - 1) :], float(lines[-1, final])]
        if any(map(math.isnan, values)):
            raise NonFiniteError(
                f"the log-likelihood of continuation {number} is not a number; the model's weights or an adapter's hold NaN or "
                "infinity, or overflow in this dtype"
            )
        # count - 1 shared tokens and the pair's own last one
        greedy = all(hits[len(hits) - (count - 1) :]) and likeliest[-1] == row.finals[final]
        yield number, ContinuationLikelihood(math.fsum(values), count, greedy)


@cache
def _final_statistic(place: int) -> VocabStatistic:
    """log p of a row's ``place``-th last token."""
    return VocabStatistic(
        lambda p, rows: p.chosen[:, 0], lambda rows: rows.extra["finals"][:, place : place + 1]
    )
