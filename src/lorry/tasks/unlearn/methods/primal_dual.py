"""PDU: what is to be forgotten is flattened under a bound on the retain loss, by a primal-dual method."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorry.backends.protocol import LossTerms, StepStats
from lorry.data.batch import Batch
from lorry.errors import ConfigError, ModelError
from lorry.models.scoring.score import TokenScore, Want
from lorry.models.scoring.unlearning import logit_spread
from lorry.tasks.unlearn.losses import token_sum
from lorry.tasks.unlearn.methods.method import (
    DIVERGENCE_WEIGHTS,
    FORGET_WEIGHTS,
    RETAIN_WEIGHTS,
    StartModel,
    UnlearnMethod,
)
from lorry.tasks.unlearn.pairing import FORGET, RETAIN, append_token, delayed_weights, has_role
from lorry.tasks.unlearn.settings import UnlearnSettings


class PDU(UnlearnMethod):
    """Flatten the logits on F under the constraint L_r <= eps, by a primal-dual method: the
    multiplier lambda takes alpha's place and is adapted after a step, at least 0.

    ``retain_loss_eps`` has no default. Two terms are only reported: ``retain_loss``, L_r as it is,
    which lambda needs while it is 0 itself, and ``lambda``, so that each step's stands in
    metrics.jsonl. K adapters have a lambda each.
    """

    def __init__(self, settings: Sequence[UnlearnSettings], start: StartModel) -> None:
        super().__init__(settings, start)
        self.bounds: list[float] = []
        for s in self.settings:
            if s.retain_loss_eps is None:
                raise ConfigError(
                    "unlearn.retain_loss_eps: PDU needs an upper bound of the retain loss"
                )
            self.bounds.append(s.retain_loss_eps)
        self.multipliers = [s.alpha for s in self.settings]
        # sum and count of L_r since the last update, where it is made once an epoch
        self.seen = [(0.0, 0) for _ in self.settings]

    @property
    def retains(self) -> bool:
        return True

    @property
    def reported(self) -> Collection[str]:
        return ["retain_loss", "lambda", *super().reported]

    def prepare(self, batch: Batch) -> Batch:
        if not self.first.peer_masks:
            return super().prepare(batch)
        # the peer does not shift the forget mask: logits at the answer's tokens, not before them
        prepared = super().prepare(append_token(batch, FORGET))
        return prepared.with_extra(**{FORGET_WEIGHTS: delayed_weights(prepared, FORGET_WEIGHTS)})

    def forget_wants(self) -> Mapping[str, Want]:
        return {"forget": TokenScore(logit_spread, weights=FORGET_WEIGHTS)}

    def forget_values(self, got: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return token_sum(got["forget"], batch.extra[FORGET_WEIGHTS].values, batch)

    def terms(self, batch: Batch, adapters: int) -> dict[str, Tensor]:
        return {
            **super().terms(batch, adapters),
            "retain_loss": self._retain_weight(batch, adapters),
            "lambda": self._retain_weight(batch, adapters),
        }

    def loss(self, got: Mapping[str, Tensor], batch: Batch) -> LossTerms:
        terms = dict(super().loss(got, batch))
        # reported only: lambda does not scale it, and no gradient goes through it
        plain = self.retain_values(got, batch).detach()
        terms["retain_loss"] = torch.where(has_role(batch, RETAIN), plain, 0.0)
        # the term is lambda (L_r - eps): each sequence's part of eps is that of the term's weight
        bound = self._spread(self.bounds, batch, got) * self._retain_mass(batch)
        terms["retain"] = terms["retain"] - self.retain_factor(batch, got) * bound
        # the mean of one number over the step is that number
        terms["lambda"] = self._spread(self.multipliers, batch, got) * self._retain_mass(batch)
        return terms

    def _retain_mass(self, batch: Batch) -> Tensor:
        """[S]: each sequence's part of the retain term's weight."""
        if self._embedded:
            return has_role(batch, RETAIN).float()
        name = DIVERGENCE_WEIGHTS if self._divergent else RETAIN_WEIGHTS
        return batch.sum_by_sequence(batch.extra[name].values)

    def retain_factor(self, batch: Batch, got: Mapping[str, Tensor]) -> Tensor:
        # a mean of gradients over steps would weigh each step by its lambda, and lose those with 0
        factors = [1.0] * len(self.multipliers) if self.direction_only else self.multipliers
        return self._spread(factors, batch, got)

    def after_step(
        self, stats: StepStats, adapters: Sequence[str], epochs: Mapping[str, tuple[int, int]]
    ) -> None:
        """lambda = max(0, lambda + step size (L_r - eps)), from the epoch of the warm-up on; upon
        an epoch, with the mean L_r of its steps.
        """
        for k, name in enumerate(adapters):
            if name not in stats.present:  # a job that is done keeps its multiplier
                continue
            s, (now, after) = self.settings[k], epochs[name]
            total, count = self.seen[k]
            total, count = total + stats.terms["retain_loss"][name], count + 1
            due = s.dual_update_upon == "step" or after != now
            self.seen[k] = (0.0, 0) if due else (total, count)
            if due and now >= s.dual_warmup_epochs:
                # projected dual ascent: a broken bound raises lambda, slack lowers it down to 0
                rise = s.dual_step_size * (total / count - self.bounds[k])
                self.multipliers[k] = max(0.0, self.multipliers[k] + rise)

    def state(self) -> dict[str, Any]:
        return {"multipliers": self.multipliers, "seen": [list(pair) for pair in self.seen]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises ModelError unless it is what `state` gives for so many adapters."""
        multipliers, seen = state["multipliers"], state["seen"]
        if len(multipliers) != len(self.settings) or len(seen) != len(self.settings):
            raise ModelError(f"PDU has {len(self.settings)} multipliers, not {multipliers}")
        self.multipliers = [float(value) for value in multipliers]
        self.seen = [(float(total), int(count)) for total, count in seen]
