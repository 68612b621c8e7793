"""What benchmarks/initializations.py says of seconds that are known, and that it asks of every start that is made
from the base or from rows."""

from __future__ import annotations

import initializations
import pytest

from lorry.config.adapter.initialization import INITIALIZATIONS, find_initialization


def test_every_start_that_reads_something_is_measured() -> None:
    reading = {name for name, way in INITIALIZATIONS.items() if way.reads != "nothing"}
    assert reading <= initializations.WAYS.keys()
    for way in initializations.WAYS:
        assert find_initialization(way) is not None


@pytest.mark.parametrize("seconds", [9.9, 10.1])
def test_the_least_of_several_runs_is_held_against_the_target(seconds: float) -> None:
    runs = {
        "pissa": [{"seconds": 61.0, "first_loss": 5.0}, {"seconds": 59.0, "first_loss": 5.0}],
        "pissa_niter_16": [{"seconds": seconds, "first_loss": 5.01}],
    }
    told = initializations.table(runs, 1.0)
    assert [line[-1] for line in told["rows"]] == ["yes", "yes" if seconds < 10 else "no"]
    assert ("Over its target: pissa_niter_16." in told["text"]) == (seconds > 10)


def test_a_start_whose_model_is_not_its_base_is_told() -> None:
    runs = {
        "pissa": [{"seconds": 1.0, "first_loss": 5.0}],
        "olora": [{"seconds": 1.0, "first_loss": 5.5}],
        # of another base
        "loftq": [{"seconds": 1.0, "first_loss": 7.0}],
    }
    assert initializations.begun_elsewhere(runs) == {"olora": 5.5}
    assert "olora begins with a loss of 5.5" in initializations.table(runs, 1.0)["text"]
