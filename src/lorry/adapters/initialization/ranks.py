"""EVA's choice of ranks: the directions of all modules that explain most, as many as there were ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def redistribute_ranks(
    asked: Mapping[str, int], shares: Mapping[str, Tensor], rho: float
) -> dict[str, int]:
    """{module: its rank}, of the same sum as ``asked``: to each as many as it has directions among the
    largest of all. ``shares``: of each module, largest first, the part of its inputs' variance that a
    direction explains; no module gets more than ``rho`` times what it asked for. Of equals the first
    module's goes first."""
    most = {path: min(round(rho * rank), len(shares[path])) for path, rank in asked.items()}
    values = torch.cat([shares[path][:count] for path, count in most.items()])
    owners = [path for path, count in most.items() for _ in range(count)]
    ranks = dict.fromkeys(asked, 0)
    for at in values.argsort(descending=True, stable=True)[: sum(asked.values())].tolist():
        ranks[owners[at]] += 1
    return ranks
