"""The trainer's side of a probe, for a model that is trained by Lorry in this process."""

from __future__ import annotations

from collections.abc import Sequence

from lorry.adapters.mix import Mix
from lorry.backends.protocol import ScoringBackend
from lorry.data.batch import TokenizedExample, collate
from lorry.integrations.rollout.proofs import ScoreAnswers
from lorry.models.scoring.score import TokenScore
from lorry.models.scoring.vocab import log_prob


def score_answers(scorer: ScoringBackend, mix: Mix) -> ScoreAnswers:
    """Log-probabilities of answers under a mix: `Mix.one(NAME)` for the policy, `Mix.none()` for the
    base. ``scorer``: a `ModelScorer`, or a task's model."""

    def score(
        prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        rows = [
            TokenizedExample([*prompt, *answer], [0.0] * len(prompt) + [1.0] * len(answer), key=row)
            for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        batch = collate(rows)
        values = scorer.score([batch], {"logprob": TokenScore(log_prob)}, mix)[0]["logprob"]
        return [
            values[stop - len(answer) : stop].tolist()
            for (_, stop), answer in zip(batch.segments, answers, strict=True)
        ]

    return score
