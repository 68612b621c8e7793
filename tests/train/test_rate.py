"""What is measured of this machine, with times that are given: nothing here hangs on how fast or
busy a machine is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorry.config.schema.job import JobConfig
from lorry.models.loading.open import open_model
from lorry.plan import machine, rates
from lorry.train.resources import rate
from lorry.train.resources.rate import (
    CpuWaitTime,
    StepTimes,
    best_product_rate,
    measure_matrix_rate,
    record_step_rate,
    tokens_per_second,
)
from lorry.train.session import planned_run_of, train_run
from tests.support.tinyrun import described, model_directory, quick, rows, write_rows

__all__ = ["quick"]


def products(*seconds: float) -> Callable[[int, int], Callable[[], float]]:
    """Products that take these seconds one after the other, the last one from then on, whatever
    their size.
    """
    left = list(seconds)
    return lambda rows, side: lambda: left.pop(0) if len(left) > 1 else left[0]


def test_the_best_of_many_short_products_counts() -> None:
    """One in forty falls between two turns of somebody else; by the mean the machine would be
    eleven times slower.
    """
    found = best_product_rate(products(0.09, *[0.05] * 20, 0.004, 0.05), lambda: 0.8)
    assert found.rate == pytest.approx(2 * 128 * 1024**2 / 0.004)
    assert (found.busy, found.waited) == (True, 0.8)
    assert 25 < found.repeats <= rate.MAX_REPEATS
    assert best_product_rate(products(0.05), lambda: None).busy is False


def test_products_grow_until_the_clock_can_tell() -> None:
    asked = list[tuple[int, int]]()

    def product(rows: int, side: int) -> Callable[[], float]:
        asked.append((rows, side))
        return lambda: 2 * rows * side**2 / 1e12

    assert best_product_rate(product, lambda: 0.0).rate == pytest.approx(1e12)
    assert asked == [(128, 1024), (512, 2048)]


def test_the_matrix_rate_is_a_rate() -> None:
    found = measure_matrix_rate("cpu", "float32", 1)
    assert found is not None
    assert 1e6 < found.rate < 1e15
    assert torch.cuda.is_available() or measure_matrix_rate("cuda", "bfloat16", 1) is None


def test_waiting_for_a_core_is_read_from_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate, "SCHEDSTAT_PATH", tmp_path / "schedstat")
    assert CpuWaitTime().share() is None
    (tmp_path / "schedstat").write_text("1000 500 7\n")
    waiting = CpuWaitTime()
    assert waiting.share() == 0
    (tmp_path / "schedstat").write_text("2000 3500 9\n")
    assert waiting.share() == 0.75


def test_the_faster_half_of_enough_steps_counts() -> None:
    warm, steps = [(100, 60.0)] * 2, [(100, 1.0), (300, 2.0)] * 4 + [(100, 50.0)] * 8
    assert tokens_per_second(warm + steps) == (pytest.approx(1600 / 12), 16)
    assert tokens_per_second(warm + steps[:7]) is None
    assert tokens_per_second(warm + [(100, 0.01)] * 90) is None
    assert tokens_per_second([]) is None


# --- a run corrects the plan


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORRY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("base") / "model")


def finished(
    base: Path, tmp_path: Path, *, steps: int = 12, seconds: float = 2.0, **settings: Any
) -> tuple[Any, Any, StepTimes]:
    """A run that made some steps of 96 tokens, its opened model, and their times."""
    run = described(
        base, write_rows(tmp_path / "rows.jsonl", rows(9)), tmp_path / "run", **settings
    )
    times = StepTimes()
    for _ in range(steps):
        times.step({"tokens": 96, "seconds": seconds})
    times.waited = 0.0
    opened = open_model(run.model, print)
    return planned_run_of(run, opened), opened, times


def test_steps_of_a_run_become_a_rate(base: Path, tmp_path: Path, home: Path) -> None:
    run, opened, times = finished(base, tmp_path)
    assert record_step_rate(times, run, opened.model, 1) == ""
    (kept,) = rates.read_known_rates(machine.machine_identity("cpu", "float32", 1)).runs
    g = opened.model.geometry
    linears = [p for n, p in opened.model.named_parameters() if p.dim() == 2 and "layers" in n]
    n = sum(p.numel() for p in linears) + g.vocab * g.width
    attention = 7 * g.layers * g.heads * g.head_dim * 32  # 3 rows of 32 tokens a step
    values = 2 * sum(p.shape[0] + p.shape[1] for p in linears)  # of an adapter of rank 2
    assert kept.rate == pytest.approx(48 * (4 * n + attention + 6 * values))
    assert (kept.repeats, kept.tokens, kept.path, kept.waited) == (10, 96, "fused", 0.0)
    assert kept.model == str(base)


@pytest.mark.parametrize("settings", [{"steps": 5}, {"seconds": 0.001}])
def test_what_the_plan_does_not_count_is_not_kept(
    settings: dict[str, Any], base: Path, tmp_path: Path, home: Path
) -> None:
    run, opened, times = finished(base, tmp_path, **settings)
    assert record_step_rate(times, run, opened.model, 1) == ""
    assert not (home / "rates.json").exists()


def test_runs_that_the_plan_does_not_count_have_no_rate(base: Path, tmp_path: Path) -> None:
    run = described(base, write_rows(tmp_path / "rows.jsonl", rows(9)), tmp_path / "run")
    opened = open_model(run.model, print)
    assert planned_run_of(run, opened) is not None
    for other in ({"lora": None}, {"jobs": [JobConfig(name="a")]}, {"task": "distill"}):
        assert planned_run_of(run.model_copy(update=other), opened) is None


def test_a_rate_that_cannot_be_kept_is_a_note(
    base: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, opened, times = finished(base, tmp_path)
    (tmp_path / "file").write_text("a file where the directory should be")
    monkeypatch.setenv("LORRY_HOME", str(tmp_path / "file"))
    note = record_step_rate(times, run, opened.model, 1)
    assert note.startswith("the measured speed is not saved for `lorry plan`: ")


def test_every_run_hands_on_its_steps(
    base: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[list[tuple[int, float]]]()

    def keep(times: StepTimes, *_: Any) -> str:
        seen.append(times.steps)
        return "a note"

    monkeypatch.setattr("lorry.train.session.record_step_rate", keep)
    train_run(
        described(
            base, write_rows(tmp_path / "rows.jsonl", rows(9)), tmp_path / "run", max_steps=2
        ),
        [],
    )
    ((one, two),) = seen
    assert min(*one, *two) > 0
