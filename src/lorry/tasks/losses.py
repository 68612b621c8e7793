"""Losses as pure functions: per-token scores and a batch in, one value per sequence out. The
backend normalises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorry.data.batch import Batch


def nll_loss(logprob: Tensor, batch: Batch) -> Tensor:
    """[S]: sum over supervised tokens of -weight * log p(token), nats."""
    return batch.sum_by_sequence(-logprob * batch.weights)


def distillation_loss(divergence: Tensor, taught: Tensor, batch: Batch) -> Tensor:
    """[S]: sum over the supervised tokens a teacher speaks of (``taught`` [T] is 1 there) of weight
    * divergence.
    """
    # where and not times 0: an infinity at a token that nobody taught would become NaN
    return batch.sum_by_sequence(torch.where(taught > 0, divergence, 0.0) * batch.weights)
