"""Scores and samples of a model under a mix, without gradients and without an optimizer: what
evaluation, teachers and references ask of a model (the `ScoringBackend` of `backends/protocol.py`).

    ModelScorer(model, Mix.one("people")).score([batch], {"nll": TokenScore(log_prob)})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorry.adapters.mix import AdapterContext, Mix
from lorry.data.batch import Batch
from lorry.generation.engine import generate_completions
from lorry.generation.request import Completion
from lorry.generation.sampling import SamplingParams
from lorry.models.causal_lm import CausalLM
from lorry.models.scoring.score import Want, evaluate_wants


class ModelScorer:
    """A model that is only asked. ``mix``: what holds unless a call brings its own.
    ``share_prefixes``: as in `evaluate_wants`; for scores of many answers to the same prompts.
    """

    def __init__(
        self, model: CausalLM, mix: Mix | None = None, *, share_prefixes: bool = False
    ) -> None:
        self.model, self.mix = model, Mix.none() if mix is None else mix
        self.share_prefixes = share_prefixes

    def deal(self, count: int) -> list[int]:
        """Which of so many pieces of work, of other passes than `score` and `generate` make, this
        process does."""
        return list(range(count))

    def collect(self, what: str, values: Mapping[int, Any]) -> list[Any]:
        """The values (JSON) of all pieces, by what `deal` gave this process."""
        return [values[number] for number in sorted(values)]

    @torch.no_grad()
    def score(
        self, batches: Sequence[Batch], wants: Mapping[str, Want], mix: Mix | None = None
    ) -> list[dict[str, Tensor]]:
        """Per batch, everything wanted, on the CPU."""
        call = AdapterContext(self.mix if mix is None else mix)
        values = (
            evaluate_wants(
                self.model,
                batch.to(self.model.device),
                wants,
                call,
                share_prefixes=self.share_prefixes,
            )
            for batch in batches
        )
        return [{name: value.cpu() for name, value in got.items()} for got in values]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        adapters: Mix | Sequence[Mix | str | None] | str | None = None,
        batch_rows: int | None = None,
        rows: Sequence[int] | None = None,
    ) -> list[Completion]:
        """See `generation.engine.generate_completions`; ``adapters`` None is this scorer's mix."""
        return generate_completions(
            self.model,
            prompts,
            params,
            adapters=self.mix if adapters is None else adapters,
            batch_rows=batch_rows,
            rows=rows,
        )
