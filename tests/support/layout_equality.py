"""How far a training of several processes may be from that of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.layouts import STEPS, uneven
from tests.support.tinyrun import quick  # noqa: F401 - a fixture

# by training, how far the first loss and the values may differ, relatively
BOUNDS = {
    "float32": (1e-5, 1e-3),
    # masters are fp32: no tighter bound of an adapter is true
    "float64": (1e-9, 1e-6),
    "mixed": (1e-5, 1e-3),
    "unsupervised": (1e-5, 1e-3),
    "few": (1e-5, 1e-3),
    "npo": (1e-5, 1e-3),
    "router": (1e-5, 1e-3),
    "gradient rule": (1e-5, 1e-3),
}


def relative(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true.double()).norm() / true.double().norm().clamp(min=1e-30))


def compare_training(
    ranks: Sequence[Mapping[str, Tensor]],
    alone: Mapping[str, Tensor],
    layout: str,
    training: str,
    bounds: tuple[float, float],
) -> None:
    """Each rank's training is that of one process, and the ranks hold the same bits."""
    names = [name for name in alone if name.startswith(f"{training}/")]
    for mine in ranks:
        first = (mine[f"{layout}/{training}/losses"][0], alone[f"{training}/losses"][0])
        torch.testing.assert_close(*first, rtol=bounds[0], atol=bounds[0])
        norms = (mine[f"{layout}/{training}/norms"], alone[f"{training}/norms"])
        assert relative(*norms) < max(1e-6, bounds[0])
        for name in names:
            if "/values/" in name:
                assert relative(mine[f"{layout}/{name}"], alone[name]) < bounds[1], name
    for mine in ranks:
        keys = [f"{layout}/{name}" for name in names]
        assert all(torch.equal(mine[key], ranks[0][key]) for key in keys)


def plain_loop(
    model: nn.Module, params: Sequence[Tensor], rate: float
) -> tuple[list[float], list[float]]:
    """Losses and norms of `uneven` rows by a model of transformers and torch.optim, each row by itself."""
    adamw = torch.optim.AdamW(params, lr=rate, weight_decay=0.0)
    losses, norms = list[float](), list[float]()
    for step in range(STEPS):
        rows = [row for batch in uneven(step) for row in batch]
        total, weight = torch.zeros((), dtype=torch.float64), sum(sum(r.weights) for r in rows)
        for row in rows:
            tokens = torch.tensor(row.tokens)
            logp = model(tokens[None]).logits[0].log_softmax(-1)
            picked = logp[:-1].gather(1, tokens[1:, None])[:, 0]
            total = total - (picked * torch.tensor(row.weights[1:])).sum() / weight
        total.backward()
        losses.append(total.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(params, 1.0)))
        adamw.step()
        adamw.zero_grad()
    return losses, norms


def check_fault(
    ended: Sequence[Mapping[str, Any]], fault: str, kind: str, words: list[str]
) -> None:
    """The fault has ended every rank with the same kind of error, which all share, in these words."""
    for rank, mine in enumerate(ended):
        assert mine[fault][0] == kind, (rank, mine[fault])
        assert mine[fault][2] == "True", (rank, mine[fault])
    assert all(word in ended[0][fault][1] for word in words), ended[0][fault]
