"""Functions of the logits: what a task may ask for per token, most of them with a slope in closed
form.

A `VocabStatistic` is any function of the log-probabilities of a few chosen tokens and of four
statistics of the row's softmax:

    d score / d l_v = p_v (a + b y_v + c y_v^2) + k + (chosen tokens' own),   y_v = log p_v - mean

so values and gradients need one pass over the logits, a tile of columns at a time, and no row is
ever whole. `DenseScore` compares with another distribution over the whole vocabulary. Any other
function of the logits is a score too: autograd then takes whole rows, a chunk at a time. t rows, k
chosen tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class VocabRows:
    """The supervised tokens a score function sees: targets [t] and the batch's per-token extras [t,
    ...].
    """

    targets: Tensor
    extra: Mapping[str, Tensor]

    def cut(self, start: int, stop: int) -> VocabRows:
        return VocabRows(
            self.targets[start:stop], {n: e[start:stop] for n, e in self.extra.items()}
        )


ScoreFn = Callable[[Tensor, VocabRows], Tensor]


@dataclass(frozen=True)
class SoftmaxSummary:
    """What a `VocabStatistic` sees of each row's p = softmax(logits): ``chosen`` [t,k]
    log-probabilities of the chosen tokens; ``mean`` and ``variance`` [t] of log p under p;
    ``uniform`` [t], the plain mean of log p over the vocabulary (these three are NaN unless the
    statistic asks for moments); ``top`` [t] int64, the most likely token, -1 in a row that is not
    finite; ``vocab``: V.
    """

    chosen: Tensor
    mean: Tensor
    variance: Tensor
    uniform: Tensor
    top: Tensor
    vocab: int


def target_token(rows: VocabRows) -> Tensor:
    """[t,1]: the target alone."""
    return rows.targets[:, None]


@dataclass(frozen=True)
class VocabStatistic:
    """``of(softmax, rows) -> [t]``, differentiable in `SoftmaxSummary`; ``tokens(rows)`` [t,k]
    chooses tokens, ``moments`` says whether mean, variance or uniform are read. Called on whole
    logits it is a plain function of them, which autograd understands.
    """

    of: Callable[[SoftmaxSummary, VocabRows], Tensor]
    tokens: Callable[[VocabRows], Tensor] = target_token
    moments: bool = False
    gradient: bool = True

    def __call__(self, logits: Tensor, rows: VocabRows) -> Tensor:
        logp = logits.log_softmax(1)
        mean = variance = uniform = logp.new_full((len(logp),), torch.nan)
        if self.moments:
            p = logp.exp()
            mean = (p * logp).sum(1)
            variance, uniform = (p * (logp - mean[:, None]).square()).sum(1), logp.mean(1)
        top = torch.where(logp.detach().sum(1).isnan(), -1, logits.argmax(1))
        return self.of(
            SoftmaxSummary(
                logp.gather(1, self.tokens(rows)), mean, variance, uniform, top, logp.shape[1]
            ),
            rows,
        )


log_prob = VocabStatistic(lambda p, rows: p.chosen[:, 0])
"""log p(target)."""

log_prob_value = replace(log_prob, gradient=False)
"""log p(target) without a gradient, for what is only reported: backward does not read the head."""

entropy = VocabStatistic(lambda p, rows: -p.mean, moments=True)
"""Entropy of the next-token distribution, nats."""

correct = VocabStatistic(lambda p, rows: (p.top == rows.targets).to(p.chosen.dtype), gradient=False)
"""1 where the most likely token (the first of equals) is the target, else 0; carries no gradient."""


def _min_k(p: SoftmaxSummary, rows: VocabRows) -> Tensor:
    # a one-hot row has variance 0
    spread = p.variance.clamp(min=torch.finfo(p.variance.dtype).eps).sqrt()
    return (p.chosen[:, 0] - p.mean) / spread


min_k = VocabStatistic(_min_k, moments=True)
"""The target's log-probability as a z-score among the row's, (log p(target) - mean) / sd (Min-K%++, Zhang et al. 2024, eq. 4)."""


def label_smoothed(smoothing: float) -> VocabStatistic:
    """Cross-entropy with (1 - smoothing) on the target and ``smoothing`` spread over the vocabulary
    (Szegedy et al. 2016).
    """
    return VocabStatistic(
        lambda p, rows: -(1 - smoothing) * p.chosen[:, 0] - smoothing * p.uniform, moments=True
    )


def top_k_cross_entropy(ids: str, probs: str) -> VocabStatistic:
    """-sum_k q_k log p(k) over the tokens and probabilities carried per token in the extras ``ids`` and ``probs``, both [T,k]."""
    return VocabStatistic(
        lambda p, rows: -(rows.extra[probs].to(p.chosen.dtype) * p.chosen).sum(1),
        lambda rows: rows.extra[ids],
    )


def top_k_kl(ids: str, log_probs: str, *, reverse: bool = False) -> VocabStatistic:
    """KL(q || p), or KL(p || q) with ``reverse``, where of q only its likeliest tokens are known:
    extras ``ids`` and ``log_probs``, both [T,k], the ids of a row distinct.

    All other tokens count as one, whose probability is what is left on either side: a lower bound
    of the whole divergence, and 0 when p is q.
    """

    def of(p: SoftmaxSummary, rows: VocabRows) -> Tensor:
        target_logp = rows.extra[log_probs].to(p.chosen.dtype)
        q_log = torch.cat([target_logp, log_remaining_mass(target_logp)], 1)
        p_log = torch.cat([p.chosen, log_remaining_mass(p.chosen)], 1)
        return _top_k_kl_value(p_log, q_log) if reverse else _top_k_kl_value(q_log, p_log)

    return VocabStatistic(of, lambda rows: rows.extra[ids])


def log_remaining_mass(logp: Tensor) -> Tensor:
    """[t,1]: log of the probability that the given ones leave over."""
    return (1 - logp.exp().sum(1, keepdim=True)).clamp(min=torch.finfo(logp.dtype).tiny).log()


def _top_k_kl_value(p_log: Tensor, q_log: Tensor) -> Tensor:
    return (p_log.exp() * (p_log - q_log)).sum(1)


@dataclass(frozen=True)
class DenseScore:
    """A score of whole rows of log p beside ``operand(rows)``, [t,V] or [t]: an extra of the batch,
    another head's product of one, or the targets. ``formula(log p, operand)`` gives the value [t] and
    what forms its slope with respect to the logits [t,V], which may take the memory of log p.
    """

    operand: Callable[[VocabRows], Tensor]
    formula: Callable[[Tensor, Tensor], tuple[Tensor, Callable[[], Tensor]]]

    def __call__(self, logits: Tensor, rows: VocabRows) -> Tensor:
        return self.formula(logits.log_softmax(1), self.operand(rows))[0]

    def with_slope(self, logits: Tensor, rows: VocabRows) -> tuple[Tensor, Tensor]:
        """(value [t], d value / d logits [t,V]); overwrites the logits."""
        logits.sub_(logits.logsumexp(1, keepdim=True))
        value, slope = self.formula(logits, self.operand(rows))
        return value, slope()


def soft_cross_entropy(probs: Callable[[VocabRows], Tensor]) -> DenseScore:
    """-sum_v q_v log p_v for given probabilities q [t,V] (they need not sum to 1)."""

    def formula(logp: Tensor, target_probs: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        q = target_probs.to(logp.dtype)
        return -_row_dot(q, logp), lambda: logp.exp_().mul_(q.sum(1, keepdim=True)).sub_(q)

    return DenseScore(probs, formula)


def forward_kl(logits: Callable[[VocabRows], Tensor]) -> DenseScore:
    """KL(q || p), q the softmax of given logits [t,V]: distillation's forward divergence."""

    def formula(logp: Tensor, target_logits: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        q_log = target_logits.to(logp.dtype).log_softmax(1)
        q = q_log.exp()
        return _row_dot(q, q_log) - _row_dot(q, logp), lambda: logp.exp_().sub_(q)

    return DenseScore(logits, formula)


def reverse_kl(logits: Callable[[VocabRows], Tensor]) -> DenseScore:
    """KL(p || q), q the softmax of given logits [t,V]: the reverse divergence, and the penalty of
    reinforcement.
    """

    def formula(logp: Tensor, target_logits: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        gap, p = logp - target_logits.to(logp.dtype).log_softmax(1), logp.exp()
        value = _row_dot(p, gap)
        return value, lambda: gap.sub_(value.detach()[:, None]).mul_(p)

    return DenseScore(logits, formula)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """[t]: row by row, without a product of the whole size."""
    return torch.linalg.vecdot(a, b)
