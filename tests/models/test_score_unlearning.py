"""Unlearning's scores against their formulas over whole logits in float64, with autograd's slope;
their bounds; and scores wanted at some tokens only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lorry.adapters.mix import AdapterContext
from lorry.data.batch import Batch, BatchExtra, TokenizedExample, collate
from lorry.models.scoring import score, tiles
from lorry.models.scoring.score import (
    ScoreFn,
    TokenScore,
    VocabRows,
    evaluate_wants,
    log_prob,
    score_supervised_tokens,
)
from lorry.models.scoring.unlearning import (
    contrary_cross_entropy,
    inverted_hinge,
    logit_spread,
    lowered_cross_entropy,
    one_hot_jsd,
    uniform_divergence,
)
from lorry.models.scoring.vocab import log_prob_value
from tests.support.seam import examples, tiny_llama

V, D, T = 211, 16, 90
Truth = Callable[[Tensor, VocabRows], Tensor]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch() -> Batch:
    ids = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(3)).tolist()
    made = collate([TokenizedExample(ids, [0.0 if t % 3 == 0 else 1.0 for t in range(T)])])
    return made.with_extra(
        start=BatchExtra(draw(T, V, seed=4), "token"),
        strength=BatchExtra(torch.linspace(0.5, 9, T, dtype=torch.float64), "token"),
        other=BatchExtra(torch.tensor(ids).roll(7), "token"),
    )


def hinge(z: Tensor, rows: VocabRows) -> Tensor:
    p, own = z.softmax(1), F.one_hot(rows.targets, V).bool()
    return (1 + p[own] - p.masked_fill(own, -1).max(1).values).clamp(min=0)


def jsd(z: Tensor, rows: VocabRows) -> Tensor:
    p, q = z.softmax(1), F.one_hot(rows.extra["other"], V).double()
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(1) - m[q > 0].log()) / 2


def contrary(z: Tensor, rows: VocabRows) -> Tensor:
    q = z.softmax(1).detach() * (1 - F.one_hot(rows.targets, V))
    return -(q / q.sum(1, keepdim=True) * z.log_softmax(1)).sum(1)


def lowered(z: Tensor, rows: VocabRows) -> Tensor:
    less = rows.extra["strength"][:, None] * F.one_hot(rows.targets, V)
    return -((rows.extra["start"] - less).softmax(1) * z.log_softmax(1)).sum(1)


SCORES: dict[str, tuple[ScoreFn, Truth]] = {
    "uniform": (uniform_divergence, lambda z, r: -math.log(V) - z.log_softmax(1).mean(1)),
    "jsd": (one_hot_jsd("other"), jsd),
    "spread": (logit_spread, lambda z, r: (z.max(1).values - z.mean(1)) ** 2),
    "contrary": (contrary_cross_entropy, contrary),
    "hinge": (inverted_hinge, hinge),
    "lowered": (
        lowered_cross_entropy(lambda r: r.extra["start"], lambda r: r.extra["strength"]),
        lowered,
    ),
}


class Head(torch.nn.Module):
    """A model that is nothing but its head."""

    def __init__(self, weight: Tensor, *, frozen: bool) -> None:
        super().__init__()
        self.head = torch.nn.Linear(weight.shape[1], len(weight), bias=False, dtype=weight.dtype)
        self.head.weight = torch.nn.Parameter(weight.clone(), requires_grad=not frozen)

    def logits(self, hidden: Tensor, call: AdapterContext) -> Tensor:
        return self.head(hidden)


@pytest.mark.parametrize("frozen", [True, False], ids=["tiles", "whole rows"])
@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float64, 1e-9), (torch.float32, 2e-5)], ids=str
)
@pytest.mark.parametrize("name", SCORES)
def test_values_and_gradients(
    name: str, dtype: torch.dtype, allowed: float, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "GROUP_ROWS", 64)
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 64 * 64)
    monkeypatch.setattr(score, "CHUNK_TOKENS", 33)
    fn, truth = SCORES[name]
    made, model = batch(), Head((draw(V, D, seed=1) * 0.5).to(dtype), frozen=frozen)
    hidden = draw(T, D, seed=2).to(dtype).requires_grad_()
    factors = draw(len(made.rows), seed=6)
    got = score_supervised_tokens(model, hidden, made, [fn], AdapterContext())[:, 0]  # type: ignore[arg-type]
    ((0.2 * got.double()).tanh() * factors).sum().backward()

    wide = hidden.detach().double().requires_grad_()
    rows = VocabRows(
        made.tokens[made.rows], {n: e.values[made.rows] for n, e in made.extra.items()}
    )
    values = truth(wide[made.rows - 1] @ model.head.weight.detach().double().t(), rows)
    ((0.2 * values).tanh() * factors).sum().backward()
    assert hidden.grad is not None
    assert wide.grad is not None
    for mine, exact in ((got.detach(), values.detach()), (hidden.grad, wide.grad)):
        assert float((mine.double() - exact).norm() / exact.norm()) < allowed


@pytest.mark.parametrize("scale", [0.0, 1.0, 60.0, 1e4])
def test_bounds_and_extremes(scale: float) -> None:
    """Bounds hold in fp32 up to a rounding, and nothing is NaN, from equal logits to certain ones."""
    logits = (draw(64, V, seed=8) * scale).float().requires_grad_()
    targets = torch.arange(64)
    targets[:32] = logits.detach()[:32].argmax(1)  # certain of the target, and of another
    rows = VocabRows(targets, {"other": targets})
    for fn, low, high in [
        (inverted_hinge, 0.0, 2.0),
        (one_hot_jsd("other"), 0.0, math.log(2)),
        (uniform_divergence, 0.0, math.inf),
        (contrary_cross_entropy, 0.0, math.inf),
        (logit_spread, 0.0, math.inf),
    ]:
        values = fn(logits, rows)
        assert bool((values >= low - 1e-6).all() and (values <= high + 1e-6).all())
        if not isinstance(fn, type(uniform_divergence)):
            value, slope = fn.with_slope(logits.detach().clone(), rows)
            assert bool(torch.isfinite(slope).all())
            assert torch.allclose(value, values.detach(), rtol=1e-4, atol=1e-5)


def test_scores_at_the_tokens_of_an_extra_only() -> None:
    """Equal to those of the whole batch there, 0 elsewhere, and their gradient that of these tokens;
    a value without gradient adds none.
    """
    model = tiny_llama().double()
    made = collate(examples(5))
    some = torch.where(torch.arange(made.tokens.numel()) % 2 == 0, made.weights, 0.0)
    more = (made.positions > 0).float() - (made.weights != 0).float()  # none of the supervised
    made = made.with_extra(some=BatchExtra(some, "token"), more=BatchExtra(more, "token"))
    got = evaluate_wants(
        model,
        made,
        {
            "all": TokenScore(log_prob),
            "some": TokenScore(log_prob, weights="some"),
            "more": TokenScore(log_prob_value, weights="more"),
        },
        AdapterContext(),
    )
    assert torch.allclose(got["some"], torch.where(some != 0, got["all"], 0.0))
    plain = collate(
        [
            TokenizedExample(made.tokens[a:b].tolist(), [0.0] + [1.0] * (b - a - 1))
            for a, b in made.segments
        ]
    )
    every = evaluate_wants(model, plain, {"all": TokenScore(log_prob)}, AdapterContext())["all"]
    assert torch.allclose(got["more"], torch.where(more != 0, every, 0.0))
    odd = made.with_extra(some=BatchExtra(torch.ones_like(some), "token"))
    with pytest.raises(ValueError, match="first token of a sequence"):
        evaluate_wants(model, odd, {"s": TokenScore(log_prob, weights="some")}, AdapterContext())
