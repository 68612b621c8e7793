"""Loss, perplexity and token accuracy of held-out batches, through the same scores and the same
loss as training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lorry.adapters.mix import Mix
from lorry.backends.protocol import ScoringBackend, Task, term_totals
from lorry.data.batch import Batch, TokenizedExample, collate
from lorry.models.scoring.score import PromptState, TokenScore, correct, log_prob


def evaluate_task(backend: ScoringBackend, task: Task) -> dict[str, float]:
    """{eval_loss, eval_TERM..., eval_perplexity, eval_token_accuracy} of a task's held-out batches;
    empty if it has none.

    eval_loss is the task's own loss, normalised over the whole set; perplexity and accuracy are per
    supervised token, and left out where the task asks for nothing but states of prompts.
    """
    batches = task.eval_batches()
    if not batches:
        return {}
    # over all batches before the first is scored: the mean is of the set, not of batch means
    totals = {name: float(total.sum()) for name, total in term_totals(batches).items()}
    sums = dict.fromkeys(totals, 0.0)
    tokens = hits = nll = 0.0
    predicts_tokens = False
    for batch in batches:
        wants = dict(task.wants(batch))
        if asked := not all(isinstance(want, PromptState) for want in wants.values()):
            # beside the task's own scores, whose names begin with a letter
            wants |= {"_logprob": TokenScore(log_prob), "_correct": TokenScore(correct)}
        scores = backend.score([batch], wants)[0]
        for name, values in task.loss(scores, batch).items():
            # what a loss is made of besides scores may want a gradient (a classifier's weights)
            sums[name] += float(values.detach().double().sum())
        if not asked:
            continue
        predicts_tokens = True
        # 0 or 1: accuracy and perplexity count tokens, whatever the task weighs them by
        weights = (batch.weights != 0).double()
        tokens += float(weights.sum())
        hits += float((scores["_correct"].double() * weights).sum())
        nll -= float((scores["_logprob"].double() * weights).sum())
    terms = {name: sums[name] / totals[name] if totals[name] else 0.0 for name in sums}
    counted = [value for name, value in terms.items() if name not in task.reported]
    metrics = {"eval_loss": sum(counted)}
    metrics |= {f"eval_{name}": value for name, value in terms.items() if len(terms) > 1}
    if not predicts_tokens:
        return metrics
    return metrics | {
        "eval_perplexity": loss_perplexity(nll, tokens),
        "eval_token_accuracy": hits / tokens if tokens else math.nan,
    }


def mean_nll(
    backend: ScoringBackend, batches: Sequence[Batch], mix: Mix | None = None
) -> tuple[float, float]:
    """(summed negative log-likelihood in nats, supervised tokens) of batches under a mix (None: the
    batch's own adapters).
    """
    nll = tokens = 0.0
    for batch in batches:
        logprob = backend.score([batch], {"logprob": TokenScore(log_prob)}, mix)[0]["logprob"]
        nll -= float((logprob.double() * batch.weights.double()).sum())
        tokens += float(batch.weights.double().sum())
    return nll, tokens


def packed_loss_difference(backend: ScoringBackend, batch: Batch, sequences: int = 8) -> float:
    """Difference between the mean loss of a batch's first few sequences packed and alone, relative
    to the loss where that is above 1: rounding and nothing more, if packing changes nothing."""
    parts = _split_examples(batch, sequences)
    (packed, tokens), (alone, _) = (
        mean_nll(backend, [collate(parts)]),
        mean_nll(backend, [collate([p]) for p in parts]),
    )
    # per token, and relative above a loss of 1: rounding grows with the loss
    return abs(packed - alone) / max(tokens, alone)


def packing_leak(backend: ScoringBackend, batch: Batch, sequences: int = 4) -> float:
    """Largest change of a sequence's scores when its neighbours' tokens are reversed: exactly 0 if
    nothing leaks, since shapes, and with them every kernel and its rounding, stay the same; rounding
    where `CausalLM.shapes_follow_tokens`."""
    parts, want = _split_examples(batch, sequences), {"logprob": TokenScore(log_prob)}
    before = backend.score([collate(parts)], want)[0]["logprob"]
    worst = 0.0
    # first the even sequences change and the odd are watched, then the other way round
    for parity in (0, 1):
        neighbours_reversed = [
            # reversed and not drawn anew: experts and vocabulary tiles see the same tokens
            replace(p, tokens=list(p.tokens)[::-1]) if s % 2 == parity else p
            for s, p in enumerate(parts)
        ]
        changed_batch = collate(neighbours_reversed)
        after = backend.score([changed_batch], want)[0]["logprob"]
        unchanged_rows = [
            slice(*changed_batch.segments[s]) for s in range(len(parts)) if s % 2 != parity
        ]
        worst = max(
            [worst, *(float((after[rows] - before[rows]).abs().max()) for rows in unchanged_rows)]
        )
    return worst


def repeat_difference(backend: ScoringBackend, batch: Batch, sequences: int = 4) -> float:
    """Largest change of a score when the same sequences are scored again: 0, unless a processor,
    its memory or a library gives other results for the same numbers."""
    one, want = collate(_split_examples(batch, sequences)), {"logprob": TokenScore(log_prob)}
    first, second = (backend.score([one], want)[0]["logprob"].clone() for _ in range(2))
    return float((first - second).abs().max())


def _split_examples(batch: Batch, sequences: int) -> list[TokenizedExample]:
    """The first few sequences of a batch, apart again."""
    parts = []
    for s, (start, stop) in enumerate(batch.segments[:sequences]):
        tokens, weights = batch.tokens[start:stop].tolist(), batch.weights[start:stop].tolist()
        parts.append(
            TokenizedExample(
                tokens,
                weights,
                adapter=int(batch.adapter[s]),
                key=int(batch.key[s]),
                # what a sequence runs under may hang on it
                role=batch.role[s],
            )
        )
    return parts


def loss_perplexity(nll: float, tokens: float) -> float:
    """exp(nll / tokens); infinite when that overflows, NaN without tokens."""
    if not tokens:
        return math.nan
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf
