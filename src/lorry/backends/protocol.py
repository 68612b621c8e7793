"""The seam. A backend runs micro-batches, steps adapters, scores and generates; a task is data plus
a pure loss.

They meet only here and in the engine. A loss returns, per named term, one value for every sequence;
the backend adds the terms' weights over micro-batches (and ranks) before the first backward and
divides each term by its own total, per adapter. So the gradient never depends on how sequences were
packed or accumulated, and K jobs in one batch are K separate runs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lorry.adapters.mix import Mix
from lorry.adapters.trainable import ParameterSet
from lorry.backends.distributed.communicator import Communicator
from lorry.data.batch import Batch
from lorry.generation.request import Completion
from lorry.generation.sampling import SamplingParams
from lorry.models.scoring.score import Want

LossTerms = Mapping[str, Tensor]


@dataclass(frozen=True)
class StepStats:
    """What one `forward_backward` saw. loss, terms: per adapter, normalised; terms holds those that
    are only reported, too, loss does not; tokens, supervised: of this step; present: what steps.
    """

    loss: Mapping[str, float]
    terms: Mapping[str, Mapping[str, float]]
    tokens: int
    supervised: int
    present: frozenset[str]


@dataclass(frozen=True)
class GradientNorms:
    """What one `step` or `discard` saw: the gradient norm of each adapter before clipping, and the
    modules whose A and B both had an exactly zero gradient."""

    norms: Mapping[str, float]
    silent: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class ParameterInspection:
    """For the contracts: what is trainable, what the optimizer holds and what is saved (canonical
    names, found by identity), and a digest of a sample of all that is frozen: base weights and the
    adapters that this run does not step, the start it stands on among them."""

    trainable: frozenset[str]
    optimized: frozenset[str]
    saved: frozenset[str]
    base_digest: str


class ScoringBackend(Protocol):
    """The part of a backend a task may use while it gathers batches: scores and samples, no
    gradients.
    """

    def score(
        self, batches: Sequence[Batch], wants: Mapping[str, Want], mix: Mix | None = None
    ) -> list[dict[str, Tensor]]: ...
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        adapters: Mix | Sequence[Mix | str | None] | str | None = None,
    ) -> list[Completion]: ...


class Task(Protocol):
    """Data plus a pure loss.

    ``adapters``: the names a Batch's adapter numbers mean, in order. ``total_steps``: optimizer
    steps of the whole run. ``reported``: the terms of `loss` that are only reported: normalised and
    logged as the others are, no part of the loss and without a gradient.
    """

    adapters: Sequence[str]
    total_steps: int
    reported: Collection[str]

    def wants(self, batch: Batch) -> Mapping[str, Want]: ...
    def step_batches(self, step: int, models: Mapping[str, ScoringBackend]) -> list[Batch]: ...
    def eval_batches(self) -> list[Batch]: ...
    def loss(self, got: Mapping[str, Tensor], batch: Batch) -> LossTerms: ...
    def after_step(self, stats: StepStats) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: Mapping[str, Any]) -> None: ...


class AddGradients(Protocol):
    """Forward and backward over some micro-batches of a step, each term divided by the whole step's
    weight: their gradients are added to the flat ``grads`` of what trains. ``counted``: whether the
    values of the terms are those of `StepStats`.
    """

    def __call__(self, batches: Sequence[Batch], /, counted: bool = True) -> None: ...


class GradientRule(Protocol):
    """How the gradient of a step is made where it is not that of the loss.

    ``bind``: what trains, before the first step; ``make``: by calls of ``add``, each micro-batch
    counted once, leave in every ``grads``, 0 before, what the optimizer is to see, and ``values`` as
    they were; ``buffers``: {kind: [P]} that it keeps for one of them between steps, part of
    `Backend.state`.
    """

    def bind(self, params: Mapping[str, ParameterSet]) -> None: ...
    def make(self, batches: Sequence[Batch], add: AddGradients) -> None: ...
    def buffers(self, name: str) -> Mapping[str, Tensor]: ...


class TensorsWhenRead(Mapping[str, Tensor]):
    """Tensors by name of which each is made when it is read: several processes have it in parts."""

    @abstractmethod
    def like(self, name: str) -> Tensor:
        """A tensor without memory of the same shape and dtype; nothing is made."""


def like_stored(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor, or one without memory of its shape and dtype where it would have to be made."""
    return tensors.like(name) if isinstance(tensors, TensorsWhenRead) else tensors[name]


class Backend(ScoringBackend, Protocol):
    """Where a run happens. ``mix_of``: what the sequences of a trained name run under.
    ``state`` holds adapters, moments, counts and random state under canonical names,
    whole tensors (where weights are cut over processes, `TensorsWhenRead`); ``held``: of what trains
    the tensors of this process, those of the same name the same in every process that has them;
    ``nonfinite``: the names in ``state`` whose values are not finite, of how many, as all processes
    find them. ``end_steps`` gives up what only steps need (moments), and with it all that makes or
    reads them, ``state`` among it; ``held``, scores and answers stay. ``communicator``: the processes of
    the run; on each of them the same methods are called with the same batches, those of the whole step,
    and return the same.
    """

    communicator: Communicator

    @property
    def device(self) -> torch.device: ...
    def forward_backward(self, batches: Sequence[Batch], task: Task, step: int) -> StepStats: ...
    def step(self, lr: Mapping[str, float]) -> GradientNorms: ...
    def discard(self) -> GradientNorms: ...
    def mix_of(self, name: str) -> Mix: ...
    def state(self) -> Mapping[str, Tensor]: ...
    def held(self) -> Mapping[str, Tensor]: ...
    def nonfinite(self) -> tuple[list[str], int]: ...
    def load_state(self, state: Mapping[str, Tensor]) -> None: ...
    def inspect(self) -> ParameterInspection: ...
    def end_steps(self) -> None: ...


def term_totals(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """{term: [K]} weights added over micro-batches. Raises ValueError if the batches declare
    different terms.
    """
    # a term that one batch lacks would have too small a total, and too large a gradient
    names = list(batches[0].terms)
    if any(list(b.terms) != names for b in batches):
        raise ValueError("the micro-batches of one step must declare the same loss terms")
    return {n: sum((b.terms[n] for b in batches[1:]), batches[0].terms[n].clone()) for n in names}
