"""Methods that prefer one answer to another, or to what the start makes of it: likelihoods of whole
answers under a sigmoid.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorry.data.batch import Batch
from lorry.models.scoring.score import TokenScore, Want, log_prob
from lorry.tasks.unlearn.losses import (
    answer_nll,
    npo_loss,
    preference_loss,
    simnpo_loss,
    token_sum,
)
from lorry.tasks.unlearn.methods.method import FORGET_WEIGHTS, UnlearnMethod, reference
from lorry.tasks.unlearn.pairing import (
    ALTERNATE,
    FORGET,
    RETAIN,
    partners,
    replace_by_alternates,
    role_weights,
)

PAIR_WEIGHTS = "pair_weights"  # the extra: the weights of the answers that are compared


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
