"""Scores with a slope in closed form, by tiles and by rows, against float64 autograd over whole
logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.mix import AdapterContext
from lorry.data.batch import Batch, BatchExtra, TokenizedExample, collate
from lorry.kernels import softmax as kernel
from lorry.models.scoring import score, tiles, vocab
from lorry.models.scoring.score import ScoreFn, correct, entropy, log_prob, score_supervised_tokens

V, D, T, K = 211, 16, 150, 7
LENGTH = T // 3


class Head:
    """A model that is nothing but its head; one that trains is no longer a plain product."""

    def __init__(self, weight: Tensor, *, frozen: bool) -> None:
        self.head = nn.Linear(D, V, bias=False).to(weight.dtype)
        self.head.weight = nn.Parameter(weight.clone(), requires_grad=not frozen)

    def hidden(self, *_: object, **__: object) -> None:
        raise AssertionError("scores are given the hidden state here")

    def logits(self, hidden: Tensor, call: AdapterContext) -> Tensor:
        return self.head(hidden)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def packed() -> Batch:
    """150 tokens, some unsupervised, with a teacher: its logits, and its K likeliest tokens."""
    ids = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(3)).tolist()
    weights = [0.0 if t % LENGTH == 0 or t % 5 == 2 else 1.0 for t in range(T)]
    cuts = [slice(s, s + LENGTH) for s in range(0, T, LENGTH)]
    batch = collate([TokenizedExample(ids[c], weights[c], key=i) for i, c in enumerate(cuts)])
    teacher = draw(T, V, seed=4) * 1.5
    top = teacher.log_softmax(1).topk(K)
    extras = {
        "teacher": teacher,
        "ids": top.indices,
        "log_probs": top.values,
        "probs": top.values.exp(),
    }
    return batch.with_extra(**{name: BatchExtra(x, "token") for name, x in extras.items()})


Truth = Callable[[Tensor, vocab.VocabRows], Tensor]  # of log p [t,V], in float64


def nll_smoothed(logp: Tensor, rows: vocab.VocabRows) -> Tensor:
    q = torch.full_like(logp, 0.1 / V)
    q[torch.arange(len(q)), rows.targets] += 0.9
    return -(q * logp).sum(1)


def bucketed(logp: Tensor, rows: vocab.VocabRows, reverse: bool) -> Tensor:
    """Both distributions coarsened to the K tokens and all others as one."""
    both = []
    for x in (rows.extra["teacher"].log_softmax(1), logp):
        p = x.exp()
        near = p.gather(1, rows.extra["ids"])
        both.append(torch.cat([near, p.sum(1, keepdim=True) - near.sum(1, keepdim=True)], 1))
    q, p = both
    return (p * (p / q).log()).sum(1) if reverse else (q * (q / p).log()).sum(1)


def z_score(logp: Tensor, rows: vocab.VocabRows) -> Tensor:
    p = logp.exp()
    mean = (p * logp).sum(1)
    return (logp.gather(1, rows.targets[:, None])[:, 0] - mean) / (
        (p * logp**2).sum(1) - mean**2
    ).sqrt()


def teacher(rows: vocab.VocabRows) -> Tensor:
    return rows.extra["teacher"]


SCORES: dict[str, tuple[ScoreFn, Truth]] = {
    "log_prob": (log_prob, lambda logp, r: -F.nll_loss(logp, r.targets, reduction="none")),
    "entropy": (entropy, lambda logp, r: -(logp.exp() * logp).sum(1)),
    "min_k": (vocab.min_k, z_score),
    "smoothed": (vocab.label_smoothed(0.1), nll_smoothed),
    "top_k_ce": (
        vocab.top_k_cross_entropy("ids", "probs"),
        lambda logp, r: -(r.extra["probs"] * logp.gather(1, r.extra["ids"])).sum(1),
    ),
    "top_k_kl": (vocab.top_k_kl("ids", "log_probs"), lambda logp, r: bucketed(logp, r, False)),
    "top_k_reverse": (
        vocab.top_k_kl("ids", "log_probs", reverse=True),
        lambda logp, r: bucketed(logp, r, True),
    ),
    "soft_ce": (
        vocab.soft_cross_entropy(lambda r: teacher(r).softmax(1)),
        lambda logp, r: -(teacher(r).softmax(1) * logp).sum(1),
    ),
    "kl_from": (
        vocab.forward_kl(teacher),
        lambda logp, r: F.kl_div(logp, teacher(r).softmax(1), reduction="none").sum(1),
    ),
    "kl_to": (
        vocab.reverse_kl(teacher),
        lambda logp, r: (logp.exp() * (logp - teacher(r).log_softmax(1))).sum(1),
    ),
    "any": (
        lambda logits, r: logits.softmax(1).square().sum(1),
        lambda logp, r: logp.exp().square().sum(1),
    ),
}
TOGETHER = ["log_prob", "entropy", "top_k_kl", "soft_ce", "any"]
CASES = [[name] for name in SCORES] + [
    ["log_prob", "entropy"],
    TOGETHER,
    [*TOGETHER, "kl_to", "kl_from"],
]
FORMS = [
    (torch.bfloat16, True),
    (torch.bfloat16, False),
    (torch.float32, False),
    (torch.float64, False),
]
VALUES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}
GRADIENTS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-3}


def truth(
    names: list[str],
    hidden: Tensor,
    weight: Tensor,
    batch: Batch,
    factors: Tensor,
    *,
    rounded: bool,
) -> list[Tensor]:
    """Values, gradient of the hidden states and of the head, all in float64; ``rounded`` takes the
    logits as the model's dtype holds them, so that what is left is the error of the scores alone."""
    wide, head = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = wide[batch.rows - 1] @ head.t()
    if rounded:
        held = (hidden.detach()[batch.rows - 1] @ weight.detach().t()).double()
        logits = logits + (held - logits).detach()
    rows = vocab.VocabRows(
        batch.tokens[batch.rows], {n: e.values[batch.rows] for n, e in batch.extra.items()}
    )
    values = torch.stack([SCORES[n][1](logits.log_softmax(1), rows) for n in names], 1)
    ((0.2 * values).tanh() * factors).sum().backward()
    assert wide.grad is not None
    assert head.grad is not None
    return [values.detach(), wide.grad, head.grad]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups, tiles and chunks, none of them even."""
    monkeypatch.setattr(tiles, "GROUP_ROWS", 64)
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 64 * 64)
    monkeypatch.setattr(score, "CHUNK_TOKENS", 33)


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize(
    "form", FORMS, ids=lambda f: f"{str(f[0])[6:]}-{'compiled' if f[1] else 'torch'}"
)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("names", CASES, ids="+".join)
def test_values_and_gradients(
    names: list[str], frozen: bool, form: tuple[torch.dtype, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, compiled = form
    if compiled and kernel.load_library() is None:
        pytest.skip("no compiled kernels here")
    if not compiled:
        monkeypatch.setattr(kernel, "load_library", lambda: None)
    batch, weight = packed(), (draw(V, D, seed=1) * 0.5).to(dtype)
    hidden = draw(T, D, seed=2).to(dtype).requires_grad_()
    model = Head(weight, frozen=frozen)
    factors = draw(len(batch.rows), len(names), seed=5)

    table = score_supervised_tokens(
        model, hidden, batch, [SCORES[n][0] for n in names], AdapterContext()
    )
    ((0.2 * table.double()).tanh() * factors).sum().backward()

    values, slope, head_slope = truth(
        names, hidden, weight, batch, factors, rounded=dtype == torch.bfloat16
    )
    assert table.dtype == kernel.accumulator_dtype(hidden)
    for j in range(len(names)):
        assert distance(table[:, j], values[:, j]) < VALUES[dtype]
    assert hidden.grad is not None
    assert distance(hidden.grad, slope) < GRADIENTS[dtype]
    if not frozen:
        assert model.head.weight.grad is not None
        assert distance(model.head.weight.grad, head_slope) < GRADIENTS[dtype]


@pytest.mark.parametrize("name", [n for n in SCORES if n != "any"])
def test_logits_in_bfloat16_cost_less_than_a_hundredth(name: str) -> None:
    """Against exact logits, their rounding included. (The sum of squared probabilities, "any", is
    not held to it: there float64 on rounded logits is off by more than that itself.)"""
    batch, weight = packed(), (draw(V, D, seed=1) * 0.5).bfloat16()
    hidden, factors = (
        draw(T, D, seed=2).bfloat16().requires_grad_(),
        draw(len(batch.rows), 1, seed=5),
    )
    table = score_supervised_tokens(
        Head(weight, frozen=True), hidden, batch, [SCORES[name][0]], AdapterContext()
    )
    ((0.2 * table.double()).tanh() * factors).sum().backward()
    values, slope, _ = truth([name], hidden, weight, batch, factors, rounded=False)
    assert hidden.grad is not None
    assert distance(table, values) < 1e-2
    assert distance(hidden.grad, slope) < 1e-2


@pytest.mark.parametrize("names", [["log_prob"], ["log_prob", "entropy"], ["kl_to"]], ids="+".join)
def test_backward_may_run_again(names: list[str]) -> None:
    hidden = draw(T, D, seed=2).float().requires_grad_()
    table = score_supervised_tokens(
        Head(draw(V, D, seed=1).float(), frozen=True),
        hidden,
        packed(),
        [SCORES[n][0] for n in names],
        AdapterContext(),
    )
    first, second = (
        torch.autograd.grad(table.square().sum(), hidden, retain_graph=True)[0] for _ in range(2)
    )
    assert first.abs().sum() > 0
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "fn", [log_prob, vocab.label_smoothed(0.0)], ids=["one pass", "two passes"]
)
def test_a_confident_model_keeps_its_gradient(fn: ScoreFn) -> None:
    """Where p(target) = 0.999 the slope is a thousandth of the head's row; rounding p in bfloat16
    must not drown it.
    """
    batch = collate([TokenizedExample([1] * 65, [0.0] + [1.0] * 64)])
    weight, hidden = (draw(V, D, seed=1) * 0.3).bfloat16(), (draw(65, D, seed=2) * 0.3)
    hidden = (
        (hidden + weight[1].double() * (14.0 / weight[1].double().square().sum()))
        .bfloat16()
        .requires_grad_()
    )
    score_supervised_tokens(
        Head(weight, frozen=True), hidden, batch, [fn], AdapterContext()
    ).sum().backward()
    wide = hidden.detach().double().requires_grad_()
    logp = (wide[:-1] @ weight.double().t()).log_softmax(1)[:, 1]
    assert 1e-5 < 1 - logp.exp().mean() < 1e-2
    logp.sum().mul(1 if fn is log_prob else -1).backward()
    assert hidden.grad is not None
    assert distance(hidden.grad, wide.grad) < 3e-2  # the logits themselves are rounded to 8 bits


def test_a_token_chosen_twice_counts_twice() -> None:
    twice = vocab.VocabStatistic(
        lambda p, rows: p.chosen.sum(1), lambda rows: rows.targets[:, None].expand(-1, 2)
    )
    hidden, model, batch = (
        draw(T, D, seed=2).requires_grad_(),
        Head(draw(V, D, seed=1), frozen=True),
        packed(),
    )
    once, both = (
        score_supervised_tokens(model, hidden, batch, [fn], AdapterContext())
        for fn in (log_prob, twice)
    )
    assert torch.allclose(2 * once, both)
    one, two = (torch.autograd.grad(x.sum(), hidden)[0] for x in (once, both))
    assert torch.allclose(2 * one, two)


def test_a_statistic_reads_moments_only_if_it_asks() -> None:
    """Forgetting to say so gives NaN, which a run stops at, not a wrong number."""
    forgot = vocab.VocabStatistic(lambda p, rows: p.mean)
    hidden, model, batch = draw(T, D, seed=2), Head(draw(V, D, seed=1), frozen=True), packed()
    assert score_supervised_tokens(model, hidden, batch, [forgot], AdapterContext()).isnan().all()
    assert forgot(draw(3, V, seed=1), vocab.VocabRows(torch.tensor([0, 1, 2]), {})).isnan().all()


@pytest.mark.parametrize("dtype", VALUES, ids=str)
@pytest.mark.parametrize("name", SCORES)
def test_what_is_not_finite_shows(name: str, dtype: torch.dtype) -> None:
    """One row's hidden state is NaN, another's makes infinite logits: those scores are not finite,
    the others are.
    """
    hidden, batch = draw(T, D, seed=2).to(dtype), packed()
    model = Head(draw(V, D, seed=1).to(dtype), frozen=True)
    hidden[batch.rows[3] - 1, 0] = torch.nan
    hidden[batch.rows[90] - 1] = torch.finfo(dtype).max
    got = score_supervised_tokens(
        model, hidden.requires_grad_(), batch, [SCORES[name][0], correct], AdapterContext()
    )
    assert got[:, 0].isfinite().logical_not().nonzero()[:, 0].tolist() == [3, 90]
    assert got[[3, 90], 1].tolist() == [0, 0]


def test_no_tensor_is_as_large_as_all_logits() -> None:
    """Logits exist for a tile or a chunk at a time, forward and backward, frozen head or not."""
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            seen.extend(
                x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)
            )
            return out

    batch = replace(packed(), extra={})
    for frozen, names in (
        (True, ["log_prob"]),
        (True, ["log_prob", "entropy", "min_k"]),
        (True, ["any"]),
        (False, ["log_prob"]),
    ):
        hidden = draw(T, D, seed=2).float().requires_grad_()
        model = Head(draw(V, D, seed=1).float(), frozen=frozen)
        seen.clear()
        with Watch():
            score_supervised_tokens(
                model, hidden, batch, [SCORES[n][0] for n in names], AdapterContext()
            ).sum().backward()
        assert (
            max(seen)
            <= max(33 * V if names == ["any"] or not frozen else 64 * 64, V * D)
            < len(batch.rows) * V / 2
        )


def test_equal_scores_with_equal_neighbours_or_not() -> None:
    """A row's score and gradient do not change by one bit with the other rows of its pass."""
    batch, weight = packed(), draw(V, D, seed=1).bfloat16()
    one, other = draw(T, D, seed=2).bfloat16(), draw(T, D, seed=8).bfloat16()
    source = batch.rows[20] - 1
    other[source] = one[source]
    for fns in ([log_prob], [log_prob, entropy]):
        results = []
        for hidden in (one, other):
            x = hidden.clone().requires_grad_()
            table = score_supervised_tokens(
                Head(weight, frozen=True), x, batch, fns, AdapterContext()
            )
            table.sum().backward()
            assert x.grad is not None
            results.append((table[20], x.grad[source]))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


def test_correct_takes_the_first_of_equals_and_has_no_gradient() -> None:
    weight = torch.zeros(V, D)
    weight[5] = weight[9] = 1.0  # equal logits in one tile
    weight[140] = 1.0  # and in a later one
    hidden = torch.ones(4, D).requires_grad_()
    batch = collate([TokenizedExample([0, 5, 9, 140], [0.0, 1.0, 1.0, 1.0])])
    model = Head(weight, frozen=True)
    got = score_supervised_tokens(model, hidden, batch, [correct], AdapterContext())
    assert got[:, 0].tolist() == [1, 0, 0]
    assert not torch.autograd.grad(got.sum(), hidden)[0].any()
    logits = hidden.detach()[:3] @ weight.t()
    assert correct(logits, vocab.VocabRows(batch.tokens[1:], {})).tolist() == [1, 0, 0]
