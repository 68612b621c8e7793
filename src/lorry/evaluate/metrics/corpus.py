"""BLEU and chrF of a whole set of answers, by sacreBLEU, with bootstrap intervals.

Try: ``bleu(["the cat is on the mat"], [["the cat sat on the mat", "there is a cat on the
mat"]]).signature``.

sacreBLEU counts n-grams row by row; the corpus score is a function of the summed counts. That
function is written here a second time for all resamples at once, since the library scores one
resample at a time; the value itself is the library's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lorry.evaluate.metrics.bootstrap import MetricEstimate, corpus_interval
from lorry.evaluate.metrics.words import ReferenceTexts, as_list

if TYPE_CHECKING:
    import numpy


def corpus_bleu(
    predictions: Sequence[str], references: Sequence[ReferenceTexts], seed: int = 0
) -> MetricEstimate:
    """Corpus BLEU (Papineni et al. 2002), 0 to 100, as sacreBLEU publishes it (Post 2018):
    tokenizer 13a, exponential smoothing.

    13a splits words at spaces, so text in a script without them (Chinese, Japanese, Thai) is better
    scored by `corpus_chrf`.
    """
    from sacrebleu.metrics import BLEU

    # force: no warning about text that looks tokenized already; nothing else hangs on it
    return _corpus_estimate(
        BLEU(tokenize="13a", force=True), bleu_of_sums, predictions, references, seed
    )


def corpus_chrf(
    predictions: Sequence[str], references: Sequence[ReferenceTexts], seed: int = 0
) -> MetricEstimate:
    """Corpus chrF2 (Popović 2015), 0 to 100, as sacreBLEU publishes it: character n-grams up to 6,
    recall counts twice.

    Needs no words, so it works in every script and forgives inflection.
    """
    from sacrebleu.metrics import CHRF

    return _corpus_estimate(CHRF(), chrf_of_sums, predictions, references, seed)


CORPUS_METRICS: dict[
    str, Callable[[Sequence[str], Sequence[ReferenceTexts], int], MetricEstimate]
] = {
    "bleu": corpus_bleu,
    "chrf": corpus_chrf,
}


def _corpus_estimate(
    metric: Any,
    score: Callable[[numpy.ndarray], numpy.ndarray],
    predictions: Sequence[str],
    references: Sequence[ReferenceTexts],
    seed: int,
) -> MetricEstimate:
    rows = [as_list(r) for r in references]
    # sacreBLEU wants the first reference of every row, then the second of every row, with None
    # where a row has no more.
    columns = [
        [row[n] if n < len(row) else None for row in rows] for n in range(max(map(len, rows)))
    ]
    # private, but the only place where sacreBLEU has counts by row; the tests hold its public score
    statistics = metric._extract_corpus_statistics(predictions, columns)
    value = float(metric._aggregate_and_compute(statistics).score)
    return MetricEstimate(
        value, corpus_interval(statistics, score, seed), signature=metric.get_signature().format()
    )


def bleu_of_sums(sums: numpy.ndarray, orders: int = 4) -> numpy.ndarray:
    """BLEU of summed counts: [resamples, 2 + 2 * orders] (words said, words of the closest
    references, n-grams shared by order, n-grams said by order) to [resamples], in 0 to 100.

    An order without a match counts 1 / 2^k of a match for the k-th such order (NIST's exponential
    smoothing, Chen and Cherry 2014, method 3); without any shared word, or without n-grams of an
    order at all, BLEU is 0.
    """
    import numpy

    predicted, expected, shared, total = (
        sums[:, 0],
        sums[:, 1],
        sums[:, 2 : 2 + orders],
        sums[:, 2 + orders :],
    )
    # cumsum: the k-th order without a match counts 1 / 2^k
    smoothed = numpy.where(shared > 0, shared, 0.5 ** numpy.cumsum(shared == 0, axis=1))
    logs = numpy.log(smoothed / numpy.maximum(total, 1)).mean(axis=1)
    brevity = numpy.minimum(0.0, 1 - expected / numpy.maximum(predicted, 1))
    return numpy.where(
        (shared > 0).any(axis=1) & (total > 0).all(axis=1), 100 * numpy.exp(brevity + logs), 0.0
    )


def chrf_of_sums(sums: numpy.ndarray, beta: float = 2.0) -> numpy.ndarray:
    """chrF of summed counts: [resamples, 3 * orders] (n-grams said, in the reference, shared, by
    order) to [resamples], in 0 to 100: F-beta of the precision and recall averaged over the orders
    that both sides have.
    """
    import numpy

    predicted, expected, shared = numpy.moveaxis(sums.reshape(len(sums), -1, 3), 2, 0)
    both = (predicted > 0) & (expected > 0)
    orders = numpy.maximum(both.sum(axis=1), 1)
    precision = (shared / numpy.maximum(predicted, 1) * both).sum(axis=1) / orders
    recall = (shared / numpy.maximum(expected, 1) * both).sum(axis=1) / orders
    # 0 only where both are: the quotient is 0 there and divides by 1
    below = beta**2 * precision + recall
    return 100 * (1 + beta**2) * precision * recall / numpy.where(below > 0, below, 1.0)
