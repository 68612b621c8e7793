"""What benchmarks/plan.py takes for lasting and for passing memory, whatever trains on however many processes."""

from __future__ import annotations

import plan
import pytest

CASES = (
    plan.Case(plan.REAL, 16, 64),
    plan.Case(plan.REAL, 0, 64),
    plan.Case(plan.REAL, 0, 64, dtype="float32", backend="ddp"),
    plan.Case(plan.REAL, 0, 64, backend="fsdp"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_planned_lasts_or_passes(case: plan.Case) -> None:
    """It was a KeyError where no adapter trains, after the first case had been measured."""
    planned = plan.predict(case)
    parts = planned["components"]
    assert {"margin", "workspace", "allocator"} < parts.keys()
    passing = parts["workspace"] + parts["allocator"]
    assert plan.lasting_bytes(parts) + passing == planned["predicted"]
