"""RMU: what is to be forgotten is steered away in a layer's output, without logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorry.adapters.seeds import derive_seed
from lorry.data.batch import Batch
from lorry.models.scoring.score import HiddenState, Want
from lorry.tasks.unlearn.losses import steering_loss, token_sum
from lorry.tasks.unlearn.methods.method import (
    FORGET_WEIGHTS,
    StartModel,
    UnlearnMethod,
    reference,
)
from lorry.tasks.unlearn.settings import UnlearnSettings


class RMU(UnlearnMethod):
    """Steer a layer's output on F towards a random direction u, hold it in place on R.

    u: uniform on [0,1)^D, norm 1, the same for a whole run, a function of the seed. ``adaptive``:
    the length aimed at is steering_coeff times the mean norm of the start's output at the answer
    (Dang et al. 2024, arXiv 2408.06223).
    """

    forget_mean = "sequence"

    def __init__(self, settings: Sequence[UnlearnSettings], start: StartModel) -> None:
        super().__init__(settings, start)
        self.directions = torch.stack(
            [steering_direction(start.width, seed) for seed in start.seeds]
        )

    @property
    def highest_layer(self) -> int | None:
        # steering reads the output of this layer and no logits: layers above get no gradient,
        # unless the retain term is one of logits
        return self.first.layer if self._embedded or not self.retains else None

    def forget_wants(self) -> Mapping[str, Want]:
        return {"state": HiddenState(self.first.layer)}

    def reference_wants(self, batch: Batch) -> Mapping[str, Want]:
        own = self.forget_wants() if self.first.adaptive else {}
        return {**super().reference_wants(batch), **own}

    def forget_values(self, got: Mapping[str, Tensor], batch: Batch) -> Tensor:
        weights, length = (
            batch.extra[FORGET_WEIGHTS].values,
            self.number("steering_coeff", batch, got),
        )
        if self.first.adaptive:
            total = batch.sum_by_sequence(weights)  # [S] answer tokens, weighted
            norm = reference(batch, "state").to(length.dtype).norm(dim=1)
            length = length * token_sum(norm, weights, batch) / torch.where(total > 0, total, 1.0)
        # [S,D]; sequences of the base (-1) read the first direction, and weigh nothing
        directions = self.directions.to(length)[batch.adapter.clamp(min=0)]
        target = (length[:, None] * directions)[batch.sequence_of]
        return steering_loss(got["state"], target, weights, batch)


def steering_direction(width: int, seed: int) -> Tensor:
    """[D] float32, norm 1."""
    draw = torch.Generator().manual_seed(derive_seed("rmu", seed))
    # [0,1), not normal: no entry is pushed below 0, as the authors have it
    direction = torch.rand(width, generator=draw)
    return direction / direction.norm()
