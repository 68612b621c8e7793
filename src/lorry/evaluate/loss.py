"""Loss, perplexity and token accuracy of held-out batches, through the same scores and the same loss as training."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorry.backends.base import Scorer, Task, term_totals
from lorry.bank.mix import Mix
from lorry.data.batch import Batch, Example, collate
from lorry.models.score import Score, correct, log_prob


def evaluate_task(backend: Scorer, task: Task) -> dict[str, float]:
    """{eval_loss, eval_TERM..., eval_perplexity, eval_token_accuracy} of a task's held-out batches; empty if it has none.

    eval_loss is the task's own loss, normalised over the whole set; perplexity and accuracy are per supervised token.
    """
    batches = task.eval_batches()
    if not batches:
        return {}
    totals = {name: float(total.sum()) for name, total in term_totals(batches).items()}
    sums = dict.fromkeys(totals, 0.0)
    tokens = right = nll = 0.0
    for batch in batches:
        wants = {**task.wants(batch), "_logprob": Score(log_prob), "_correct": Score(correct)}
        got = backend.score([batch], wants)[0]
        for name, values in task.loss(got, batch).items():
            sums[name] += float(values.double().sum())
        weights = (batch.weights != 0).double()
        tokens += float(weights.sum())
        right += float((got["_correct"].double() * weights).sum())
        nll -= float((got["_logprob"].double() * weights).sum())
    terms = {name: sums[name] / totals[name] if totals[name] else 0.0 for name in sums}
    out = {"eval_loss": sum(terms.values())}
    out |= {f"eval_{name}": value for name, value in terms.items() if len(terms) > 1}
    return out | {"eval_perplexity": perplexity(nll, tokens), "eval_token_accuracy": right / tokens if tokens else math.nan}


def mean_nll(backend: Scorer, batches: Sequence[Batch], mix: Mix | None = None) -> tuple[float, float]:
    """(summed negative log-likelihood in nats, supervised tokens) of batches under a mix (None: the batch's own adapters)."""
    nll = tokens = 0.0
    for batch in batches:
        logprob = backend.score([batch], {"logprob": Score(log_prob)}, mix)[0]["logprob"]
        nll -= float((logprob.double() * batch.weights.double()).sum())
        tokens += float(batch.weights.double().sum())
    return nll, tokens


def packed_difference(backend: Scorer, batch: Batch, sequences: int = 4) -> float:
    """Largest difference, over the first few sequences of a batch, between a sequence's mean loss packed and alone, relative to
    the loss where that is above 1: 0 up to rounding if nothing leaks from one sequence into another."""
    parts = []
    for s, (start, stop) in enumerate(batch.segments[:sequences]):
        tokens, weights = batch.tokens[start:stop].tolist(), batch.weights[start:stop].tolist()
        parts.append(Example(tokens, weights, adapter=int(batch.adapter[s]), key=int(batch.key[s])))
    together = collate(parts)
    alone = [collate([p]) for p in parts]
    packed = _mean_losses(backend, [together])
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(packed, _mean_losses(backend, alone), strict=True))


def _mean_losses(backend: Scorer, batches: Sequence[Batch]) -> list[float]:
    """Mean loss of each sequence, in order."""
    out: list[float] = []
    for batch, got in zip(batches, backend.score(batches, {"logprob": Score(log_prob)}), strict=True):
        sums = batch.sum_by_sequence(-got["logprob"].double() * batch.weights.double())
        out += (sums / batch.sum_by_sequence(batch.weights.double())).tolist()
    return out


def perplexity(nll: float, tokens: float) -> float:
    """exp(nll / tokens); infinite when that overflows, NaN without tokens."""
    if not tokens:
        return math.nan
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf
