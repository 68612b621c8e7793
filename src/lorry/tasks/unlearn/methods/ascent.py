"""Methods that ascend the loss of what is to be forgotten: as it is, or each token weighed by its
probability.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lorry.data.batch import Batch
from lorry.tasks.unlearn.losses import answer_nll, token_sum, weighted_ascent
from lorry.tasks.unlearn.methods.method import FORGET_WEIGHTS, UnlearnMethod


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
