"""Divergences from a teacher against the published formulas, written plainly over whole logits in
float64, and their autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.mix import AdapterContext, Mix
from lorry.data.batch import Batch, BatchExtra, TokenizedExample, collate
from lorry.errors import ConfigError
from lorry.models.scoring import divergence, score, tiles
from lorry.models.scoring.divergence import LOSSES, full_vocab_divergence, top_k_divergence
from lorry.models.scoring.score import ScoreFn, VocabRows, score_supervised_tokens

V, D, T, K = 211, 16, 90, 7
WIDTH = 24  # of the teacher
WIDER = 307  # the vocabulary of another tokenizer


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Head:
    """A model that is nothing but its head: frozen, trained, or with a bias.
    `score_supervised_tokens` is given the hidden state.
    """

    def __init__(self, weight: Tensor, *, frozen: bool = True, bias: bool = False) -> None:
        self.head = nn.Linear(weight.shape[1], len(weight), bias=bias).to(weight.dtype)
        self.head.weight = nn.Parameter(weight.clone(), requires_grad=not frozen)

    def hidden(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("nobody asks for it")

    def logits(self, hidden: Tensor | None, call: AdapterContext) -> Tensor:
        return self.head(hidden)


def batch_for(tau: float, vocabulary: int = V) -> tuple[Batch, Tensor]:
    """90 tokens, a third of them unsupervised, with a teacher's hidden states and top k; and the
    teacher's head.
    """
    ids = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(3)).tolist()
    weights = [0.0 if t % 3 == 0 else 1.0 for t in range(T)]
    hidden, head = draw(T, WIDTH, seed=4), draw(vocabulary, WIDTH, seed=5) * 0.4
    top = (hidden @ head.t() / tau).log_softmax(1).topk(K)
    extras = {"hidden": hidden, "ids": top.indices, "log_probs": top.values}
    batch = collate([TokenizedExample(ids, weights)])
    return batch.with_extra(**{n: BatchExtra(x, "token") for n, x in extras.items()}), head


def plain(loss: str, beta: float, p: Tensor, q: Tensor) -> Tensor:
    """[t] from probabilities [t,V], [t,W], as the papers have them."""
    kl = lambda a, b: (a * (a / b).log()).sum(1)  # noqa: E731
    if loss == "uld":
        size = max(p.shape[1], q.shape[1])
        p, q = (
            torch.nn.functional.pad(x.sort(1, descending=True).values, (0, size - x.shape[1]))
            for x in (p, q)
        )
        return (p - q).abs().sum(1)
    if loss == "jsd":
        m = beta * q + (1 - beta) * p
        return beta * kl(q, m) + (1 - beta) * kl(p, m)
    return kl(q, p) if loss == "kl" else kl(p, q)


def coarse(p: Tensor, ids: Tensor) -> Tensor:
    near = p.gather(1, ids)
    return torch.cat([near, 1 - near.sum(1, keepdim=True)], 1)


def coarse_ranks(p: Tensor) -> Tensor:
    near = p.sort(1, descending=True).values[:, :K]
    return torch.cat([near, 1 - near.sum(1, keepdim=True)], 1)


def truth(
    loss: str, beta: float, tau: float, short: bool, logits: Tensor, rows: VocabRows, head: Tensor
) -> Tensor:
    p, q = (logits / tau).softmax(1), (rows.extra["hidden"].double() @ head.t() / tau).softmax(1)
    if not short:
        return plain(loss, beta, p, q)
    if loss == "uld":
        return (coarse_ranks(p) - coarse_ranks(q)).abs().sum(1)
    return plain(loss, beta, coarse(p, rows.extra["ids"]), coarse(q, rows.extra["ids"]))


def score_of(loss: str, beta: float, tau: float, short: bool, head: Tensor) -> ScoreFn:
    if short:
        return top_k_divergence(loss, "ids", "log_probs", beta)
    return full_vocab_divergence(
        loss, lambda rows: rows.extra["hidden"].to(head.dtype) @ head.t() / tau, beta
    )


CASES = [("kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9), ("uld", 0.5)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups, tiles, chunks and blocks, none of them even."""
    monkeypatch.setattr(tiles, "GROUP_ROWS", 64)
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 64 * 64)
    monkeypatch.setattr(score, "CHUNK_TOKENS", 33)
    monkeypatch.setattr(divergence, "SORT_ROWS", 10)


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).detach().norm() / expected.detach().norm())


