"""The losses of unlearning as pure functions: scores in, one value per sequence out.

    total = gamma L_f + alpha L_r        F the rows to forget, R those to retain

A function of per-token scores [T] takes the weights [T] that say which tokens count (0 elsewhere)
and gives each sequence's sum; the backend divides by the step's total weight, so a mean over tokens
or sequences is one over the step, whatever the micro-batches. NLL(y) is the sum over an answer, with
its end of turn, of -log p; settings are a number, or one per sequence [S]. Where a sequence has no
weight the value means nothing, and its term's weight there is 0. T packed tokens, S sequences, D
width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lorry.data.batch import Batch

Setting = float | Tensor


def token_sum(scores: Tensor, weights: Tensor, batch: Batch) -> Tensor:
    """[S]: sum over a sequence's tokens of weight * score."""
    return batch.sum_by_sequence(scores * weights)


def answer_nll(logprob: Tensor, weights: Tensor, batch: Batch) -> Tensor:
    """[S]: NLL(y), nats."""
    return token_sum(-logprob, weights, batch)


def npo_loss(
    policy: Tensor, reference: Tensor, weights: Tensor, batch: Batch, beta: Setting
) -> Tensor:
    """[S]: -(2/beta) log sigmoid(beta (NLL - NLL_ref)) (NPO, Zhang et al. 2024, arXiv 2404.05868).

    The difference is taken token by token, so it is 0, and the loss (2/beta) log 2, to the bit
    wherever policy and reference are.
    """
    gap = answer_nll(policy - reference, weights, batch)
    return -(2 / beta) * F.logsigmoid(beta * gap)


def simnpo_loss(
    logprob: Tensor, weights: Tensor, batch: Batch, beta: Setting, delta: Setting
) -> Tensor:
    """[S]: -(2/beta) log sigmoid(beta (NLL / |y| - delta)) (SimNPO, Fan et al. 2024, arXiv
    2410.07163).
    """
    # |y| in tokens; at least 1, or a sequence without a weight would give 0/0
    length = batch.sum_by_sequence(weights).clamp(min=1)
    mean = answer_nll(logprob, weights, batch) / length
    return -(2 / beta) * F.logsigmoid(beta * (mean - delta))


def preference_loss(chosen: Tensor, rejected: Tensor, beta: Setting) -> Tensor:
    """[S]: -(1/beta) log sigmoid(beta (chosen - rejected)) of two rewards [S]; DPO's is twice it
    (Rafailov et al. 2023, arXiv 2305.18290).
    """
    return -(1 / beta) * F.logsigmoid(beta * (chosen - rejected))


def weighted_ascent(logprob: Tensor, beta1: Tensor, beta2: Tensor | None = None) -> Tensor:
    """[T]: -sg(p^beta1 (1 - p)^beta2) NLL_t, the exponents per token [T]: WGA without ``beta2``
    (Wang et al. 2025, arXiv 2502.19301), SatImp with it (Yang et al. 2025, arXiv 2505.11953).
    """
    # sg: the weight of a token is a constant; with its gradient the loss would be another one
    fixed = logprob.detach()
    importance = (beta1 * fixed).exp()
    if beta2 is not None:
        # 1 - p without the cancellation near p = 1; a p that rounds above 1 has none left
        importance = importance * (-torch.expm1(fixed)).clamp(min=0) ** beta2
    return importance * logprob


def steering_loss(states: Tensor, targets: Tensor, weights: Tensor, batch: Batch) -> Tensor:
    """[S]: weighted mean over a sequence's tokens of the mean over the width of (h - target)^2.

    ``states``, ``targets`` [T,D]. RMU's forget term and its EMBED retain term (Li et al. 2024, arXiv
    2403.03218). Only rows with a weight are read, in at least fp32: squares of bfloat16 activations
    lose most of their digits.
    """
    at = torch.nonzero(weights, as_tuple=True)[0]  # [t] the tokens that count
    wide = torch.promote_types(states.dtype, torch.float32)
    distance = (states[at].to(wide) - targets[at].to(wide)).square().mean(1)
    per_token = distance.new_zeros(len(weights)).index_copy(0, at, distance)
    total = batch.sum_by_sequence(weights.to(wide))
    # a mean per sequence first, as RMU has it: a long answer counts as much as a short one
    return token_sum(per_token, weights, batch) / torch.where(total > 0, total, 1.0)
