"""Scores that unlearning minimises, each with a slope in closed form: functions of how much of the
next-token distribution p = softmax(z) lies on a token y, and of its shape elsewhere.

`uniform_divergence` and `one_hot_jsd` are statistics of the softmax (`VocabStatistic`), read a tile
of the vocabulary at a time; the others need whole rows, a chunk of tokens at a time. t rows, V
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lorry.models.scoring.vocab import (
    DenseScore,
    SoftmaxSummary,
    VocabRows,
    VocabStatistic,
    soft_cross_entropy,
)

SlopeFn = Callable[[], Tensor]

uniform_divergence = VocabStatistic(lambda p, rows: -math.log(p.vocab) - p.uniform, moments=True)
"""KL(U || p) = -log V - mean_v log p_v, U uniform: maximum entropy (Yuan et al. 2025, arXiv 2410.08109)."""


def one_hot_jsd(ids: str) -> VocabStatistic:
    """(KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2, q all on the token in the extra ``ids`` [T].

    Only p(token) enters: log 2 + (p log p - (1 + p) log(1 + p)) / 2, from 0 at p = 1 to log 2 at p
    = 0 (JensUn, arXiv 2509.02820).
    """

    def of(p: SoftmaxSummary, rows: VocabRows) -> Tensor:
        log_p = p.chosen[:, 0]
        mass = log_p.exp()
        return math.log(2) + (mass * log_p - (1 + mass) * mass.log1p()) / 2

    return VocabStatistic(of, lambda rows: rows.extra[ids][:, None])


def _spread_formula(logp: Tensor, targets: Tensor) -> tuple[Tensor, SlopeFn]:
    peak, at = logp.max(1)
    gap = peak - logp.mean(1)

    def slope() -> Tensor:
        gradient = torch.full_like(logp, -1 / logp.shape[1])
        gradient.scatter_add_(1, at[:, None], torch.ones_like(gap)[:, None])
        return gradient.mul_(2 * gap.detach()[:, None])

    return gap.square(), slope


logit_spread = DenseScore(lambda rows: rows.targets, _spread_formula)
"""(max_v z_v - mean_v z_v)^2: PDU's forget term. log p differs from z by a number of the row, which
falls out."""


def _contrary_formula(logp: Tensor, targets: Tensor) -> tuple[Tensor, SlopeFn]:
    # softmax without y, not p / (1 - p_y): that is 0 / 0 once the answer is certain
    others = logp.detach().scatter(1, targets[:, None], -torch.inf).softmax(1)
    return -torch.linalg.vecdot(others, logp), lambda: logp.exp_().sub_(others)


contrary_cross_entropy = DenseScore(lambda rows: rows.targets, _contrary_formula)
"""-sum_v q_v log p_v, q = p without the target, renormalised and held fixed (CEU, as open-unlearning has it)."""


def _hinge_formula(logp: Tensor, targets: Tensor) -> tuple[Tensor, SlopeFn]:
    own = logp.gather(1, targets[:, None])[:, 0].exp()
    best, at = logp.scatter(1, targets[:, None], -torch.inf).max(1)
    rival = best.exp()
    value = (1 + own - rival).relu()

    def slope() -> Tensor:
        # through softmax: d p_k / d z_v = p_k (1[v = k] - p_v)
        live = (value.detach() > 0).to(logp.dtype)
        gradient = logp.exp().mul_(((rival - own).detach() * live)[:, None])
        gradient.scatter_add_(1, targets[:, None], (own.detach() * live)[:, None])
        return gradient.scatter_add_(1, at[:, None], (-rival.detach() * live)[:, None])

    return value, slope


inverted_hinge = DenseScore(lambda rows: rows.targets, _hinge_formula)
"""relu(1 + p_y - max over v != y of p_v), in [0, 2] (Cha et al. 2025, arXiv 2408.06621)."""


def lowered_cross_entropy(
    logits: Callable[[VocabRows], Tensor],
    strength: Callable[[VocabRows], Tensor],
    ids: Callable[[VocabRows], Tensor] = lambda rows: rows.targets,
) -> DenseScore:
    """CE(softmax(z' - strength onehot(id)), softmax z), z' given logits [t,V], ``strength`` [t]:
    self-distillation with one logit lowered (UNDIAL, Dong et al. 2025, arXiv 2402.10052). A
    negative id counts from the end of the vocabulary.
    """

    def probs(rows: VocabRows) -> Tensor:
        target_logits = logits(rows)
        target_logits = target_logits.to(torch.promote_types(target_logits.dtype, torch.float32))
        at = ids(rows).remainder(target_logits.shape[1])[:, None]
        return target_logits.scatter_add(
            1, at, -strength(rows).to(target_logits.dtype)[:, None]
        ).softmax(1)

    return soft_cross_entropy(probs)
