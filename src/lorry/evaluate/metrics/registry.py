"""Text metrics of `lorry eval`, each with a bootstrap interval: `measure_metrics` for answers,
`measure_options` for choices.

Try: ``measure(["rouge_l", "bleu"], ["The cat sat."], [["A cat sat down."]])["bleu"].interval``. A
reference may be one string or a list of acceptable ones. No torch: everything here works on strings
and numbers read from files.

Why no metric here asks a model. BERTScore, BLEURT, CodeBERTScore and their kind need weights that
have to be downloaded (BERTScore's default is roberta-large, 1.4 GB) and often more time on a CPU
than the answers took; their numbers belong to one model, layer and version. Use instead, by task:

- summaries (xsum, samsum, qmsum): rouge_1, rouge_2, rouge_l with all references
- translation: chrf (any script, forgives inflection) and bleu, with sacreBLEU's signature
- sentences from concepts: coverage for what had to be said, bleu or rouge_l for how
- truthfulness, choices, yes or no: the options ranked by log-likelihood, `measure_options`, with their calibration
- short answers (squad, coqa): exact_match and token_f1 with all references
- mathematics: number_match
- code: chrf and exact_match_strict say how near the text is; only running it says whether it works
- a paraphrase that shares no word: no metric of words sees it; the references' perplexity under the model does, in part
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lorry.errors import ConfigError, DataError, suggest_nearest
from lorry.evaluate.metrics.bootstrap import MetricEstimate, bootstrap_interval, estimate_mean
from lorry.evaluate.metrics.calibration import OPTION_METRICS, measure_options
from lorry.evaluate.metrics.corpus import CORPUS_METRICS
from lorry.evaluate.metrics.coverage import concept_coverage
from lorry.evaluate.metrics.number import final_number, number_match
from lorry.evaluate.metrics.words import (
    ReferenceTexts,
    as_list,
    exact_match,
    normalize_answer,
    rouge_l,
    rouge_n,
    token_f1,
    words_of,
)

__all__ = [
    "CORPUS_METRICS",
    "OPTION_METRICS",
    "ROW_METRICS",
    "MetricEstimate",
    "MetricRow",
    "ReferenceTexts",
    "bootstrap_interval",
    "check_metrics",
    "concept_coverage",
    "corpus_perplexity",
    "exact_match",
    "mean_scores",
    "measure_metrics",
    "measure_options",
    "normalize_answer",
    "number_match",
    "rouge_l",
    "rouge_n",
    "score_each",
    "token_f1",
]


class MetricRow(NamedTuple):
    """What a row metric sees: an answer, its references, and the concepts it was to use."""

    prediction: str
    references: Sequence[str]
    concepts: Sequence[str] = ()


# Means of rows, each row's value in [0, 1]. ROUGE here is the F-measure without stemming.
ROW_METRICS: dict[str, Callable[[MetricRow], float]] = {
    "exact_match": lambda row: exact_match(row.prediction, row.references),
    "exact_match_strict": lambda row: exact_match(row.prediction, row.references, strict=True),
    "token_f1": lambda row: token_f1(row.prediction, row.references),
    "rouge_1": lambda row: rouge_n(row.prediction, row.references, 1).fmeasure,
    "rouge_2": lambda row: rouge_n(row.prediction, row.references, 2).fmeasure,
    "rouge_l": lambda row: rouge_l(row.prediction, row.references).fmeasure,
    "coverage": lambda row: concept_coverage(row.prediction, row.concepts),
    "number_match": lambda row: number_match(row.prediction, row.references),
}


def measure_metrics(
    names: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[ReferenceTexts],
    *,
    concepts: Sequence[Sequence[str]] = (),
    seed: int = 0,
) -> dict[str, MetricEstimate]:
    """{name: its value, 95% bootstrap interval and, for a mean of rows, the rows}, for metrics of
    ROW_METRICS and CORPUS_METRICS.

    Values are in [0, 1], but for bleu and chrf: 0 to 100, as published. ``references``: one or more
    a row; ``concepts``: by row, for coverage alone, which needs no references. Every metric
    resamples the same rows (``seed``). Raises what `check_metrics` raises.
    """
    if len(predictions) != len(references):
        raise DataError(
            f"{len(predictions)} predictions and {len(references)} references; both must be equal and above 0"
        )
    check_metrics(names, references, concepts=concepts)
    listed = [as_list(r) for r in references]
    rows = [
        MetricRow(p, r, c)
        for p, r, c in zip(predictions, listed, concepts or [()] * len(listed), strict=True)
    ]
    measured = {}
    for name in names:
        if name in CORPUS_METRICS:
            measured[name] = CORPUS_METRICS[name](predictions, listed, seed)
        else:
            measured[name] = estimate_mean([ROW_METRICS[name](row) for row in rows], seed)
    return measured


def check_metrics(
    names: Sequence[str],
    references: Sequence[ReferenceTexts],
    *,
    concepts: Sequence[Sequence[str]] = (),
) -> None:
    """Whether `measure_metrics` can work, to be asked before answers are generated.

    Raises ConfigError for an unknown metric (with those that exist); DataError for no rows, or for
    a row that lacks what a metric compares with: a reference, a number in one of them
    (number_match), concepts with a letter or digit (coverage).
    """
    known = [*ROW_METRICS, *CORPUS_METRICS]
    if unknown := [name for name in names if name not in known]:
        near = suggest_nearest(unknown[0], known)
        raise ConfigError(
            f"no metric {unknown[0]!r}{near}; there are {', '.join(known)} (choices are scored by their options)"
        )
    if not references:
        raise DataError("there are no rows to measure; give at least one")
    if concepts and len(concepts) != len(references):
        raise DataError(
            f"{len(references)} rows and {len(concepts)} lists of concepts; give one list per row"
        )
    if "coverage" in names:
        _check_each_row(
            list(concepts) or [()] * len(references), _has_concepts, "concepts of letters or digits"
        )
    if set(names) - {"coverage"}:
        _check_each_row(references, as_list, "reference")
    if "number_match" in names:
        _check_each_row(
            references,
            lambda r: any(final_number(text) is not None for text in as_list(r)),
            "reference with a number",
        )


def _has_concepts(concepts: Sequence[str]) -> bool:
    return bool(concepts) and all(words_of(concept) for concept in concepts)


def _check_each_row(rows: Sequence, holds: Callable[..., object], what: str) -> None:
    if missing := [number for number, row in enumerate(rows) if not holds(row)]:
        raise DataError(
            f"example {missing[0]} has no {what} ({len(missing)} such); give every example at least one"
        )


def corpus_perplexity(nll_sum: float, count: float) -> float:
    """exp(sum of negative log-likelihoods in nats / number of tokens); infinity when that
    overflows.

    Raises DataError when no token was counted, since there is no perplexity of nothing.
    """
    if count <= 0:
        raise DataError(
            f"perplexity needs at least one supervised token, got {count}; check that the rows have answers"
        )
    mean = nll_sum / count
    # exp(709.78) is the largest double; NaN is unequal to itself and must stay NaN
    return math.exp(mean) if mean < 709.0 else math.inf if mean == mean else math.nan


def score_each(
    predictions: Sequence[str], references: Sequence[ReferenceTexts], stemmer: bool = False
) -> dict[str, list[float]]:
    """Every metric of every example: {name: [n]}, the values that `mean_scores` averages and
    `bootstrap_interval` resamples.

    Raises DataError when the two lists differ in length, are empty, or an example has no reference.
    """
    if len(predictions) != len(references) or not predictions:
        raise DataError(
            f"{len(predictions)} predictions and {len(references)} references; both must be equal and above 0"
        )
    _check_each_row(references, as_list, "reference")
    pairs = list(zip(predictions, references, strict=True))
    rouge = [rouge_l(p, r, stemmer) for p, r in pairs]
    return {
        "exact_match": [exact_match(p, r) for p, r in pairs],
        "exact_match_strict": [exact_match(p, r, strict=True) for p, r in pairs],
        "token_f1": [token_f1(p, r) for p, r in pairs],
        "rouge_l": [r.fmeasure for r in rouge],
        # TOFU's ROUGE is the recall
        "rouge_l_recall": [r.recall for r in rouge],
    }


def mean_scores(
    predictions: Sequence[str], references: Sequence[ReferenceTexts], stemmer: bool = False
) -> dict[str, float]:
    """The mean of every metric of `score_each`, and ``count``, the number of examples. Raises
    DataError as it does.
    """
    each = score_each(predictions, references, stemmer)
    return {
        "count": float(len(predictions)),
        **{name: math.fsum(v) / len(v) for name, v in each.items()},
    }
