"""Unlearning methods by the name a user types. A method says what it asks of the model and of the
start, and makes a loss of it.

    method = make_method("NPO", [settings], StartModel(width, head, seeds))
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

from lorry.adapters.seeds import derive_seed
from lorry.backends.protocol import LossTerms, StepStats
from lorry.data.batch import Batch, BatchExtra
from lorry.data.stream.joint import select_sequences
from lorry.errors import ConfigError, ModelError
from lorry.models.scoring.divergence import full_vocab_divergence
from lorry.models.scoring.score import FinalHidden, HiddenState, ScoreFn, TokenScore, Want, log_prob
from lorry.models.scoring.unlearning import (
    contrary_cross_entropy,
    inverted_hinge,
    logit_spread,
    lowered_cross_entropy,
    one_hot_jsd,
    uniform_divergence,
)
from lorry.models.scoring.vocab import VocabRows, log_prob_value
from lorry.tasks.unlearn.losses import (
    answer_nll,
    npo_loss,
    preference_loss,
    simnpo_loss,
    steering_loss,
    token_sum,
    weighted_ascent,
)
from lorry.tasks.unlearn.pairing import (
    ALTERNATE,
    FORGET,
    RETAIN,
    append_token,
    delayed_weights,
    full_weights,
    has_role,
    partners,
    repeated_alternates,
    replace_by_alternates,
    role_weights,
    weights_by_adapter,
    without_first_tokens,
)
from lorry.tasks.unlearn.settings import UnlearnSettings, resolve_settings

# names of extras: the weights of each term, and of the answers that are compared
FORGET_WEIGHTS, RETAIN_WEIGHTS, PAIR_WEIGHTS = "forget_weights", "retain_weights", "pair_weights"
DIVERGENCE_WEIGHTS, ANSWER_WEIGHTS, STRENGTH = "divergence_weights", "answer_weights", "strength"
REFUSAL_IDS = "refusal_ids"  # of JensUn: the token that each answer token is to give way to
REFERENCE = "reference_"
PEER_IGNORED_LABEL = -100

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


class GradAscent(UnlearnMethod):
    """-NLL per token, and nothing else: it has no bound and ruins a model soon."""

    def forget_values(self, got: Mapping[str, Tensor], batch: Batch) -> Tensor:
        # L_f = log p(y | x): descending it raises NLL without end, as log p has no lower bound
        return -answer_nll(got["forget"], batch.extra[FORGET_WEIGHTS].values, batch)


class GradDiff(GradAscent):
    """Gradient ascent on F, descent on R."""


class KL(GradDiff):
    """GradDiff with retain_loss=KL: the papers' KL minimisation."""

    fixed: ClassVar[Mapping[str, Any]] = {"retain_loss": "KL"}


class NPO(UnlearnMethod):
    """Negative preference optimisation against the start."""

    # the sigmoid is of a whole answer's likelihood, so the mean is over answers, not tokens
    forget_mean = "sequence"

    def reference_wants(self, batch: Batch) -> Mapping[str, Want]:
        return {**super().reference_wants(batch), **self.forget_wants()}

    def forget_values(self, got: Mapping[str, Tensor], batch: Batch) -> Tensor:
        weights, beta = batch.extra[FORGET_WEIGHTS].values, self.number("beta", batch, got)
        return npo_loss(got["forget"], reference(batch, "forget"), weights, batch, beta)


class SimNPO(UnlearnMethod):
    """NPO with length-normalised likelihood in place of a reference."""

    forget_mean = "sequence"

    def forget_values(self, got: Mapping[str, Tensor], batch: Batch) -> Tensor:
        # no reference_wants: the length-normalised NLL takes the place of NLL - NLL_ref
        beta, delta = (self.number(name, batch, got) for name in ("beta", "delta"))
        return simnpo_loss(got["forget"], batch.extra[FORGET_WEIGHTS].values, batch, beta, delta)


class DPO(UnlearnMethod):
    """Preference of the alternate answer over the one to forget, against the start. IdkDPO and
    AltPO are the same loss on other alternates: refusals, and answers the start made up.
    """

    needs_alternates = True
    forget_mean = "sequence"

    def prepare(self, batch: Batch) -> Batch:
        prepared = super().prepare(batch)
        return prepared.with_extra(**{PAIR_WEIGHTS: role_weights(prepared, FORGET, ALTERNATE)})

    def forget_wants(self) -> Mapping[str, Want]:
        return {"pair": TokenScore(log_prob, weights=PAIR_WEIGHTS)}

    def reference_wants(self, batch: Batch) -> Mapping[str, Want]:
        return {**super().reference_wants(batch), **self.forget_wants()}

    def forget_values(self, got: Mapping[str, Tensor], batch: Batch) -> Tensor:
        weights = batch.extra[PAIR_WEIGHTS].values
        # implicit reward log p(y) - log p_ref(y) of DPO, eq. 5; beta is applied by the loss
        reward = token_sum(got["pair"] - reference(batch, "pair"), weights, batch)
        own, other = partners(batch, FORGET)
        beta = self.number("beta", batch, got)[own]
        # 2 as open-unlearning has it: with rewards of the forget answers alone this is NPO
        values = 2 * preference_loss(reward[other], reward[own], beta)
        return reward.new_zeros(len(batch)).index_copy(0, own, values)


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


