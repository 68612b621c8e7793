"""Loss, perplexity and token accuracy of held-out batches, through the same scores and the same
loss as training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorry.adapters.mix import Mix
from lorry.backends.protocol import ScoringBackend, Task, term_totals
from lorry.data.batch import Batch
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


def loss_perplexity(nll: float, tokens: float) -> float:
    """exp(nll / tokens); infinite when that overflows, NaN without tokens."""
    if not tokens:
        return math.nan
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf
