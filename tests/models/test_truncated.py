"""What is kept of a teacher against the whole softmax in float64: masses at any temperature, and
divergences.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorry.errors import ConfigError
from lorry.models.scoring import truncated
from lorry.models.scoring.divergence import top_k_divergence
from lorry.models.scoring.score import VocabRows
from lorry.models.scoring.truncated import TruncatedDistribution

V = 4000


def logits_like_a_model(t: int, seed: int) -> Tensor:
    """A few likely tokens over a long tail, some rows sure and some not, [t, V] fp32."""
    draw = torch.Generator().manual_seed(seed)
    sharp = torch.linspace(0.5, 3.0, t)[:, None]
    peaks = torch.zeros(t, V).scatter_(1, torch.randint(0, V, (t, 6), generator=draw), 6.0)
    return (torch.randn(t, V, generator=draw) * 1.5 + peaks) * sharp


@pytest.mark.parametrize("tau", [0.5, 0.7, 1.0, 1.2, 2.0, 3.3, 8.0])
@pytest.mark.parametrize("k", [8, 64])
def test_any_temperature_from_one_record(k: int, tau: float) -> None:
    logits = logits_like_a_model(40, 0)
    kept = TruncatedDistribution.of(logits, k)
    exact = (logits.double() / tau).log_softmax(1).gather(1, kept.ids.long())
    got = kept.log_probs(tau)
    assert (got.exp().sum(1) - exact.exp().sum(1)).abs().max() < 5e-4
    assert ((got - exact).abs() * exact.exp()).sum(1).max() < 2e-3  # log-probabilities in fp16


@pytest.mark.parametrize("tau", [0.8, 1.0, 1.2, 4.0])
@pytest.mark.parametrize(
    ("loss", "beta"), [("kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("uld", 0.5)]
)
def test_divergences_lose_less_than_a_thousandth(loss: str, beta: float, tau: float) -> None:
    """nats, against the same k tokens of the teacher in float64, for students near the teacher and
    far from it.
    """
    logits = logits_like_a_model(40, 1)
    kept = TruncatedDistribution.of(logits, 64)
    exact = (logits.double() / tau).log_softmax(1).gather(1, kept.ids.long())
    for noise in (0.1, 1.0):
        student = (
            logits + noise * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
        ).double() / tau
        fn = top_k_divergence(loss, "ids", "log_probs", beta)
        got, expected = (
            fn(
                student,
                VocabRows(
                    torch.zeros(40, dtype=torch.int64),
                    {"ids": kept.ids.long(), "log_probs": values.double()},
                ),
            )
            for values in (kept.log_probs(tau), exact)
        )
        assert (got - expected).abs().max() < 1e-3


def test_bytes_per_token() -> None:
    kept = TruncatedDistribution.of(logits_like_a_model(3, 0), 64)
    sizes = {name: x.element_size() * x.shape[1] for name, x in vars(kept).items()}
    assert sizes == {"ids": 256, "logp": 128, "rest": 48}


def test_fewer_nodes_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound above is one that can be missed."""
    monkeypatch.setattr(truncated, "NODE_COUNT", 4)
    logits = logits_like_a_model(40, 0)
    kept = TruncatedDistribution.of(logits, 8)
    exact = (logits.double() / 1.2).log_softmax(1).gather(1, kept.ids.long())
    assert (kept.log_probs(1.2).exp().sum(1) - exact.exp().sum(1)).abs().max() > 5e-4


@given(st.floats(0.5, 8.0), st.integers(0, 100), st.integers(1, 12))
def test_always_a_distribution(tau: float, seed: int, k: int) -> None:
    kept = TruncatedDistribution.of(
        torch.randn(4, 13, generator=torch.Generator().manual_seed(seed)) * 4, k
    )
    got = kept.log_probs(tau)
    assert got.isfinite().all()
    assert (got.exp().sum(1) < 1 + 1e-6).all()
    assert (got.diff(dim=1) <= 1e-3).all()  # likeliest first


def test_no_more_than_all_but_one_and_no_other_temperature() -> None:
    kept = TruncatedDistribution.of(torch.randn(2, 5), 64)
    assert kept.ids.shape == (2, 4)
    with pytest.raises(ConfigError, match="leave out distill"):
        kept.log_probs(9.0)
