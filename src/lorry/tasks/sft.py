"""Supervised fine-tuning: read rows, weigh their tokens, minimise the negative log-likelihood of
the supervised ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from lorry.backends.protocol import LossTerms, ScoringBackend, StepStats
from lorry.data.batch import Batch
from lorry.data.stream.joint import JointStream
from lorry.models.scoring.score import TokenScore, Want, log_prob
from lorry.tasks.build import BuiltTask, TaskDefinition, TaskInputs
from lorry.tasks.losses import nll_loss


class SftTask:
    """One or several adapters, a stream of rows that each belong to one of them. ``evaluation``:
    batches that never change, in a fixed order, each of one adapter; ``total_steps``: those of the
    adapter with the most.
    """

    reported: Collection[str] = ()

    def __init__(
        self,
        stream: JointStream,
        evaluation: Sequence[Batch],
        total_steps: int,
        adapters: Sequence[str],
    ) -> None:
        # a list: held-out batches are read at every evaluation, and must be the same ones
        self.stream, self.evaluation = stream, list(evaluation)
        self.total_steps, self.adapters = total_steps, adapters

    def wants(self, batch: Batch) -> Mapping[str, Want]:
        """The log-probability of every supervised token."""
        return {"logprob": TokenScore(log_prob)}

    def step_batches(self, step: int, models: Mapping[str, ScoringBackend]) -> list[Batch]:
        """The micro-batches of a step, each with its supervised weight: a function of (seed, step)."""
        return [self._weigh(b) for b in self.stream.batches(step)]

    def eval_batches(self) -> list[Batch]:
        """The held-out rows."""
        return [self._weigh(b) for b in self.evaluation]

    def loss(self, got: Mapping[str, Tensor], batch: Batch) -> LossTerms:
        """Mean negative log-likelihood per supervised token, once the backend has divided."""
        return {"nll": nll_loss(got["logprob"], batch)}

    def after_step(self, stats: StepStats) -> None:
        """Nothing to adapt."""

    def state(self) -> dict[str, Any]:
        """Where a streamed source stands; a stored one needs nothing."""
        return self.stream.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.stream.load_state(state)

    def _weigh(self, batch: Batch) -> Batch:
        # [K]: supervised weight per adapter, by which the backend divides the sums of a whole step
        return batch.with_terms(nll=batch.count("token", len(self.adapters)))


def build_sft(inputs: TaskInputs) -> BuiltTask:
    """Nothing but the rows."""
    return BuiltTask(SftTask(inputs.stream, inputs.held, inputs.total, list(inputs.jobs)))


SFT = TaskDefinition(build_sft)
