"""Losses as pure functions: per-token scores and a batch in, one value per sequence out. The
backend normalises.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lorry.data.batch import Batch


def nll_loss(logprob: Tensor, batch: Batch) -> Tensor:
    """[S]: sum over supervised tokens of -weight * log p(token), nats."""
    return batch.sum_by_sequence(-logprob * batch.weights)


def npo_loss(policy: Tensor, reference: Tensor, batch: Batch, beta: float) -> Tensor:
    """[S]: -(2/beta) log sigmoid(-beta log(pi(y|x) / pi_ref(y|x))), sequence sums (Zhang et al.
    2024, arXiv 2404.05868).
    """
    gap = batch.sum_by_sequence((policy - reference) * batch.weights)
    return -(2 / beta) * F.logsigmoid(-beta * gap)


def distillation_loss(divergence: Tensor, taught: Tensor, batch: Batch) -> Tensor:
    """[S]: sum over the supervised tokens a teacher speaks of (``taught`` [T] is 1 there) of weight
    * divergence.
    """
    return batch.sum_by_sequence(torch.where(taught > 0, divergence, 0.0) * batch.weights)
