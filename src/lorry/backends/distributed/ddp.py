"""`backend=ddp`: the base whole on every rank, a step's sequences dealt among them, and the flat
gradient buffers added up once per optimizer step.

Adapters are no parameters of the model and torch's DistributedDataParallel has nothing to do here:
each one's gradient is one buffer, so the reduction over the data ranks is one call. Every rank then clips and steps on
the same bits, and what it holds stays equal; `ContractChecks.equal_on_all_ranks` looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lorry.adapters.mix import Mix
from lorry.adapters.trainable import ParameterSet
from lorry.backends.distributed.communicator import Communicator
from lorry.backends.distributed.deal import Adapters, deal_batches, generate_together
from lorry.backends.local import LocalBackend
from lorry.backends.protocol import ScoringBackend, Task
from lorry.data.batch import Batch, BatchExtra
from lorry.errors import ContractError
from lorry.generation.request import Completion
from lorry.generation.sampling import SamplingParams
from lorry.models.scoring.score import Want

# the extra that remembers where a dealt token stood; no name of a task's
PLACE = "_place"


class ScoreFunction(Protocol):
    """`ScoringBackend.score`."""

    def __call__(
        self, batches: Sequence[Batch], wants: Mapping[str, Want], mix: Mix | None = None, /
    ) -> list[dict[str, Tensor]]: ...


class DataParallelBackend(LocalBackend):
    """`LocalBackend` on every rank of ``communicator``, each with the same model and adapters. All
    ranks call the same methods with the same batches: those of the whole step.
    """

    def run_micro_batches(
        self, batches: Sequence[Batch], task: Task, step: int, totals: Mapping[str, Tensor]
    ) -> list[dict[str, Tensor]]:
        """This rank's part of these, forward and backward; then sums over ranks, of the gradients and
        of the terms' values, which are those of one device. Raises what `exchange` raises, and
        ContractError where ranks divide by other totals."""
        # a gradient rule asks several times, and what it has gathered so far is summed already
        before = (
            {}
            if self.gradient is None
            else {name: owner.grads.clone() for name, owner in self.owners.items()}
        )
        for name in before:
            self.owners[name].grads.zero_()
        mesh = self.communicator.mesh
        own = deal_batches(batches, mesh.data_size, step)[mesh.data_rank]
        with self.communicator.together():
            seen = super().run_micro_batches(
                [batch for batch in own if batch is not None], task, step, totals
            )
        divisors = {term: total.tolist() for term, total in totals.items()}
        sums = {
            term: sum((values[term] for values in seen), torch.zeros_like(total)).tolist()
            for term, total in totals.items()
        }
        frames = self.communicator.exchange(
            "the step's loss", {"step": step, "totals": divisors, "sums": sums}
        )
        for rank, frame in enumerate(frames):
            if (frame["step"], frame["totals"]) != (step, divisors):
                raise ContractError(
                    f"rank {rank} makes step {frame['step'] + 1} and divides its loss by "
                    f"{frame['totals']}, rank {self.communicator.rank} step {step + 1} by {divisors}: "
                    "every rank has to divide by the totals of the whole step"
                )
        for name, owner in self.owners.items():
            if owner.shard is not None:
                continue  # added up by the passes
            self._add_up_partial_sums(name, owner)
            self.communicator.add_up(f"gradients of {name}", owner.grads)
        for name, earlier in before.items():
            self.owners[name].grads.add_(earlier)
        return [
            {term: torch.tensor(frame["sums"][term], dtype=torch.float64) for term in totals}
            # of tensor ranks, which have the same rows, the first
            for frame in frames[:: mesh.tensor_size]
        ]

    def _add_up_partial_sums(self, name: str, owner: ParameterSet) -> None:
        """Over the ranks that share the model: the gradients of which each has a part."""
        views = owner.split_like(owner.grads)
        parts = [views[tensor] for tensor in owner.partial_sums()]
        if not parts:
            return
        flat = torch.cat([part.flatten() for part in parts])
        self.communicator.add_up(f"sides of {name} that every rank has", flat, "tensor")
        for part, total in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
            part.copy_(total.view(part.shape))

    def score(
        self, batches: Sequence[Batch], wants: Mapping[str, Want], mix: Mix | None = None
    ) -> list[dict[str, Tensor]]:
        """As one device: see `score_together`."""
        return score_together(self.communicator, super().score, batches, wants, mix)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        adapters: Adapters = None,
        rows: Sequence[int] | None = None,
    ) -> list[Completion]:
        """As one device: see `generate_together`."""
        return generate_together(
            self.communicator, super().generate, prompts, params, adapters=adapters, rows=rows
        )


class SharedScorer:
    """Another model that every rank holds (a teacher), whose scores are made together; generation is
    that of the model itself.
    """

    def __init__(self, scorer: ScoringBackend, communicator: Communicator) -> None:
        self.scorer, self.communicator = scorer, communicator

    def generate(self, *given: Any, **named: Any) -> list[Completion]:
        """See `ScoringBackend.generate`."""
        with self.communicator.together():
            return self.scorer.generate(*given, **named)

    def score(
        self, batches: Sequence[Batch], wants: Mapping[str, Want], mix: Mix | None = None
    ) -> list[dict[str, Tensor]]:
        """As one device: see `score_together`."""
        return score_together(self.communicator, self.scorer.score, batches, wants, mix)


def score_together(
    communicator: Communicator,
    score: ScoreFunction,
    batches: Sequence[Batch],
    wants: Mapping[str, Want],
    mix: Mix | None,
) -> list[dict[str, Tensor]]:
    """Scores of whole batches on every rank, each having run its part of each. A mix of single packed
    tokens means them in their order, so every rank runs such batches whole.
    """
    if mix is not None and any(
        term.rows is not None or isinstance(term.gate, Tensor) for term in mix.terms
    ):
        with communicator.together():
            return score(batches, wants, mix)
    results = list[dict[str, Tensor]]()
    for batch in batches:
        tokens = batch.tokens.numel()
        numbered = batch.with_extra(**{PLACE: BatchExtra(torch.arange(tokens), "token")})
        mesh = communicator.mesh
        part = deal_batches([numbered], mesh.data_size, 0)[mesh.data_rank][0]
        mine = dict[str, Tensor]()
        with communicator.together():
            if part is not None:
                mine = {PLACE: part.extra[PLACE].values, **score([part], wants, mix)[0]}
        if mesh.tensor_rank:  # the same as the first tensor rank's
            mine = {}
        parts = [each for each in communicator.gather("scores", mine) if each]
        # every want is [T, ...]
        whole = {
            name: value.new_empty((tokens, *value.shape[1:]))
            for name, value in parts[0].items()
            if name != PLACE
        }
        for each in parts:
            for name, values in whole.items():
                values[each[PLACE]] = each[name]
        results.append(whole)
    return results
