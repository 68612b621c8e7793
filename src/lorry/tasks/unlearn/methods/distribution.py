"""Methods that give the answer's tokens another distribution: one lowered or cut by the model's own or
the start's logits, a flat one, or that of a refusal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorry.data.batch import Batch, BatchExtra
from lorry.data.stream.joint import select_sequences
from lorry.models.scoring.score import FinalHidden, TokenScore, Want
from lorry.models.scoring.unlearning import (
    contrary_cross_entropy,
    inverted_hinge,
    lowered_cross_entropy,
    one_hot_jsd,
    uniform_divergence,
)
from lorry.models.scoring.vocab import VocabRows
from lorry.tasks.unlearn.losses import token_sum
from lorry.tasks.unlearn.methods.method import FORGET_WEIGHTS, UnlearnMethod
from lorry.tasks.unlearn.pairing import (
    ALTERNATE,
    FORGET,
    full_weights,
    repeated_alternates,
    without_first_tokens,
)

# names of extras: of UNDIAL its beta, and the answers' weights where the peer has prompts in its mean too;
# of JensUn the token that each answer token is to give way to
STRENGTH, ANSWER_WEIGHTS, REFUSAL_IDS = "strength", "answer_weights", "refusal_ids"
PEER_IGNORED_LABEL = -100


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
