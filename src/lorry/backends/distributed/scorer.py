"""A model that every rank holds and that is only asked: each rank scores and answers its part, and
all have everything.

Evaluations, named sets, suites and attacks ask it as they ask one device, on every rank alike: the
same questions in the same order (`backends.registry.open_scorer` makes one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lorry.adapters.mix import Mix
from lorry.backends.distributed.communicator import Communicator
from lorry.backends.distributed.ddp import score_together
from lorry.backends.distributed.deal import Adapters, generate_together
from lorry.data.batch import Batch
from lorry.generation.request import Completion
from lorry.generation.sampling import SamplingParams
from lorry.generation.scorer import ModelScorer
from lorry.models.causal_lm import CausalLM
from lorry.models.scoring.score import Want


class SharedModelScorer(ModelScorer):
    """`ModelScorer` on every rank of ``communicator``, each with the same model and adapters. All
    ranks call the same methods with the same arguments, and get the same.
    """

    def __init__(
        self,
        model: CausalLM,
        communicator: Communicator,
        mix: Mix | None = None,
        *,
        share_prefixes: bool = False,
    ) -> None:
        super().__init__(model, mix, share_prefixes=share_prefixes)
        self.communicator = communicator

    def deal(self, count: int) -> list[int]:
        """Its part, one after the other to each data rank."""
        mesh = self.communicator.mesh
        return list(range(mesh.data_rank, count, mesh.data_size))

    def collect(self, what: str, values: Mapping[int, Any]) -> list[Any]:
        """The values of all ranks, each of whom has done its own however long that took."""
        parts = self.communicator.await_all(what, list(values.items()))
        return super().collect(what, {number: value for part in parts for number, value in part})

    def score(
        self, batches: Sequence[Batch], wants: Mapping[str, Want], mix: Mix | None = None
    ) -> list[dict[str, Tensor]]:
        """As one device: see `score_together`."""
        chosen = self.mix if mix is None else mix
        return score_together(self.communicator, super().score, batches, wants, chosen)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        adapters: Adapters = None,
        batch_rows: int | None = None,
        rows: Sequence[int] | None = None,
    ) -> list[Completion]:
        """As one device: see `generate_together`."""
        return generate_together(
            self.communicator,
            super().generate,
            prompts,
            params,
            adapters=adapters,
            batch_rows=batch_rows,
            rows=rows,
        )
