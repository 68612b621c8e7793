"""Answers of a model to every question of a file, greedily, and their scores: exact match, ROUGE-L,
token F1, with intervals.

answers = generate_answers(model, tokenizer, conversations, adapters="default")  # Mix.none(): the base
mean_answer_scores(answers, [reference_answer(c) for c in conversations])  # {"exact_match": 0.8, ...}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lorry.adapters.mix import Mix
from lorry.data.reading.content import Conversation
from lorry.evaluate.metrics.registry import ReferenceTexts, bootstrap_interval, score_each
from lorry.generation.sampling import SamplingParams
from lorry.generation.text import GenerateFunction, generate_texts

# as `score_each` calls them, and as evaluation.json and the tables do
ANSWER_METRICS = {
    "exact_match": "exact_match",
    "exact_match_strict": "exact_match_strict",
    "rouge_l": "rouge_l",
    "token_f1": "f1",
}


def generate_answers(
    model: nn.Module,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    adapters: Mix | Sequence[str | None] | str | None,
    max_new_tokens: int = 64,
    batch_rows: int | None = None,
    system: str | None = None,
    generate: GenerateFunction | None = None,
) -> list[str]:
    """What the model says, greedily, in place of the last assistant message of each conversation,
    stripped.

    ``adapters``: a name, a Mix (`Mix.none()`: the base), one name or None (the base) per
    conversation, or None: what the model uses now. ``batch_rows``: rows alive at once; ``generate``: see
    `generate_texts`. Raises what `generation.engine.generate_completions` raises (ModelError for a
    prompt that the context cannot hold).
    """
    return generate_texts(
        model,
        tokenizer,
        conversations,
        SamplingParams(max_new_tokens=max_new_tokens),
        system=system,
        adapters=adapters,
        batch_rows=batch_rows,
        generate=generate,
    )


def reference_answer(conversation: Conversation) -> str:
    """The last thing the assistant says that is to be learnt: what an answer is compared with."""
    return next(
        m.content for m in reversed(conversation.messages) if m.role == "assistant" and m.learnt
    )


def score_answer_rows(
    predictions: Sequence[str], references: Sequence[ReferenceTexts]
) -> dict[str, list[float]]:
    """{exact_match, exact_match_strict, rouge_l, f1: one value per row}, each in [0, 1].

    exact_match and f1 compare normalised text (SQuAD's rule), exact_match_strict the text as it is
    but for white space around it. Raises DataError for lists of unequal length, empty ones, or a
    row without a reference.
    """
    each = score_each(predictions, references)
    return {shown: each[name] for name, shown in ANSWER_METRICS.items()}


def mean_answer_scores(
    predictions: Sequence[str], references: Sequence[ReferenceTexts]
) -> dict[str, float]:
    """The means of `score_answer_rows`. Raises DataError as it does."""
    return metric_means(score_answer_rows(predictions, references))


def metric_means(rows: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """{metric: mean over its rows}."""
    # fsum: the mean must not hang on the order of the rows
    return {name: math.fsum(values) / len(values) for name, values in rows.items()}


def metric_intervals(
    rows: Mapping[str, Sequence[float]], seed: int = 0
) -> dict[str, tuple[float, float]]:
    """{metric: (low, high)}: the 95% percentile bootstrap interval of each mean; without those of
    too few rows.
    """
    intervals = {name: bootstrap_interval(values, seed) for name, values in rows.items()}
    return {name: ends for name, ends in intervals.items() if all(map(math.isfinite, ends))}