def measured(
    case: tuple[str, float],
    tau: float,
    short: bool,
    dtype: torch.dtype,
    model: Any,
    vocabulary: int = V,
) -> tuple[float, ...]:
    """Relative errors of values, of the hidden states' gradient and, where it trains, of the
    head's.
    """
    (batch, head), (loss, beta) = batch_for(tau, vocabulary), case
    hidden = draw(T, D, seed=2).to(dtype).requires_grad_()
    factors = draw(len(batch.rows), seed=6)
    got = score_supervised_tokens(
        model,
        hidden,
        batch,
        [score_of(loss, beta, tau, short, head.to(dtype))],
        AdapterContext(),
        tau,
    )[:, 0]
    ((0.2 * got.double()).tanh() * factors).sum().backward()

    wide, weight = (
        hidden.detach().double().requires_grad_(),
        model.head.weight.detach().double().requires_grad_(),
    )
    logits = wide[batch.rows - 1] @ weight.t()
    logits = logits if model.head.bias is None else logits + model.head.bias.detach().double()
    rows = VocabRows(
        batch.tokens[batch.rows], {n: e.values[batch.rows] for n, e in batch.extra.items()}
    )
    values = truth(loss, beta, tau, short, logits, rows, head)
    ((0.2 * values).tanh() * factors).sum().backward()
    assert hidden.grad is not None
    assert wide.grad is not None
    assert weight.grad is not None
    errors = distance(got, values), distance(hidden.grad, wide.grad)
    return (
        errors
        if model.head.weight.grad is None
        else (*errors, distance(model.head.weight.grad, weight.grad))
    )


@pytest.mark.parametrize("tau", [1.0, 1.2, 4.0])
@pytest.mark.parametrize("kind", ["frozen", "trained", "biased"])
@pytest.mark.parametrize("short", [False, True], ids=["whole", "top k"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: tuple[str, float], short: bool, kind: str, tau: float) -> None:
    model = Head(draw(V, D, seed=1) * 0.5, frozen=kind != "trained", bias=kind == "biased")
    assert max(measured(case, tau, short, torch.float64, model)) < 1e-9


@pytest.mark.parametrize("short", [False, True], ids=["whole", "top k"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)], ids=str
)
def test_narrow_numbers(
    case: tuple[str, float], short: bool, dtype: torch.dtype, allowed: float
) -> None:
    """uld's slope is made of signs: where bfloat16 takes two equal probabilities for unequal ones,
    it is a little off.
    """
    model = Head((draw(V, D, seed=1) * 0.5).to(dtype))
    assert max(measured(case, 1.2, short, dtype, model)) < (
        5 * allowed if case[0] == "uld" and dtype == torch.bfloat16 else allowed
    )


@pytest.mark.parametrize("vocabulary", [WIDER, 90], ids=["longer", "shorter"])
@pytest.mark.parametrize("short", [False, True], ids=["whole", "top k"])
@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float64, 1e-9), (torch.float32, 2e-5)], ids=str
)
def test_uld_takes_another_vocabulary(
    dtype: torch.dtype, allowed: float, short: bool, vocabulary: int
) -> None:
    assert (
        max(
            measured(
                ("uld", 0.5),
                1.2,
                short,
                dtype,
                Head((draw(V, D, seed=1) * 0.5).to(dtype)),
                vocabulary,
            )
        )
        < allowed
    )


def test_uld_by_hand() -> None:
    """p = (.1, .6, .3), q = (.5, .1, .1, .3): |.6-.5| + |.3-.3| + |.1-.1| + |0-.1| = .2, in any
    order of either.
    """
    for order in ([0, 1, 2], [2, 0, 1]):
        logits = torch.tensor([[0.1, 0.6, 0.3]])[:, order].log()
        teacher = torch.tensor([[0.5, 0.1, 0.1, 0.3]]).log()
        assert full_vocab_divergence("uld", lambda rows: teacher)(  # noqa: B023
            logits, VocabRows(torch.zeros(1), {})
        ).item() == pytest.approx(0.2, abs=1e-6)


