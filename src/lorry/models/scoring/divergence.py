"""Divergences of a student p from a teacher q, as scores with a slope in closed form: what
distillation minimises.

Each comes in two forms. Against the teacher's whole distribution, a `DenseScore`: its logits are
formed a chunk of tokens at a time, so that neither model's [T, V] ever exists. Against its k
likeliest tokens, all others counted as one: a lower bound of that.

    whole("jsd", logits=lambda rows: head(rows.extra["hidden"]), beta=0.5)      # a score: TokenScore(fn, temperature=2.0)
    top_k("kl", "teacher_ids", "teacher_log_probs")

With a temperature both sides are softmax(z / tau); gradients shrink by 1/tau^2, which the loss
makes up for (Hinton et al. 2015, arXiv 1503.02531, section 2). t rows, V and W the vocabularies of
student and teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lorry.errors import ConfigError, suggest_nearest
from lorry.models.scoring.vocab import (
    DenseScore,
    SoftmaxSummary,
    VocabRows,
    VocabStatistic,
    forward_kl,
    log_remaining_mass,
    reverse_kl,
    top_k_kl,
)

SORT_ROWS = 32  # rows sorted at a time
ROUNDING_UNITS = 32  # units in the last place in which probabilities of equal logits may differ
GivenLogits = Callable[[VocabRows], Tensor]
SlopeFn = Callable[[], Tensor]


def generalized_jsd(logits: GivenLogits, beta: float) -> DenseScore:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p, q the softmax of given
    logits [t,V], 0 < beta < 1.

    The generalised Jensen-Shannon divergence of on-policy distillation (Agarwal et al. 2024, arXiv
    2306.13649). Divided by beta it tends to KL(q || p) as beta goes to 0, by 1 - beta to KL(p || q)
    as it goes to 1. d / d p_v = (1 - beta) log(p_v / m_v).
    """

    def formula(logp: Tensor, target_logits: Tensor) -> tuple[Tensor, SlopeFn]:
        q_log, p = target_logits.to(logp.dtype).log_softmax(1), logp.exp()
        m_log = torch.logaddexp(q_log + math.log(beta), logp + math.log1p(-beta))
        teacher_kl = torch.linalg.vecdot(q_log.exp(), q_log - m_log)
        gap = logp - m_log
        student_kl = torch.linalg.vecdot(p, gap)
        slope = lambda: gap.sub_(student_kl.detach()[:, None]).mul_(p).mul_(1 - beta)  # noqa: E731
        return beta * teacher_kl + (1 - beta) * student_kl, slope

    return DenseScore(logits, formula)


def uld_divergence(logits: GivenLogits) -> DenseScore:
    """Universal logit distillation: sum over ranks of |p_(i) - q_(i)|, both sorted from the
    largest, the shorter padded with zeros, q the softmax of given logits [t,W] over a vocabulary of
    its own (Boizard et al. 2024, arXiv 2402.12030).
    """

    def formula(logp: Tensor, target_logits: Tensor) -> tuple[Tensor, SlopeFn]:
        values, signs = [], torch.zeros_like(logp, dtype=torch.int8)
        for start in range(0, len(logp), SORT_ROWS):
            block = slice(start, start + SORT_ROWS)
            p, ids = _rank_descending(logp[block].exp())
            q = _sort_descending(target_logits[block].to(logp.dtype).softmax(1))
            both = min(p.shape[1], q.shape[1])
            gap = torch.cat([p[:, :both] - q[:, :both], p[:, both:]], 1)
            values.append(gap.abs().sum(1) + q[:, both:].sum(1))
            signs[block] = signs[block].scatter(
                1, ids, _gap_sign(gap.detach(), p.detach()).to(torch.int8)
            )
        return torch.cat(values), lambda: _through_softmax(logp.exp_(), signs)

    return DenseScore(logits, formula)


def _top_k_uld(log_probs: str) -> DenseScore:
    """`uld_divergence` where of q the k largest probabilities are known, in order, in the extra
    ``log_probs`` [T,k]: their ranks one by one, the rest of either side as one."""

    def formula(logp: Tensor, target_logp: Tensor) -> tuple[Tensor, SlopeFn]:
        k = min(target_logp.shape[1], logp.shape[1])
        q, (p_log, at) = target_logp[:, :k].to(logp.dtype).exp(), logp.topk(k, 1)
        gap, rest = p_log.exp() - q, q.sum(1) - p_log.exp().sum(1)  # the rest of p over that of q
        signs = (
            _gap_sign(gap.detach(), q) - _gap_sign(rest.detach(), torch.ones_like(rest))[:, None]
        )
        value = gap.abs().sum(1) + rest.abs()
        return value, lambda: _through_softmax(
            logp.exp_(), torch.zeros_like(logp).scatter_(1, at, signs)
        )

    return DenseScore(lambda rows: rows.extra[log_probs], formula)


