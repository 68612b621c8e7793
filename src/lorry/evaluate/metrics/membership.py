"""Membership inference: was a row trained on? Scores of a row, AUC and ROC of an attack, PrivLeak.

Try: ``attack_auc([0.1, 0.2], [0.3, 0.4])`` is 1.0: every member is told from every non-member.

**A higher score means a less likely member** in all six attacks, and AUC is the chance that a row
never seen scores above a forgotten one: 1 where forgotten rows still look like members, 0.5 where
nothing tells them apart, below where unlearning overshot. As in open-unlearning, the losses count
the end of turn and what looks at single tokens (Min-K, Min-K++) leaves it out: the caller passes
the tokens that count.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

from lorry.errors import DataError, NonFiniteError
from lorry.evaluate.metrics.memorization import mean_loss

MIN_K_SHARE = 0.4  # of a row's tokens, the least likely; MUSE's and open-unlearning's
# least variance of log p that a z-score divides by: a row of the softmax that is sure has none
MIN_VARIANCE = 1e-6
CHANCE_AUC = 0.5  # of an oracle that nobody measured


def loss_score(log_probs: Sequence[float]) -> float:
    """LOSS (Yeom et al. 2018): mean loss of the tokens."""
    return mean_loss(log_probs)


def zlib_score(log_probs: Sequence[float], text: str) -> float:
    """Zlib (Carlini et al. 2021): mean loss over the bytes that zlib makes of the answer's text."""
    return mean_loss(log_probs) / len(zlib.compress(text.encode()))


def reference_score(log_probs: Sequence[float], reference: Sequence[float]) -> float:
    """Reference: mean loss less that of a model that never saw the row."""
    return mean_loss(log_probs) - mean_loss(reference)


def min_k_score(log_probs: Sequence[float], share: float = MIN_K_SHARE) -> float:
    """Min-K% (Shi et al. 2024): minus the mean log-probability of the ``share`` of tokens that are
    least likely, rounded down but at least one. Raises DataError for no tokens.
    """
    if not log_probs:
        raise DataError("Min-K needs at least one token; give every row an answer")
    least = sorted(log_probs)[: max(int(len(log_probs) * share), 1)]
    return -math.fsum(least) / len(least)


def min_k_plus_plus_score(
    log_probs: Sequence[float],
    means: Sequence[float],
    variances: Sequence[float],
    share: float = MIN_K_SHARE,
) -> float:
    """Min-K%++ (Zhang et al. 2024): Min-K of z-scores (log p - mean) / sd, mean and variance being
    those of log p under p at that token. Raises DataError as `min_k_score`.
    """
    columns = zip(log_probs, means, variances, strict=True)
    return min_k_score(
        [(value - mean) / math.sqrt(max(var, MIN_VARIANCE)) for value, mean, var in columns], share
    )


def gradient_norm_score(norms: Sequence[float]) -> float:
    """GradNorm: mean over parameter tensors of the L2 norm of the loss' gradient. Raises DataError
    for no tensor.
    """
    if not norms:
        raise DataError("GradNorm needs at least one trainable tensor")
    return math.fsum(norms) / len(norms)


def attack_auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Area under the ROC curve: the chance that a score of ``others`` (never seen) is above one of
    ``members``, equal ones counting half. Raises DataError for an empty list, NonFiniteError for a
    NaN.
    """
    _check_scores(members, others)
    wins, below = 0.0, 0  # of others: members below, and half of those that are equal
    # one pass over all scores in order instead of members x others comparisons
    steps = sorted([(value, 0) for value in members] + [(value, 1) for value in others])
    at = 0
    while at < len(steps):
        value, tied = steps[at][0], [0, 0]
        while at < len(steps) and steps[at][0] == value:
            tied[steps[at][1]] += 1
            at += 1
        wins += tied[1] * (below + tied[0] / 2)
        below += tied[0]
    return wins / (len(members) * len(others))


def attack_roc(members: Sequence[float], others: Sequence[float]) -> list[tuple[float, float]]:
    """The ROC curve: (share of ``members`` at or above a threshold, share of ``others``), from
    (0, 0) to (1, 1), a point where a score stands. Raises as `attack_auc`.
    """
    _check_scores(members, others)
    points = [(0.0, 0.0)]
    for threshold in sorted({*members, *others}, reverse=True):
        points.append(
            (
                sum(value >= threshold for value in members) / len(members),
                sum(value >= threshold for value in others) / len(others),
            )
        )
    return points


def privacy_leakage(auc: float, oracle: float = CHANCE_AUC) -> float:
    """PrivLeak (Shi et al. 2024, MUSE), percent: 100 (AUC of the oracle - AUC) / (1 - AUC of the
    oracle). 0: as private as the oracle; below 0 rows leak (-100: all), above it they stand out by
    being shunned. Raises DataError for an oracle's AUC of 1.
    """
    if oracle == 1:
        raise DataError("the oracle's AUC is 1, so a difference relative to it is undefined")
    return 100 * (oracle - auc) / (1 - oracle)


def _check_scores(members: Sequence[float], others: Sequence[float]) -> None:
    if not members or not others:
        raise DataError(
            f"an attack needs member and non-member rows; got {len(members)} and {len(others)}"
        )
    if any(math.isnan(value) for value in (*members, *others)):
        raise NonFiniteError("an attack's score is not a number; the model gave NaN")
