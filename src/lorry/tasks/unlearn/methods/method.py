"""What an unlearning method is: what it asks of the model and of the start, and the loss it makes of it.

    method = make_method("NPO", [settings], StartModel(width, head, seeds))      # registry.py
    batch = method.prepare(batch)                      # the weights of its terms, as extras
    method.wants(batch), method.reference_wants(batch)     # the latter asked of the start's mix
    method.loss(got, batch), method.terms(batch, adapters)

The start is the model before unlearning. What it said of a batch travels as extras
`reference_WANT`: scores and layer outputs at their own tokens; of `FinalHidden`, at each token what
the head reads to predict it. Formulas and defaults are those of the papers and of open-unlearning
where that is right; where it is not, ``peer_masks`` repeats its averages. K adapters train in one
batch, each with settings of its own as far as they are numbers. S sequences, T tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorry.backends.protocol import LossTerms, StepStats
from lorry.data.batch import Batch
from lorry.errors import ConfigError, ModelError
from lorry.models.scoring.divergence import full_vocab_divergence
from lorry.models.scoring.score import FinalHidden, HiddenState, ScoreFn, TokenScore, Want, log_prob
from lorry.models.scoring.vocab import VocabRows, log_prob_value
from lorry.tasks.unlearn.losses import answer_nll, steering_loss, token_sum
from lorry.tasks.unlearn.pairing import (
    FORGET,
    RETAIN,
    append_token,
    full_weights,
    has_role,
    role_weights,
    weights_by_adapter,
)
from lorry.tasks.unlearn.settings import UnlearnSettings

# names of extras: the weights of each term
FORGET_WEIGHTS, RETAIN_WEIGHTS = "forget_weights", "retain_weights"
DIVERGENCE_WEIGHTS = "divergence_weights"
REFERENCE = "reference_"

# what the start's head reads [t,D'] -> its logits [t,V]; without a gradient
ReferenceHead = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StartModel:
    """What methods need to know of the model: its ``width``, the start's ``head`` (KL, UNDIAL and
    JensUn need one), and the ``seeds`` of the adapters, in their order."""

    width: int
    seeds: Sequence[int] = (0,)
    head: ReferenceHead | None = None


class UnlearnMethod(ABC):
    """A forget term and, where there is one, a retain term.

    Which settings it reads, and their defaults, stand in `config.unlearning.unlearn.UNLEARN_METHODS`; ``fixed``:
    those that are part of what it is. ``needs_alternates``: an alternate answer beside each forget
    row, ``needs_retain_alternates`` beside each retain row, too; ``retain_divergence``: from the
    start, where ``retain_loss`` is KL; ``forget_mean``: what the forget term is a mean over;
    ``direction_only``: whether a `GradientRule` reads the retain gradient's direction alone, so that
    what multiplies L_r has no say;
    ``reported``: its terms that are no part of the loss. Raises ConfigError where the settings of
    two adapters ask for different passes.
    """

    fixed: ClassVar[Mapping[str, Any]] = {}
    needs_alternates: ClassVar[bool] = False
    needs_retain_alternates: ClassVar[bool] = False
    retain_divergence: ClassVar[str] = "kl"
    forget_mean: ClassVar[str] = "token"
    direction_only: bool = False

    def __init__(self, settings: Sequence[UnlearnSettings], start: StartModel) -> None:
        self.settings = [replace(s, **self.fixed) for s in settings]
        self.start, self.first = start, self.settings[0]
        # they decide what model and start are asked, once for all sequences of a batch
        for name in ("retain_loss", "layer", "peer_masks", "adaptive"):
            if len({getattr(s, name) for s in settings}) > 1:
                raise ConfigError(
                    f"unlearn.{name} differs between jobs that share a forward pass; give one value"
                )
        if len(start.seeds) != len(settings):
            raise ValueError(f"{len(settings)} settings but {len(start.seeds)} seeds")

    # --- what a method needs

    @property
    def retains(self) -> bool:
        """Whether retain rows are read at all."""
        return any(s.alpha > 0 for s in self.settings)

    @property
    def highest_layer(self) -> int | None:
        """The last layer that any gradient reaches; None: all are reached."""
        return None

    @property
    def reported(self) -> Collection[str]:
        """Terms of `loss` that are only reported."""
        return ["retain_nll"] if self._divergent else []

    @property
    def _divergent(self) -> bool:
        return self.retains and self.first.retain_loss == "KL"

    @property
    def _embedded(self) -> bool:
        return self.retains and self.first.retain_loss == "EMBED"

    # --- a batch

    def prepare(self, batch: Batch) -> Batch:
        """The batch as the method reads it, with the weights of its terms [T] as extras."""
        if self._divergent and self.first.peer_masks:
            # the peer averages over all logits, the last token's too
            batch = append_token(batch, RETAIN)
            batch = batch.with_extra(**{DIVERGENCE_WEIGHTS: full_weights(batch, RETAIN)})
        elif self._divergent:
            batch = batch.with_extra(**{DIVERGENCE_WEIGHTS: role_weights(batch, RETAIN)})
        retain = {RETAIN_WEIGHTS: role_weights(batch, RETAIN)} if self.retains else {}
        return batch.with_extra(**{FORGET_WEIGHTS: role_weights(batch, FORGET)}, **retain)

    def wants(self, batch: Batch) -> Mapping[str, Want]:
        """Of the model that trains."""
        return {**self.forget_wants(), **self.retain_wants()}

    def reference_wants(self, batch: Batch) -> Mapping[str, Want]:
        """Of the start, about the same batch, before the forward; empty: it is not asked."""
        if self._divergent:
            return {"hidden": FinalHidden()}
        return {"state": HiddenState(self.first.layer)} if self._embedded else {}

    def forget_wants(self) -> Mapping[str, Want]:
        """What the forget term is made of."""
        return {"forget": TokenScore(log_prob, weights=FORGET_WEIGHTS)}

    def retain_wants(self) -> Mapping[str, Want]:
        """What the retain term is made of."""
        if self._divergent:
            divergence = self._against_start(self.retain_divergence)
            return {
                "retain": TokenScore(divergence, weights=DIVERGENCE_WEIGHTS),
                "retain_nll": TokenScore(log_prob_value, weights=RETAIN_WEIGHTS),
            }
        if self._embedded:
            return {"state": HiddenState(self.first.layer)}
        return {"retain": TokenScore(log_prob, weights=RETAIN_WEIGHTS)} if self.retains else {}

    def terms(self, batch: Batch, adapters: int) -> dict[str, Tensor]:
        """{term: [K]} this batch's weight of each."""
        # the backend divides the sum over a step by the sum of these: a mean over the step, not a
        # mean of means over its micro-batches
        wants = {"forget": self._weight(batch, self.forget_mean, FORGET_WEIGHTS, adapters)}
        if self.retains:
            wants["retain"] = self._retain_weight(batch, adapters)
        if "retain_nll" in self.reported:
            wants["retain_nll"] = weights_by_adapter(batch, RETAIN_WEIGHTS, adapters)
        return wants

    def loss(self, got: Mapping[str, Tensor], batch: Batch) -> LossTerms:
        """{term: [S]}, factors inside: the terms that are not only reported add up to the loss."""
        # total = gamma L_f + alpha L_r, each sequence in the one term of its role
        forget = self.number("gamma", batch, got) * self.forget_values(got, batch)
        terms = {"forget": torch.where(has_role(batch, FORGET), forget, 0.0)}
        if self.retains:
            retain = self.retain_factor(batch, got) * self.retain_values(got, batch)
            terms["retain"] = torch.where(has_role(batch, RETAIN), retain, 0.0)
        if "retain_nll" in self.reported:
            terms["retain_nll"] = answer_nll(
                got["retain_nll"], batch.extra[RETAIN_WEIGHTS].values, batch
            )
        return terms

    @abstractmethod
    def forget_values(self, got: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """[S]: L_f of each sequence before gamma; what stands at other sequences is not read."""

    def retain_values(self, got: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """[S]: L_r of each sequence before alpha; what stands at other sequences is not read."""
        if self._divergent:
            return token_sum(got["retain"], batch.extra[DIVERGENCE_WEIGHTS].values, batch)
        weights = batch.extra[RETAIN_WEIGHTS].values
        if self._embedded:
            return steering_loss(got["state"], reference(batch, "state"), weights, batch)
        return answer_nll(got["retain"], weights, batch)

    def retain_factor(self, batch: Batch, got: Mapping[str, Tensor]) -> Tensor:
        """[S]: what multiplies L_r."""
        return self.number("alpha", batch, got)

    # --- between steps

    def after_step(  # noqa: B027  # a hook: most methods have nothing to do there
        self, stats: StepStats, adapters: Sequence[str], epochs: Mapping[str, tuple[int, int]]
    ) -> None:
        """Nothing to adapt. ``epochs``: of each adapter, that of this step and of the next."""

    def state(self) -> dict[str, Any]:
        """What `after_step` adapts, as JSON."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises ModelError for a state of another method."""
        if state:
            raise ModelError(f"this method has no state, but the checkpoint holds {sorted(state)}")

    # --- for the methods

    def number(self, name: str, batch: Batch, got: Mapping[str, Tensor] | None = None) -> Tensor:
        """[S]: a setting of each sequence's adapter, in the dtype of the scores."""
        return self._spread([float(getattr(s, name)) for s in self.settings], batch, got)

    def _spread(
        self, values: Sequence[float], batch: Batch, got: Mapping[str, Tensor] | None
    ) -> Tensor:
        wide = any(x.dtype == torch.float64 for x in (got or {}).values())
        dtype = torch.float64 if wide else torch.float32
        # [K]; the base's sequences (-1) read the first entry, and weigh nothing
        table = torch.tensor(values, dtype=dtype, device=batch.adapter.device)
        return table[batch.adapter.clamp(min=0)]

    def _against_start(self, loss: str, beta: float = 0.5) -> ScoreFn:
        """A divergence from the start's whole distribution."""
        return full_vocab_divergence(loss, self._start_logits, beta)

    def _start_logits(self, rows: VocabRows) -> Tensor:
        if self.start.head is None:
            raise ConfigError(
                "this method needs the reference model's output head, which was not given"
            )
        with torch.no_grad():
            return self.start.head(rows.extra[f"{REFERENCE}hidden"])

    def _weight(self, batch: Batch, mean: str, weights: str, adapters: int) -> Tensor:
        if mean == "token":
            return weights_by_adapter(batch, weights, adapters)
        return batch.count("sequence", adapters, FORGET)

    def _retain_weight(self, batch: Batch, adapters: int) -> Tensor:
        if self._embedded:
            return batch.count("sequence", adapters, RETAIN)
        name = DIVERGENCE_WEIGHTS if self._divergent else RETAIN_WEIGHTS
        return weights_by_adapter(batch, name, adapters)


def reference(batch: Batch, want: str) -> Tensor:
    """What the start said."""
    return batch.extra[REFERENCE + want].values
