"""What benchmarks/rank_choice.py says of figures that are known: a budget that was passed, a next rank that would have
fitted, ranks that learn less than the best."""

from __future__ import annotations

from typing import Any

import rank_choice

MIB = 2**20


def row(**changes: Any) -> dict[str, Any]:
    found = {"case": rank_choice.CASES[1].name, "budget": 100 * MIB, "planned": 99 * MIB, "peak": 90 * MIB, "rank": 8,
             "rows": 1, "accumulation": 8, "recompute": "full",
             "next": {"rank": 12, "total": 101 * MIB}}  # fmt: skip
    return {**found, **changes}


def test_a_budget_that_was_passed_and_a_rank_that_would_have_fitted_are_told() -> None:
    assert rank_choice.over(row()) is None
    assert rank_choice.over(row(next=None)) is None
    wrong = rank_choice.over(row(peak=101 * MIB))
    assert wrong is not None
    assert "101 MiB were taken of 100" in wrong
    fits = rank_choice.over(row(next={"rank": 12, "total": 100 * MIB}))
    assert fits is not None
    assert "r=12 would have fitted" in fits


def test_the_table_counts_them_and_names_what_was_not_run() -> None:
    told = rank_choice.memory_record([row(), row(peak=101 * MIB)])
    assert "1 of 2 configurations stay" in told["text"]
    assert "(they fill 90% to 90% of it)" in told["text"]
    assert f"; {row()['case']} takes 101.00% of it" in told["text"]
    assert rank_choice.CASES[0].name in told["text"]
    assert rank_choice.CASES[1].name not in told["text"].partition("Not run")[2]
    assert {len(cells) for cells in told["rows"]} == {len(told["columns"])}


def test_chosen_ranks_are_compared_with_the_best_of_the_sweep() -> None:
    tokens = [10 + n % 3 for n in range(20)]

    def job(loss: float) -> dict[str, Any]:
        # rows differ, the same in every job
        each = [((loss + n % 5 / 10) * count, count) for n, count in enumerate(tokens)]
        return {"losses": each, "ranks": [1, 8], "values": 100}

    sweep = {"r1": job(2.0), "r4": job(1.5), "r16": job(1.6), "r64": job(1.7)}
    near = rank_choice.compare({**sweep, "rauto": job(1.51)})
    assert near["best"] == "r4"
    assert near["within"]
    # row by row all are 0.01 apart
    assert max(abs(edge - 0.01) for edge in (near["apart"], *near["apart_interval"])) < 1e-9
    far = rank_choice.compare({**sweep, "rauto": job(1.9)})
    assert not far["within"]
    level = rank_choice.compare({**sweep, "rauto": job(1.5)})
    told = rank_choice.rows_record({"gsm8k": near, "common_gen": far, "truthfulqa": level})
    assert "In 2 of 3 tasks" in told["text"]
    assert "Row by row they are above it on gsm8k, common_gen." in told["text"]
