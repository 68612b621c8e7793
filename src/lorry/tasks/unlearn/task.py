"""Unlearning as a task: batches of rows to forget and to retain, what the start says of them, and a
method's loss.

A step: the stream's micro-batches, each prepared by the method (`methods/`), read by the start
(`reference.py`), then by the model that trains. Every step is a function of (seed, step) and of what
`after_step` has adapted, which is in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lorry.backends.protocol import LossTerms, ScoringBackend, StepStats
from lorry.data.batch import Batch
from lorry.data.stream.joint import JointStream
from lorry.models.scoring.score import Want
from lorry.tasks.sft import SftTask
from lorry.tasks.unlearn.methods.method import UnlearnMethod
from lorry.tasks.unlearn.pairing import split_parts
from lorry.tasks.unlearn.reference import ReferenceReader


class UnlearnTask(SftTask):
    """`SftTask` with a method and a start. ``models``: who scores the held-out rows, once, as
    `step_batches` is given it for those of a step; ``epoch_of``: by adapter, the epoch a step
    belongs to, both counted from 0; ``split``: micro-batches of what is to be forgotten and of what
    is to be retained, as `gradients.py` needs them.
    """

    def __init__(
        self, stream: JointStream, evaluation: Sequence[Batch], total_steps: int, adapters: Sequence[str], *,
        method: UnlearnMethod, reference: ReferenceReader, models: Mapping[str, ScoringBackend],
        epoch_of: Mapping[str, Callable[[int], int]] | None = None, split: bool = False,
    ) -> None:  # fmt: skip
        self.method, self.reference = method, reference
        self.reported, self.split = method.reported, split
        self.epoch_of = epoch_of or {name: lambda step: 0 for name in adapters}
        self.steps = 0  # made so far
        super().__init__(stream, [], total_steps, adapters)
        self.evaluation = [self._attached(batch, models) for batch in evaluation]

    def wants(self, batch: Batch) -> Mapping[str, Want]:
        """The method's."""
        return self.method.wants(batch)

    def step_batches(self, step: int, models: Mapping[str, ScoringBackend]) -> list[Batch]:
        """The micro-batches of a step, with what the start says of them."""
        read = self.stream.batches(step)
        # parted before the start is asked: policy and start see the same shapes
        parts = [part for batch in read for part in split_parts(batch)] if self.split else read
        return [self._weigh(self._attached(part, models)) for part in parts]

    def loss(self, got: Mapping[str, Tensor], batch: Batch) -> LossTerms:
        """The method's terms, factors inside."""
        return self.method.loss(got, batch)

    def after_step(self, stats: StepStats) -> None:
        """What the method adapts, with the epochs of this step and of the next."""
        epochs = {n: (of(self.steps), of(self.steps + 1)) for n, of in self.epoch_of.items()}
        self.method.after_step(stats, self.adapters, epochs)
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """Where the stream stands, the steps made, and what the method has adapted."""
        return {"stream": super().state(), "steps": self.steps, "method": self.method.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises KeyError, TypeError or ModelError for another."""
        super().load_state(state["stream"])
        self.method.load_state(state["method"])
        self.steps = int(state["steps"])

    def _attached(self, batch: Batch, models: Mapping[str, ScoringBackend]) -> Batch:
        prepared = self.method.prepare(batch)
        return self.reference.attach(
            prepared, self.method.reference_wants(prepared), models["self"]
        )

    def _weigh(self, batch: Batch) -> Batch:
        return batch.with_terms(**self.method.terms(batch, len(self.adapters)))