def _top_k_jsd(ids: str, log_probs: str, beta: float) -> VocabStatistic:
    """`generalized_jsd` of the distributions over the k tokens and the rest."""

    def of(p: SoftmaxSummary, rows: VocabRows) -> Tensor:
        target_logp = rows.extra[log_probs].to(p.chosen.dtype)
        q_log, p_log = (torch.cat([x, log_remaining_mass(x)], 1) for x in (target_logp, p.chosen))
        m_log = torch.logaddexp(q_log + math.log(beta), p_log + math.log1p(-beta))
        return beta * (q_log.exp() * (q_log - m_log)).sum(1) + (1 - beta) * (
            p_log.exp() * (p_log - m_log)
        ).sum(1)

    return VocabStatistic(of, lambda rows: rows.extra[ids])


def full_vocab_divergence(loss: str, logits: GivenLogits, beta: float = 0.5) -> DenseScore:
    """A divergence by name (kl, reverse_kl, jsd, uld) from the distribution of ``logits(rows)``
    [t,V], for uld [t,W].

    jsd with ``beta`` 0 is kl, with 1 reverse_kl. Raises ConfigError for an unknown name or a beta
    outside 0 to 1.
    """
    kind = _check_divergence_name(loss, beta)
    builders = {
        "kl": forward_kl,
        "reverse_kl": reverse_kl,
        "jsd": lambda target_logits: generalized_jsd(target_logits, beta),
        "uld": uld_divergence,
    }
    return builders[kind](logits)


def top_k_divergence(
    loss: str, ids: str, log_probs: str, beta: float = 0.5
) -> DenseScore | VocabStatistic:
    """The same from extras: ``ids`` [T,k], distinct in a row (uld does not read them),
    ``log_probs`` [T,k], largest first.
    """
    kind = _check_divergence_name(loss, beta)
    if kind == "uld":
        return _top_k_uld(log_probs)
    return (
        _top_k_jsd(ids, log_probs, beta)
        if kind == "jsd"
        else top_k_kl(ids, log_probs, reverse=kind == "reverse_kl")
    )


LOSSES = ("kl", "reverse_kl", "jsd", "uld")


def _check_divergence_name(loss: str, beta: float) -> str:
    if loss not in LOSSES:
        raise ConfigError(
            f"distill.loss={loss!r}; choose one of {', '.join(LOSSES)}{suggest_nearest(loss, LOSSES)}"
        )
    if loss == "jsd" and not 0 <= beta <= 1:
        raise ConfigError(
            f"distill.beta={beta}; give a number from 0 (forward KL) to 1 (reverse KL)"
        )
    return {0.0: "kl", 1.0: "reverse_kl"}.get(beta, loss) if loss == "jsd" else loss


def _gap_sign(gap: Tensor, size: Tensor) -> Tensor:
    """-1, 0 or 1: the slope of |gap|; a gap that is nothing but the rounding of numbers of that size has none."""
    return torch.where(
        gap.abs() > ROUNDING_UNITS * torch.finfo(gap.dtype).eps * size, gap.sign(), 0.0
    )


def _through_softmax(p: Tensor, slope: Tensor) -> Tensor:
    """p (g - sum p g): a slope g [t,V] with respect to probabilities as one with respect to logits;
    overwrites p.
    """
    slope = slope.to(p.dtype)
    return p.mul_(slope.sub_(torch.linalg.vecdot(p, slope)[:, None]))


def _sort_descending(p: Tensor) -> Tensor:
    """[t,V] from the largest down."""
    if p.device.type == "cpu" and p.dtype == torch.float32:
        return torch.from_numpy(np.sort(p.numpy(), axis=1)).flip(1)  # ten times as fast as torch's
    return p.sort(1, descending=True).values


def _rank_descending(p: Tensor) -> tuple[Tensor, Tensor]:
    """(values from the largest down, their indices), both [t,V]; of equals the first comes first.

    A probability's bits grow with it, so with the place behind them one integer sorts both: four
    times as fast as torch on a CPU.
    """
    if p.device.type != "cpu" or p.dtype != torch.float32 or p.requires_grad:
        values, indices = p.sort(dim=1, descending=True, stable=True)
        return values, indices
    width = p.shape[1]
    packed = (
        p.view(torch.int32)
        .to(torch.int64)
        .bitwise_left_shift_(32)
        .add_(torch.arange(width - 1, -1, -1))
    )
    joined = torch.from_numpy(np.sort(packed.numpy(), axis=1)).flip(1)
    values = (joined >> 32).to(torch.int32).view(torch.float32)
    return values, (width - 1) - (joined & 0xFFFFFFFF)
