"""What a step says in a log: the terms of its loss, and that the first of a warm-up moves nothing."""

from __future__ import annotations

from lorry.train.monitoring.events import format_step_figures

STEP = {"step": 1, "tokens": 100, "seconds": 2.0, "peak_memory_bytes": 2**30}


def test_terms_of_a_loss_stand_behind_the_sum() -> None:
    terms = {"loss_forget": 13.8629, "loss_retain": 0.1371, "loss_lambda": 50.0}
    line = format_step_figures({**STEP, "loss": 14.0, "learning_rate": 1e-4, **terms})
    assert line.startswith(
        "loss 14.0000 (forget 13.8629  retain 0.1371  lambda 50.0000)  lr 1.00e-04"
    )
    plain = format_step_figures({**STEP, "loss": 14.0, "learning_rate": 1e-4})
    assert plain == "loss 14.0000  lr 1.00e-04  50 tok/s  1.00 GiB"


def test_a_rate_of_zero_says_that_nothing_moves() -> None:
    line = format_step_figures({**STEP, "loss": 1.0, "learning_rate": 0.0})
    assert "lr 0 (warm-up: no weight moves yet)  50 tok/s" in line