@pytest.mark.parametrize("short", [False, True], ids=["whole", "top k"])
def test_jsd_ends_in_both_kls(short: bool) -> None:
    """TRL's convention: beta 0 is forward KL, 1 reverse; and near them the divergence over beta, or
    1 - beta, tends to these.
    """
    batch, head = batch_for(1.0)
    rows = VocabRows(
        batch.tokens[batch.rows], {n: e.values[batch.rows] for n, e in batch.extra.items()}
    )
    logits = draw(len(batch.rows), V, seed=9)

    def value(loss: str, beta: float = 0.5) -> Tensor:
        return score_of(loss, beta, 1.0, short, head)(logits, rows)

    assert torch.equal(value("jsd", 0.0), value("kl"))
    assert torch.equal(value("jsd", 1.0), value("reverse_kl"))
    assert torch.allclose(value("jsd", 1e-7) / 1e-7, value("kl"), rtol=1e-3)
    assert torch.allclose(value("jsd", 1 - 1e-7) / 1e-7, value("reverse_kl"), rtol=1e-3)
    assert torch.allclose(
        value("jsd", 0.3), plain("jsd", 0.7, *_swapped(logits, rows, head, short))
    )


def _swapped(logits: Tensor, rows: VocabRows, head: Tensor, short: bool) -> tuple[Tensor, Tensor]:
    p, q = logits.softmax(1), (rows.extra["hidden"] @ head.t()).softmax(1)
    return (coarse(q, rows.extra["ids"]), coarse(p, rows.extra["ids"])) if short else (q, p)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("short", [False, True], ids=["whole", "top k"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_student_that_is_its_teacher_is_at_rest(
    case: tuple[str, float], short: bool, dtype: torch.dtype
) -> None:
    loss, beta = case
    weight, hidden = (
        (draw(V, D, seed=1) * 0.5).to(dtype),
        draw(T, D, seed=2).to(dtype).requires_grad_(),
    )
    batch, tau = batch_for(1.5)[0], 1.5
    # at each target what the head reads one token before it
    seen = torch.cat([hidden.detach()[:1], hidden.detach()[:-1]])
    top = (
        ((seen / tau) @ weight.t())
        .to(torch.float64 if dtype == torch.float64 else torch.float32)
        .log_softmax(1)
        .topk(K)
    )
    extras = {"hidden": seen, "ids": top.indices, "log_probs": top.values}
    batch = batch.with_extra(**{n: BatchExtra(x, "token") for n, x in extras.items()})
    fn = (
        top_k_divergence(loss, "ids", "log_probs", beta)
        if short
        else full_vocab_divergence(
            loss, lambda rows: (rows.extra["hidden"] / tau) @ weight.t(), beta
        )
    )
    got = score_supervised_tokens(Head(weight), hidden, batch, [fn], AdapterContext(), tau)
    slope = torch.autograd.grad(got.sum(), hidden)[0]
    rounding = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    assert got.abs().max() < rounding
    assert slope.abs().max() < rounding


def test_top_k_is_a_lower_bound_and_all_tokens_are_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, head = batch_for(1.0)
    logits = draw(len(batch.rows), V, seed=9)
    full = (batch.extra["hidden"].values @ head.t()).log_softmax(1).topk(V - 1)
    rows = VocabRows(
        batch.tokens[batch.rows], {n: e.values[batch.rows] for n, e in batch.extra.items()}
    )
    every = VocabRows(
        rows.targets, {"ids": full.indices[batch.rows], "log_probs": full.values[batch.rows]}
    )
    p, q = (
        x.softmax(1).sort(1, descending=True).values
        for x in (logits, batch.extra["hidden"].values[batch.rows] @ head.t())
    )
    beyond = (p - q)[:, K:]
    of_one_sign = (beyond > 0).all(1) | (beyond < 0).all(1)
    for loss, beta in CASES:
        exact = score_of(loss, beta, 1.0, False, head)(logits, rows)
        bound = top_k_divergence(loss, "ids", "log_probs", beta)(logits, rows)
        below = bound < exact
        if loss == "uld":
            # |sum of the gaps| is the sum of |gap| where all are of one sign, as in a row of these draws:
            # rounding says there which of the two is less, another on each processor
            torch.testing.assert_close(bound[of_one_sign], exact[of_one_sign], rtol=0, atol=1e-12)
            assert int(of_one_sign.sum()) < len(below) // 2
            below = below[~of_one_sign]
        assert below.all()
        assert torch.allclose(
            top_k_divergence(loss, "ids", "log_probs", beta)(logits, every), exact
        )


def test_an_adapted_head_learns_from_its_teacher() -> None:
    """A LoRA on the head: scores by chunks, gradients of A and B against autograd of the plain
    formula.
    """
    from lorry.adapters.attach import attach, get_bank
    from lorry.adapters.spec import LoraSpec

    class Whole(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.lm_head = nn.Linear(D, V, bias=False)
            self.lm_head.weight = nn.Parameter(weight, requires_grad=False)

        @property
        def head(self) -> nn.Module:
            return self.lm_head

        def logits(self, hidden: Tensor, call: AdapterContext) -> Tensor:
            return self.lm_head(hidden, call)

    weight = draw(V, D, seed=1) * 0.5
    model = Whole(weight)
    attach(model, LoraSpec(r=3, target_modules=("lm_head",), init_lora_weights=False), "one")
    assert isinstance(model.head, BankLinear)
    slot = get_bank(model)["one"].slots["lm_head"]
    for case in CASES:
        batch, head = batch_for(2.0)
        hidden = draw(T, D, seed=2)
        fn = score_of(*case, 2.0, False, head)
        got = score_supervised_tokens(
            model, hidden, batch, [fn], AdapterContext(Mix.one("one")), 2.0
        )  # type: ignore[arg-type]
        ours = torch.autograd.grad(got.sum(), [slot.A, slot.B])
        A, B = slot.A.detach().double().requires_grad_(), slot.B.detach().double().requires_grad_()
        logits = hidden[batch.rows - 1] @ (weight + slot.scale * B @ A).t()
        rows = VocabRows(
            batch.tokens[batch.rows], {n: e.values[batch.rows] for n, e in batch.extra.items()}
        )
        theirs = torch.autograd.grad(truth(*case, 2.0, False, logits, rows, head).sum(), [A, B])
        # the masters are fp32
        assert max(distance(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-5


class Watch(TorchDispatchMode):
    """The largest tensor any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            self.largest = max(self.largest, x.numel() if isinstance(x, Tensor) else 0)
        return out


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("short", [False, True], ids=["whole", "top k"])
@pytest.mark.parametrize("loss", LOSSES)
def test_neither_side_ever_has_all_logits(loss: str, short: bool, frozen: bool) -> None:
    batch, head = batch_for(1.2)
    hidden, model = (
        draw(T, D, seed=2).float().requires_grad_(),
        Head(draw(V, D, seed=1).float(), frozen=frozen),
    )
    fn = score_of(loss, 0.5, 1.2, short, head.float())
    with Watch() as seen:
        score_supervised_tokens(model, hidden, batch, [fn], AdapterContext(), 1.2).sum().backward()
    assert seen.largest <= max(33 * V, V * WIDTH, 64 * 64) < len(batch.rows) * V


def test_ranks_are_those_of_a_stable_sort() -> None:
    """The one-integer sort of floats against numpy's, ties and zeros included."""
    p = draw(5, 97, seed=7).float().softmax(1)
    p[:, 10:20] = p[:, 30:40]
    p[0, :50] = 0.0
    values, places = divergence._rank_descending(p)
    order = np.argsort(-p.numpy(), axis=1, kind="stable")
    assert np.array_equal(places.numpy(), order)
    assert np.array_equal(values.numpy(), np.take_along_axis(p.numpy(), order, 1))


def test_a_score_says_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match="did you mean 'jsd'"):
        full_vocab_divergence("jsb", lambda rows: rows.targets)
    with pytest.raises(ConfigError, match=r"distill\.beta=1\.5"):
        top_k_divergence("jsd", "ids", "log_probs", 1.5)
    assert math.isfinite(
        float(
            full_vocab_divergence("kl", lambda rows: torch.zeros(1, 3))(
                torch.zeros(1, 3), VocabRows(torch.zeros(1), {})
            )
        )
    )
