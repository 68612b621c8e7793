"""What a run asks of its adapters whenever it evaluates, besides the loss of held-out rows: things
that give numbers by name, whatever they are.

`train/engine.py` knows `RunEvaluation` alone. A task's own numbers and named sets are a `Measure`; a
suite of unlearning (`suites.py`) also writes files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lorry.config import RunConfig
from lorry.errors import ConfigError
from lorry.notes import NoteCallback


class RunEvaluation(Protocol):
    """``at_end``: an adapter is evaluated at its last step whatever `eval_steps` divides;
    ``digests``: of what the numbers hang on, for the run's identity.
    """

    @property
    def at_end(self) -> bool: ...

    @property
    def digests(self) -> Mapping[str, str]: ...

    def measure(self, adapter: str, step: int) -> Mapping[str, float]:
        """{eval_NAME: value} of an adapter (of base weights that train, under their job's name) as it
        is after ``step``. Must leave what training goes on with as it is: no gradient, no random
        state.
        """
        ...

    def conclude(self, adapter: str, step: int) -> None:
        """The run is over and the adapter is that of ``step``."""
        ...


@dataclass(frozen=True)
class Measure:
    """A function of an adapter's name."""

    function: Callable[[str], Mapping[str, float]]
    at_end: bool = False
    digests: Mapping[str, str] = field(default_factory=dict)

    def measure(self, adapter: str, step: int) -> Mapping[str, float]:
        """What the function says now."""
        return self.function(adapter)

    def conclude(self, adapter: str, step: int) -> None:
        """It keeps nothing."""


def join_measures(*measures: Mapping[str, float]) -> dict[str, float]:
    """All numbers of an evaluation. Raises ConfigError where two have one name."""
    joined = dict[str, float]()
    for values in measures:
        # a set of one's own may be called like a metric of a suite; one would hide the other
        if doubled := joined.keys() & values.keys():
            raise ConfigError(
                f"two evaluations of this run both compute {min(doubled)}; leave one of them out"
            )
        joined |= values
    return joined


def default_best_metric(
    run: RunConfig, metrics: Sequence[str], add_note: NoteCallback
) -> RunConfig:
    """Where nothing is held out for a loss and nothing else is given, the best step is that of the
    first of these ``metrics``, of which more is better.
    """
    # a task that has set a metric of its own has no eval_loss here
    if not metrics or run.data.evaluates or run.train.metric_for_best_model != "eval_loss":
        return run
    add_note(f"there is no evaluation loss, so the best step is that of the highest {metrics[0]}")
    best = {"metric_for_best_model": metrics[0], "greater_is_better": True}
    return run.model_copy(update={"train": run.train.model_copy(update=best)})
