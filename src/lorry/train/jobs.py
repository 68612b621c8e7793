"""The jobs of a run: one adapter each, with a schedule, epochs and an end of its own. A run of one
adapter is one job.

What `engine.py` asks of a job: its rate at a step, whether it is due to be evaluated, where it
stands, how it ended.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from lorry.backends.protocol import Task
from lorry.config.schema.train import TrainConfig
from lorry.data.batch import Batch
from lorry.errors import ConfigError, ModelError
from lorry.tasks.build import USABLE
from lorry.train.schedule import learning_rate_at, warmup_steps


@dataclass(frozen=True)
class TrainingJob:
    """One adapter's part of a run. ``total``: its optimizer steps; ``epoch_of(step)``: the epoch a
    step belongs to, from 0; ``ends``: token ids of which one must be supervised in each of its
    sequences (none: any text will do); ``beside``: other parameter sets that its sequences train,
    with their settings: they step when it does, at its schedule.
    """

    name: str
    train: TrainConfig
    total: int
    epoch_of: Callable[[int], int]
    steps_per_epoch: int | None
    ends: Sequence[int] = ()
    beside: Mapping[str, TrainConfig] = field(default_factory=dict)

    @property
    def trained_names(self) -> list[str]:
        """Its own parameter set, then those beside it."""
        return [self.name, *self.beside]

    @property
    def warmup(self) -> int:
        """Steps of rising rate. A share is rounded up, as transformers does, but may not take a
        run's only step.
        """
        if self.train.warmup_epochs and self.steps_per_epoch:
            # whole steps, rounded down, as open-unlearning counts them
            return int(self.train.warmup_epochs * self.steps_per_epoch)
        # rounded up, a small ratio of one step is that step: it would have rate 0 and learn nothing
        share = min(warmup_steps(self.total, self.train.warmup_ratio), max(self.total - 1, 0))
        return self.train.warmup_steps or share

    def warmup_note(self) -> str:
        """What a person should know of a warm-up that is all of the run, or more; an empty string
        otherwise.
        """
        if self.warmup < self.total or not (self.train.warmup_steps or self.train.warmup_epochs):
            return ""
        highest = self.rate(self.total - 1)
        return (
            f"{self.name}: {self.warmup} of {self.total} steps are warmup: the "
            "learning rate never reaches "
            f"learning_rate={self.train.learning_rate:g}, its highest is "
            f"{highest:.2g}"
        )

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self._rate_of(self.train, step)

    def rates(self, step: int) -> dict[str, float]:
        """That of each of `trained_names`."""
        each = {self.name: self.train, **self.beside}
        return {name: self._rate_of(train, step) for name, train in each.items()}

    def _rate_of(self, t: TrainConfig, step: int) -> float:
        return learning_rate_at(
            step, self.total, kind=t.lr_scheduler_type, base=t.learning_rate, warmup=self.warmup
        )

    def epochs(self, steps: int) -> float:
        """Passes over the data after so many steps; whole ones where nobody knows how long a pass
        is.
        """
        return steps / self.steps_per_epoch if self.steps_per_epoch else self.epoch_of(steps)

    def due(self, strategy: str | None, every: int | None, steps: int, epoch: int) -> bool:
        """Whether something that comes every few steps or every epoch comes now, after the last
        step of ``epoch`` so far.
        """
        if strategy == "steps":
            return bool(every) and steps % int(every or 1) == 0
        # epoch_of(steps) is of the step to come: larger than the last one's, a pass is over
        if strategy == "epoch":
            return steps == self.total or self.epoch_of(steps) > epoch
        return False


StepCount = Annotated[int, Field(ge=0)]


@dataclass
class JobProgress:
    """Where a job stands. ``steps``: those it has made; ``loss``: of the last of them."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    steps: StepCount = 0
    loss: float | None = None
    best: float | None = None
    best_step: StepCount | None = None
    waited: StepCount = 0
    stopped_early: bool = False

    def judge(self, evaluation: Mapping[str, float], train: TrainConfig) -> bool:
        """Take an evaluation into account. Returns whether it is the best so far, or the latest that
        is `USABLE`. Raises ConfigError for an unknown metric.
        """
        name = train.metric_for_best_model
        name = name if name.startswith("eval_") else f"eval_{name}"
        if name not in evaluation:
            raise ConfigError(
                f"train.metric_for_best_model is {name!r}; evaluation gives {', '.join(evaluation)}"
            )
        value = evaluation[name]
        # strictly ahead: of equal values the earlier step stays, as in transformers
        is_ahead = self.best is None or (
            value > self.best if train.greater_is_better else value < self.best
        )
        # infinity is "greater" than anything, and a first NaN would never be beaten
        is_best = is_ahead and math.isfinite(value)
        if USABLE in evaluation:
            is_best = evaluation[USABLE] > 0
        if is_best:
            self.best, self.best_step, self.waited = value, self.steps, 0
        elif USABLE in evaluation:
            self.stopped_early = True
        else:
            self.waited += 1
            patience = train.early_stopping_patience
            self.stopped_early = patience is not None and self.waited >= patience
        return is_best


