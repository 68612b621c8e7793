"""What a sweep is said to have found, from rows made by hand; intervals against scipy's own tests."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lorry.report.html import render_page
from lorry.report.plots import render_panel_png
from lorry.report.sweep import Combination, combine_seeds, rate_panel, sweep_advice
from lorry.report.sweep_sections import sweep_section
from lorry.runs.read import RunRecord, read_run
from tests.support.runs import full


def row(rank: int, rate: float, seed: int, loss: float | None) -> dict[str, Any]:
    settings = {"lora.r": rank, "train.learning_rate": rate, "train.seed": seed}
    return {
        "name": f"r{rank}-lr{rate:g}-seed{seed}",
        "path": f"runs/{rank}-{rate:g}-{seed}",
        "settings": settings,
        "parameters": 1000 * rank,
        "eval_loss": loss,
    }


def combination(losses: Sequence[float], **settings: Any) -> Combination:
    return Combination("one", settings, losses, 8, "runs/one")


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=6))
def test_the_interval_is_students(losses: list[float]) -> None:
    one = combination(losses)
    low, high = stats.t.interval(
        0.95, len(losses) - 1, loc=one.mean, scale=max(stats.sem(losses), 1e-30)
    )
    assert one.half_width == pytest.approx((high - low) / 2, rel=1e-6, abs=1e-9)


def test_of_what_cannot_be_told_apart_the_smallest_is_taken() -> None:
    losses = {
        (4, 1e-3): (1.02, 0.98, 1.00),
        (16, 1e-3): (0.99, 0.97, 1.01),
        (4, 1e-4): (2, 2.01, 2),
    }
    rows = [row(*key, seed, loss) for key, each in losses.items() for seed, loss in enumerate(each)]
    # Welch's test of scipy tells the first two apart at 5% as little as ours
    assert stats.ttest_ind(losses[4, 1e-3], losses[16, 1e-3], equal_var=False).pvalue > 0.05
    ranked = combine_seeds(rows, "eval_loss")
    assert [one.name for one in ranked] == ["r16-lr0.001", "r4-lr0.001", "r4-lr0.0001"]
    assert [one.path for one in ranked] == ["runs/16-0.001-1", "runs/4-0.001-1", "runs/4-0.0001-0"]
    first, *rest = sweep_advice(ranked, held_out=True)
    assert first.startswith("take r4-lr0.001: its loss 1 +- 0.04968 cannot be told from the best")
    assert "(4,000 against 16,000)" in first
    assert len(rest) == 1
    assert "learning_rate=0.001, the best, is the highest that was tried" in rest[0]


def test_a_clear_winner_in_the_middle_of_the_grid_is_one_sentence() -> None:
    rows = [
        row(4, rate, seed, loss + 0.001 * seed)
        for rate, loss in [(1e-4, 2.0), (1e-3, 1.0), (1e-2, 3.0)]
        for seed in range(2)
    ]
    (line,) = sweep_advice(combine_seeds(rows, "eval_loss"), held_out=True)
    assert line.startswith("take r4-lr0.001: loss 1 +- 0.006353 over 2 seeds")


def test_ranks_at_one_scale_are_said_to_want_rates_of_their_own() -> None:
    def said(alphas: dict[int, float | None]) -> list[str]:
        ranked = [
            combination([1.0, 1.1], **{"lora.r": r, "lora.lora_alpha": alpha})
            for r, alpha in alphas.items()
        ]
        return [line for line in sweep_advice(ranked, held_out=True) if "lora_alpha" in line]

    (line,) = said({4: 8, 16: 32})
    assert line.startswith(
        "lora_alpha is 2 x r here, so that the best rate falls as the rank grows"
    )
    assert said({4: 32, 16: 32}) == said({16: 32}) == said({4: None, 16: 32}) == []


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_a_loss_that_is_none_is_last_and_never_taken(loss: float | None) -> None:
    rows = [row(4, 1e-2, 0, loss), row(8, 1e-4, 0, 5.0)]
    ranked = combine_seeds(rows, "eval_loss")
    assert ranked[0].name == "r8-lr0.0001"
    lines = sweep_advice(ranked, held_out=False)
    assert lines[0] == "take r8-lr0.0001: loss 5"
    assert "try 3e-05 too" in lines[1]
    assert "one seed each" in lines[2]
    assert "nothing was held out" in lines[3]
    assert sweep_advice(combine_seeds(rows[:1], "eval_loss"), held_out=True) == [
        "no combination ended with a finite loss; lower learning_rate"
    ]


def test_a_curve_for_each_rank_over_the_rates() -> None:
    rows = [
        row(rank, rate, seed, rank * rate + seed)
        for rank in (4, 8)
        for rate in (1e-4, 1e-3)
        for seed in range(2)
    ]
    panel = rate_panel(combine_seeds(rows, "eval_loss"), held_out=True)
    assert panel is not None
    lines = {one.label: one for one in panel.series if one.kind == "line"}
    assert set(lines) == {"r 4", "r 8"}
    assert list(lines["r 8"].steps) == [1e-4, 1e-3]
    assert list(lines["r 8"].values) == pytest.approx([0.5008, 0.508])
    bars = [one for one in panel.series if one.kind == "guide" and one.label == "r 8"]
    assert [list(one.steps) for one in bars] == [[1e-4, 1e-4], [1e-3, 1e-3]]
    assert max(bars[1].values) == pytest.approx(0.508 + 12.706 * 0.5, rel=1e-3)
    assert render_panel_png(panel).startswith(b"\x89PNG")
    assert rate_panel(combine_seeds(rows[:2], "eval_loss"), held_out=True) is None


def swept_run(folder: Path, jobs: Sequence[str], document: object) -> RunRecord:
    """A run of some jobs, and a sweep.json above its directory."""
    run = full(folder / "pass-1")
    settings = yaml.safe_load((run / "run.yaml").read_text())
    described = {**settings, "jobs": [{"name": name} for name in jobs]}
    (run / "run.yaml").write_text(yaml.safe_dump(described))
    (folder / "sweep.json").write_text(json.dumps(document))
    return read_run(run)


def test_a_page_shows_the_sweep_that_its_run_is_a_pass_of(tmp_path: Path) -> None:
    rows = [row(r, rate, 0, r * rate) for r in (4, 8) for rate in (1e-4, 1e-3)]
    document = {"jobs": rows, "advice": ["take <r4>: loss 0.0004"]}
    run = swept_run(tmp_path, ["r4-lr0.0001-seed0"], document)
    page = sweep_section([run, run])
    assert page is not None
    assert page.count("take &lt;r4&gt;: loss 0.0004") == 1  # one sweep, however many of its passes
    assert "Held-out loss by learning rate" in page
    places = [page.index(f">r{r}-lr{rate}</th>") for r, rate in
              ((4, 0.0001), (8, 0.0001), (4, 0.001), (8, 0.001))]  # fmt: skip
    assert places == sorted(places)
    assert "<td>r 4, learning_rate 0.0001</td>" in page
    assert 'id="sweep"' in render_page([run])
    # a run beside which a sweep of others lies is no pass of it
    assert sweep_section([swept_run(tmp_path, ["other"], document)]) is None
    # nor has a run without one a section
    assert sweep_section([read_run(full(tmp_path / "x" / "y" / "z"))]) is None


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ([], "expected an object, got list"),
        ({"jobs": []}, "jobs have to be a list of some"),
        ({"jobs": [row(4, 1e-3, 0, 1.0)], "advice": [3]}, "advice a list of texts"),
        ({"jobs": [{**row(4, 1e-3, 0, 1.0), "eval_loss": "low"}]}, "job 1 lacks"),
        ({"jobs": [row(4, -1.0, 0, 1.0)]}, "job 1 lacks"),
    ],
)
def test_a_damaged_sweep_is_said_on_the_page_of_its_run(
    document: object, why: str, tmp_path: Path
) -> None:
    page = sweep_section([swept_run(tmp_path, ["a"], document)])
    assert page is not None
    assert why in page
