"""Text metrics of `lorry eval`: exact match, ROUGE-L, token F1, perplexity, and an interval for any of their means.

Try: ``summarise(["The cat sat."], ["A cat sat"])["exact_match"]`` is 1.0. A reference may be one string or a list of
acceptable ones, of which the best match counts. No torch: everything here works on strings and numbers read from files.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from lorry.errors import DataError

References = str | Sequence[str]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
# Ideographs and kana are written without spaces, so each one is a word of its own.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff"
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


class RougeL(NamedTuple):
    """ROUGE-L of one prediction (Lin 2004): from the longest common subsequence of words, each in [0, 1]."""

    precision: float
    recall: float
    fmeasure: float


def normalise(text: str) -> str:
    """Lowercase, drop punctuation, drop the articles a/an/the, collapse white space: SQuAD's rule (Rajpurkar et al. 2016).

    On ASCII text this is the official SQuAD script with one exception: a text of articles alone keeps them, since the
    answer "A" to a multiple choice would otherwise equal "the". Beyond ASCII, all Unicode punctuation is dropped too
    (curly quotes) and composed and decomposed accents are made equal (NFC).
    """
    lowered = unicodedata.normalize("NFC", text).lower()
    bare = "".join(c for c in lowered if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return " ".join(_ARTICLES.sub(" ", bare).split() or bare.split())


def exact_match(prediction: str, references: References, strict: bool = False) -> float:
    """1.0 if the prediction equals a reference after `normalise`, else 0.0.

    strict: only white space around the text is ignored; case, punctuation, articles and inner spaces count.
    """
    prepare: Callable[[str], str] = str.strip if strict else normalise
    return float(prepare(prediction) in {prepare(r) for r in _as_list(references)})


def token_f1(prediction: str, references: References) -> float:
    """F1 of the words shared after `normalise`, counted with multiplicity (SQuAD's F1); the best reference counts.

    Two texts that are both empty after normalising agree (1.0); one empty text shares nothing (0.0).
    """
    words = normalise(prediction).split()
    return max(_f1(words, normalise(r).split()) for r in _as_list(references))


def _f1(predicted: list[str], expected: list[str]) -> float:
    if not predicted or not expected:
        return float(predicted == expected)
    shared = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * shared / (len(predicted) + len(expected))


def rouge_l(prediction: str, references: References, stemmer: bool = False) -> RougeL:
    """ROUGE-L by the `rouge-score` library; with several references the best of each number.

    stemmer: Porter-stem words of more than three letters first, as TOFU's published numbers do.
    The library's words are runs of ASCII letters and digits, which makes published numbers comparable but leaves nothing
    of other scripts: where fewer than half of a reference's letters are ASCII, words of any script are taken instead.
    """
    scores = []
    for reference in _as_list(references):
        letters = [c for c in reference if c.isalpha()]
        any_script = sum(c.isascii() for c in letters) * 2 < len(letters)
        scores.append(_rouge_scorer(stemmer, any_script).score(reference, prediction)["rougeL"])
    return RougeL(*(float(max(column)) for column in zip(*scores, strict=True)))


class _AnyScript:
    """Lower-case words of any script, in the shape `rouge-score` asks of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return _WORDS.findall(text.lower())


@lru_cache(maxsize=4)
def _rouge_scorer(stemmer: bool, any_script: bool) -> Any:
    from rouge_score import rouge_scorer  # pulls in nltk; only those who ask for ROUGE wait for it

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=stemmer, tokenizer=_AnyScript() if any_script else None)


def perplexity(nll_sum: float, count: float) -> float:
    """exp(sum of negative log-likelihoods in nats / number of tokens); infinity when that overflows.

    Raises DataError when no token was counted, since there is no perplexity of nothing.
    """
    if count <= 0:
        raise DataError(f"perplexity needs at least one supervised token, got {count}; check that the rows have answers")
    mean = nll_sum / count
    return math.exp(mean) if mean < 709.0 else math.inf if mean == mean else math.nan


def bootstrap_interval(
    values: Sequence[float], seed: int = 0, confidence: float = 0.95, resamples: int = 1000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of per-example values (Efron 1979): (low, high), a function of the seed.

    Raises ValueError for no values, a value that is not finite, or a confidence outside (0, 1).
    """
    import numpy  # the report matches strings with this module and draws no interval

    data = numpy.asarray(values, dtype=numpy.float64)
    if data.size == 0 or not numpy.isfinite(data).all():
        raise ValueError(f"a bootstrap needs at least one value, all of them finite; got {data.size} values")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    random = numpy.random.default_rng(seed)
    means = [data[random.integers(data.size, size=data.size)].mean() for _ in range(resamples)]
    low, high = numpy.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def score_each(predictions: Sequence[str], references: Sequence[References], stemmer: bool = False) -> dict[str, list[float]]:
    """Every metric of every example: {name: [n]}, the values that `summarise` averages and `bootstrap_interval` resamples.

    Raises DataError when the two lists differ in length, are empty, or an example has no reference.
    """
    if len(predictions) != len(references) or not predictions:
        raise DataError(f"{len(predictions)} predictions and {len(references)} references; both must be equal and above 0")
    if missing := [i for i, r in enumerate(references) if not _as_list(r)]:
        raise DataError(f"example {missing[0]} has no reference ({len(missing)} such); give each at least one string")
    pairs = list(zip(predictions, references, strict=True))
    rouge = [rouge_l(p, r, stemmer) for p, r in pairs]
    return {
        "exact_match": [exact_match(p, r) for p, r in pairs],
        "exact_match_strict": [exact_match(p, r, strict=True) for p, r in pairs],
        "token_f1": [token_f1(p, r) for p, r in pairs],
        "rouge_l": [r.fmeasure for r in rouge],
        "rouge_l_recall": [r.recall for r in rouge],
    }


def summarise(predictions: Sequence[str], references: Sequence[References], stemmer: bool = False) -> dict[str, float]:
    """The mean of every metric of `score_each`, and ``count``, the number of examples. Raises DataError as it does."""
    each = score_each(predictions, references, stemmer)
    return {"count": float(len(predictions)), **{name: math.fsum(v) / len(v) for name, v in each.items()}}


def _as_list(references: References) -> list[str]:
    return [references] if isinstance(references, str) else list(references)