@dataclass
class RunProgress:
    """Where a run stands; with the backend's and the task's state, all of it."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: StepCount = 0
    jobs: dict[str, JobProgress] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return {
            "step": self.step,
            "jobs": {name: vars(standing) for name, standing in self.jobs.items()},
        }

    @classmethod
    def of(cls, state: object, jobs: Mapping[str, TrainingJob], step: int) -> RunProgress:
        """Take back what `state` gave, in a checkpoint of ``step`` of a run of ``jobs``. Raises
        ModelError for what no such run could have written: another step, more steps than there are,
        other jobs, a value of another kind.
        """
        # anybody can make a file with a digest that fits: each value is looked at
        progress: RunProgress = validate_strict(_RUN_PROGRESS_ADAPTER, "progress", state)
        total = max(job.total for job in jobs.values())
        if progress.step != step:
            raise ModelError(f"progress.step is {progress.step} in a checkpoint of step {step}")
        if progress.step > total:
            raise ModelError(f"progress.step is {progress.step}, and the run has {total} steps")
        if progress.jobs.keys() != jobs.keys():
            raise ModelError(
                f"progress.jobs are {', '.join(progress.jobs) or 'none'}; the run's are {', '.join(jobs)}"
            )
        for name, standing in progress.jobs.items():
            # a job may have ended before the run's step, never after it
            if standing.steps > min(progress.step, jobs[name].total):
                raise ModelError(
                    f"progress.jobs.{name}.steps is {standing.steps} at step {progress.step} of {jobs[name].total}"
                )
            # both or neither, of a step that was made: its checkpoint is loaded at the end
            if (standing.best_step is None) != (standing.best is None) or (
                standing.best_step or 0
            ) > standing.steps:
                raise ModelError(
                    f"progress.jobs.{name}.best_step is {standing.best_step} of {standing.steps} steps"
                )
        return progress


_RUN_PROGRESS_ADAPTER = TypeAdapter(RunProgress)


def validate_strict(kind: TypeAdapter[Any], what: str, state: object) -> Any:
    """A part of a checkpoint's meta as exactly the kind of value that was written. Raises
    ModelError naming the field.
    """
    try:
        # strict and through JSON: pydantic would otherwise take "3", 3.0 or true for a step count
        return kind.validate_json(json.dumps(state), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in (what, *first["loc"]))
        raise ModelError(f"{field} is not valid in a checkpoint ({first['msg']})") from None


@dataclass
class RunOutcome:
    """What a finished run has to say; of several jobs, ``jobs`` has the outcome of each, and the
    rest is of them together.
    """

    steps: int
    final_loss: float | None
    best_step: int | None
    stopped_early: bool
    last_evaluation: Mapping[str, float] = field(default_factory=dict)
    jobs: Mapping[str, RunOutcome] = field(default_factory=dict)

    @classmethod
    def of(cls, jobs: Mapping[str, RunOutcome]) -> RunOutcome:
        """Of one job, that job's; of several, the most steps and the means."""
        outcomes = list(jobs.values())
        single = len(outcomes) == 1
        losses = [o.final_loss for o in outcomes if o.final_loss is not None]
        return cls(
            max(o.steps for o in outcomes),
            mean_value(losses) if losses else None,
            # several jobs have no common best step; each says its own in ``jobs``
            outcomes[0].best_step if single else None,
            all(o.stopped_early for o in outcomes),
            mean_evaluations([o.last_evaluation for o in outcomes if o.last_evaluation]),
            dict(jobs),
        )


class HeldOutTask:
    """A task with the held-out rows of one adapter only, for `evaluate_task`."""

    def __init__(self, task: Task, adapter: int) -> None:
        self.adapters, self.wants, self.loss = task.adapters, task.wants, task.loss
        self.reported = task.reported
        # held-out batches are made for each job by itself, so the first sequence speaks for all
        self.batches = [b for b in task.eval_batches() if int(b.adapter[0]) == adapter]

    def eval_batches(self) -> list[Batch]:
        """The held-out rows."""
        return self.batches


def held_out_task(task: Task, name: str) -> Task:
    """The task as the evaluation of one adapter sees it."""
    return cast(Task, HeldOutTask(task, list(task.adapters).index(name)))


def mean_value(values: Sequence[float]) -> float:
    """The arithmetic mean; of one value, that value to the bit."""
    # x / 1 is x: a run of one job logs the very value that its evaluation gave
    return sum(values) / len(values)


def mean_evaluations(evaluations: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the jobs that have it."""
    names = dict.fromkeys(name for values in evaluations for name in values)
    return {
        name: mean_value([values[name] for values in evaluations if name in values])
        for name in names
    }
