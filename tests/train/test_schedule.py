"""The schedule against transformers' own, bit for bit, and its edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments, get_scheduler

from lorry.errors import ConfigError
from lorry.train.schedule import SCHEDULE_SHAPES, learning_rate_at, warmup_steps


def theirs(kind: str, total: int, base: float, warmup: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=base)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("kind", sorted(SCHEDULE_SHAPES))
@pytest.mark.parametrize(
    ("total", "warmup"), [(1, 0), (1, 1), (7, 0), (97, 3), (100, 10), (30, 30), (20, 50)]
)
def test_every_step_equals_transformers(kind: str, total: int, warmup: int) -> None:
    warmup = 0 if kind == "constant" else warmup
    ours = [learning_rate_at(i, total, kind=kind, base=3e-4, warmup=warmup) for i in range(total)]
    assert ours == theirs(kind, total, 3e-4, warmup)


def test_counting_from_zero() -> None:
    """The documented off-by-one: the first update has rate 0, update warmup+1 the whole, the last
    not quite 0.
    """
    rates = [learning_rate_at(i, 10, kind="linear", base=1.0, warmup=2) for i in range(11)]
    assert rates == [0.0, 0.5, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0.0]


@given(
    st.sampled_from(sorted(SCHEDULE_SHAPES)),
    st.integers(0, 10**7),
    st.integers(1, 10**7),
    st.floats(1e-8, 10.0),
    st.integers(0, 10**6),
)
def test_never_negative_nor_above_base(
    kind: str, step: int, total: int, base: float, warmup: int
) -> None:
    assert (
        0.0
        <= learning_rate_at(
            step, total, kind=kind, base=base, warmup=0 if kind == "constant" else warmup
        )
        <= base
    )


@pytest.mark.parametrize(
    ("total", "ratio"), [(0, 0.5), (100, 0.03), (101, 0.03), (10, 0.0), (7, 0.99)]
)
def test_warmup_steps_equal_transformers(total: int, ratio: float) -> None:
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, warmup_steps=ratio)
    assert warmup_steps(total, ratio) == arguments.get_warmup_steps(total)


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(
        ConfigError, match=r"'cosin' is unknown.*constant_with_warmup.*did you mean 'cosine'"
    ):
        learning_rate_at(0, 1, kind="cosin", base=1.0)
    with pytest.raises(ConfigError, match="constant_with_warmup"):
        learning_rate_at(0, 1, kind="constant", base=1.0, warmup=3)
    with pytest.raises(ValueError, match="count from 0"):
        learning_rate_at(-1, 1, kind="linear", base=1.0)
    with pytest.raises(ConfigError, match="warmup_ratio=3"):
        warmup_steps(100, 3)
