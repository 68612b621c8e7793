"""The element-wise maths of a merge: prune, elect a sign, add.

It is PEFT's (`peft/utils/merge_utils.py`), operation by operation, so that results are equal to the
last bit: TIES (Yadav et al. 2023, arXiv 2306.01708) elects its signs before the weights, and DARE
(Yu et al. 2023, arXiv 2311.03099) draws a mask of a tensor's own memory layout. What these work on,
factors, deltas or cores, `weighted.py` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorry.config.merge import MajoritySign, MergeMethod


def combine(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    method: MergeMethod,
    *,
    density: float,
    majority_sign_method: MajoritySign,
    generator: torch.Generator,
) -> Tensor:
    """One tensor of several of one shape: pruned to ``density``, weighted and added; with
    ``method.elects_sign`` the mean over those that have the elected sign. ``generator`` is used by
    random pruning alone.
    """
    if method.prune == "magnitude":
        tensors = [prune_by_magnitude(t, density) for t in tensors]
    elif method.prune == "random":
        tensors = [prune_at_random(t, density, generator) for t in tensors]
    stacked = torch.stack(list(tensors))
    # before the weights: a negative one turns a task round, but not its vote
    agreement = agrees_with_majority(stacked, majority_sign_method) if method.elects_sign else None
    factors = torch.tensor(weights, dtype=stacked.dtype)
    weighted = stacked * factors.view(-1, *[1] * (stacked.dim() - 1))
    if agreement is None:
        return weighted.sum(dim=0)
    # at least 1: where everything was pruned the sum is 0 already
    return (weighted * agreement).sum(dim=0) / torch.clamp(agreement.sum(dim=0), min=1.0)


def prune_by_magnitude(tensor: Tensor, density: float) -> Tensor:
    """The largest int(density * n) of a tensor's n values; 0 for the others."""
    if density >= 1:
        return tensor
    mask = torch.zeros_like(tensor).reshape(-1)
    mask[tensor.abs().reshape(-1).topk(int(density * tensor.numel())).indices] = 1
    return tensor * mask.reshape(tensor.shape)


def prune_at_random(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each value with probability ``density``, divided by it, so that the mean stays; else 0."""
    if density >= 1:
        return tensor
    # full_like keeps the strides, and values are drawn in memory's order, not in that of indices
    mask = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
    return tensor * mask / density


def agrees_with_majority(stacked: Tensor, method: MajoritySign) -> Tensor:
    """Whether each value of [K, ...] has the sign elected at its place: that of the sum ("total"),
    or of the sum of signs ("frequency"); a sum of 0 counts as +, and a value of 0 agrees with none.
    """
    signs = stacked.sign()
    votes = (stacked if method == "total" else signs).sum(dim=0)
    return signs == torch.where(votes >= 0, 1, -1)