class UNDIAL(UnlearnMethod):
    """Distil the start with the logit of each answer token lowered by beta."""

    def prepare(self, batch: Batch) -> Batch:
        prepared = super().prepare(batch)
        # [T]: adapters of one batch may lower by different beta, so it travels with the tokens
        strength = self.number("beta", prepared)[prepared.sequence_of]
        prepared = prepared.with_extra(**{STRENGTH: BatchExtra(strength, "token")})
        if not self.first.peer_masks:
            return prepared
        # the peer also averages over prompts, and there lowers entry V - 100: its ignored label
        answer = prepared.extra[FORGET_WEIGHTS]
        return prepared.with_extra(
            **{ANSWER_WEIGHTS: answer, FORGET_WEIGHTS: full_weights(prepared, FORGET)}
        )

    def reference_wants(self, batch: Batch) -> Mapping[str, Want]:
        return {**super().reference_wants(batch), "hidden": FinalHidden()}

    def forget_wants(self) -> Mapping[str, Want]:
        score = lowered_cross_entropy(
            self._start_logits, lambda rows: rows.extra[STRENGTH], lowered_tokens
        )
        return {"forget": TokenScore(score, weights=FORGET_WEIGHTS)}

    def forget_values(self, got: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return token_sum(got["forget"], batch.extra[FORGET_WEIGHTS].values, batch)


class CEU(UnlearnMethod):
    """Cross-entropy with the model's own distribution without the answer token; an answer's first
    token is skipped, since it is where an answer's form, not its content, is chosen.
    """

    def prepare(self, batch: Batch) -> Batch:
        prepared = super().prepare(batch)
        counts = self.number("ignore_first_n_answer_tokens", prepared)
        weights = without_first_tokens(prepared, prepared.extra[FORGET_WEIGHTS].values, counts)
        return prepared.with_extra(**{FORGET_WEIGHTS: BatchExtra(weights, "token")})

    def forget_wants(self) -> Mapping[str, Want]:
        return {"forget": TokenScore(contrary_cross_entropy, weights=FORGET_WEIGHTS)}

    def forget_values(self, got: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return token_sum(got["forget"], batch.extra[FORGET_WEIGHTS].values, batch)


class WGA(UnlearnMethod):
    """Gradient ascent, each token weighed by a power of its probability: what is forgotten already
    is left alone.
    """

    def forget_values(self, got: Mapping[str, Tensor], batch: Batch) -> Tensor:
        beta = self.number("beta", batch, got)[batch.sequence_of]
        ascent = weighted_ascent(got["forget"], beta)
        return token_sum(ascent, batch.extra[FORGET_WEIGHTS].values, batch)


class SatImp(UnlearnMethod):
    """Gradient ascent, weighed by saturation p^beta1 and importance (1 - p)^beta2."""

    def forget_values(self, got: Mapping[str, Tensor], batch: Batch) -> Tensor:
        beta1, beta2 = (
            self.number(name, batch, got)[batch.sequence_of] for name in ("beta1", "beta2")
        )
        ascent = weighted_ascent(got["forget"], beta1, beta2)
        return token_sum(ascent, batch.extra[FORGET_WEIGHTS].values, batch)


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


class IHL(UnlearnMethod):
    """Inverted hinge: lower the answer token's probability until another one's is as far ahead as it
    can be; bounded, and made for adapters.
    """

    def forget_wants(self) -> Mapping[str, Want]:
        return {"forget": TokenScore(inverted_hinge, weights=FORGET_WEIGHTS)}

    def forget_values(self, got: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return token_sum(got["forget"], batch.extra[FORGET_WEIGHTS].values, batch)


class ME(UnlearnMethod):
    """Maximum entropy: KL from the uniform distribution at the answer's tokens."""

    def forget_wants(self) -> Mapping[str, Want]:
        return {"forget": TokenScore(uniform_divergence, weights=FORGET_WEIGHTS)}

    def forget_values(self, got: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return token_sum(got["forget"], batch.extra[FORGET_WEIGHTS].values, batch)


class IdkAP(UnlearnMethod):
    """A refusal is learnt for what is to be forgotten; at the retain rows the right answer is
    preferred to one (answer preservation, Yuan et al. 2025, arXiv 2410.08109).

    A forget row's own answer is not read: its refusal stands in its place. No start is asked.
    """

    needs_alternates = True
    needs_retain_alternates = True

    def prepare(self, batch: Batch) -> Batch:
        # before weights are made: those of a forget row are then the refusal's
        prepared = super().prepare(replace_by_alternates(batch, FORGET))
        return prepared.with_extra(**{PAIR_WEIGHTS: role_weights(prepared, RETAIN, ALTERNATE)})

    def forget_values(self, got: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return answer_nll(got["forget"], batch.extra[FORGET_WEIGHTS].values, batch)

    def retain_wants(self) -> Mapping[str, Want]:
        return {"pair": TokenScore(log_prob, weights=PAIR_WEIGHTS)} if self.retains else {}

    def retain_values(self, got: Mapping[str, Tensor], batch: Batch) -> Tensor:
        # log p(y): no reference, unlike DPO, so a reward is the likelihood itself
        likelihood = token_sum(got["pair"], batch.extra[PAIR_WEIGHTS].values, batch)
        own, other = partners(batch, RETAIN)
        values = preference_loss(
            likelihood[own], likelihood[other], self.number("beta", batch, got)[own]
        )
        return likelihood.new_zeros(len(batch)).index_copy(0, own, values)

    def _retain_weight(self, batch: Batch, adapters: int) -> Tensor:
        return batch.count("sequence", adapters, RETAIN)


class JensUn(UnlearnMethod):
    """Jensen-Shannon divergences, bounded by log 2: at the forget rows from the tokens of a refusal,
    repeated over the answer, at the retain rows from the start (arXiv 2509.02820).

    The refusal ends with its end of turn, as the authors' variant JensUnEOT does: a model that
    stops after it is what a run is for. Of the alternate only its tokens are needed: it is not run.
    The authors' code puts a 1 at every token of the refusal at once, prompts included, which is no
    distribution; here it is the paper's one token at each place of the answer.
    """

    fixed: ClassVar[Mapping[str, Any]] = {"retain_loss": "KL"}
    retain_divergence = "jsd"
    needs_alternates = True

    def prepare(self, batch: Batch) -> Batch:
        # before the alternates are left out: it is from them that the ids are read
        marked = batch.with_extra(**{REFUSAL_IDS: repeated_alternates(batch, FORGET)})
        without_alternates = [s for s, role in enumerate(marked.role) if role != ALTERNATE]
        return super().prepare(select_sequences(marked, without_alternates))

    def forget_wants(self) -> Mapping[str, Want]:
        return {"forget": TokenScore(one_hot_jsd(REFUSAL_IDS), weights=FORGET_WEIGHTS)}

    def forget_values(self, got: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return token_sum(got["forget"], batch.extra[FORGET_WEIGHTS].values, batch)


def lowered_tokens(rows: VocabRows) -> Tensor:
    """[t] the tokens that UNDIAL lowers: the targets, or, where the peer has no label, its -100
    counted from the end of the vocabulary.
    """
    answer = rows.extra.get(ANSWER_WEIGHTS)
    if answer is None:
        return rows.targets
    return torch.where(answer != 0, rows.targets, PEER_IGNORED_LABEL)


def steering_direction(width: int, seed: int) -> Tensor:
    """[D] float32, norm 1."""
    draw = torch.Generator().manual_seed(derive_seed("rmu", seed))
    # [0,1), not normal: no entry is pushed below 0, as the authors have it
    direction = torch.rand(width, generator=draw)
    return direction / direction.norm()


UNLEARN_METHODS: Mapping[str, type[UnlearnMethod]] = {
    "GradAscent": GradAscent,
    "GradDiff": GradDiff,
    "KL": KL,
    "NPO": NPO,
    "SimNPO": SimNPO,
    "DPO": DPO,
    "IdkDPO": DPO,
    "AltPO": DPO,
    "RMU": RMU,
    "UNDIAL": UNDIAL,
    "CEU": CEU,
    "WGA": WGA,
    "SatImp": SatImp,
    "PDU": PDU,
    "IHL": IHL,
    "ME": ME,
    "IdkAP": IdkAP,
    "JensUn": JensUn,
}


def make_method(
    name: str,
    job_settings: Sequence[Mapping[str, Any]],
    start: StartModel,
    *,
    direction_only: bool = False,
) -> UnlearnMethod:
    """A method for K adapters, ``job_settings`` those that each has of its own; ``direction_only``:
    see `UnlearnMethod`. Raises ConfigError: see `resolve_settings`.
    """
    settings = [resolve_settings(name, own) for own in job_settings]
    method = UNLEARN_METHODS[name](settings, start)
    method.direction_only = direction_only
    return method
