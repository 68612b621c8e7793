"""How many directions the gradient of a weight has, while somebody runs the model and a loss backward: what
a first step can use of a rank.

    ranks = gradient_ranks(layers, run_model, most=256)     # {path: effective rank of dL/dW}

No gradient is kept, and none is larger than one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from lorry.adapters.initialization.factors import module_seed, seeded_svd
from lorry.adapters.initialization.recording import (
    ProbedLinear,
    RunModel,
    WatchedLinear,
    watched_products,
)
from lorry.adapters.layers.linear import BankLinear
from lorry.errors import ConfigError

ENERGY = 0.9  # share of a gradient's squared norm that its first directions have to have
EXACT_SIDE = 1024  # of the smaller side up to which all singular values are computed
NITER = 2  # of the randomised decomposition beyond it


def effective_rank(matrix: Tensor, most: int, *, energy: float = ENERGY, seed: int = 0) -> int:
    """The smallest number of singular values of [O,I] that have the share ``energy`` of the sum of all
    squares, at most ``most``; 0 of zeros. Up to `EXACT_SIDE` exactly, else by a randomised decomposition
    (Halko et al., arXiv 0909.4061), which underestimates late ones a little."""
    matrix = matrix.detach().float()
    total = float(matrix.double().square().sum())
    if not total:
        return 0
    small = min(matrix.shape)
    if small <= EXACT_SIDE:
        # the Gram matrix of the smaller side: a third of the time of the values themselves
        side = matrix if matrix.shape[0] == small else matrix.t()
        squares = torch.linalg.eigvalsh((side @ side.t()).double()).flip(0).clamp_min(0)
    else:
        squares = seeded_svd(matrix, min(most, small), NITER, seed)[1].double().square()
    have = squares.cumsum(0) >= energy * total
    return min(most, int(have.int().argmax()) + 1 if bool(have.any()) else most)


def gradient_ranks(
    layers: Mapping[str, BankLinear], run_model: RunModel, most: int
) -> dict[str, int]:
    """{path: `effective_rank` of the gradient of its weight} over the backward passes of ``run_model``, of
    several the largest; 0 where no gradient came. Raises ConfigError where none came anywhere."""
    ranks = dict.fromkeys(layers, 0)

    def show(path: str, gradient: Tensor) -> None:
        here = effective_rank(gradient, most, seed=module_seed(0, path))
        ranks[path] = max(ranks[path], here)

    def watch(path: str, layer: BankLinear) -> WatchedLinear:
        wanted = nn.Parameter(torch.zeros((), device=layer.weight.device))
        return ProbedLinear(layer, layer.product, wanted, partial(show, path))

    with watched_products(layers, watch), torch.enable_grad():
        run_model()
    if not any(ranks.values()):
        raise ConfigError(
            "no linear that the adapter sits on got a gradient on the rows that r=auto reads; give r=N"
        )
    return ranks
