"""Metrics of one answer against its references, from words alone: exact match, token F1, ROUGE-1,
ROUGE-2, ROUGE-L.

Try: ``exact_match("The cat sat.", "A cat sat")`` is 1.0. A reference may be one string or a list of
acceptable ones, of which the best match counts. No torch: everything here works on strings read
from files.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

ReferenceTexts = str | Sequence[str]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
# Ideographs and kana are written without spaces, so each one is a word of its own.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff"
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


class RougeScore(NamedTuple):
    """ROUGE of one prediction (Lin 2004): from shared word n-grams or the longest common
    subsequence, each in [0, 1].
    """

    precision: float
    recall: float
    fmeasure: float


def as_list(references: ReferenceTexts) -> list[str]:
    """A row's references as a list."""
    return [references] if isinstance(references, str) else list(references)


def words_of(text: str) -> list[str]:
    """Lower-case words of any script: runs of letters and digits; of scripts written without
    spaces, each character.
    """
    return _WORDS.findall(text.lower())


def normalize_answer(text: str) -> str:
    """Lowercase, drop punctuation, drop the articles a/an/the, collapse white space: SQuAD's rule
    (Rajpurkar et al. 2016).

    On ASCII text this is the official SQuAD script with one exception: a text of articles alone
    keeps them, since the answer "A" to a multiple choice would otherwise equal "the". Beyond ASCII,
    all Unicode punctuation is dropped too (curly quotes) and composed and decomposed accents are
    made equal (NFC).
    """
    lowered = unicodedata.normalize("NFC", text).lower()
    bare = "".join(
        c
        for c in lowered
        if c not in string.punctuation and not unicodedata.category(c).startswith("P")
    )
    return " ".join(_ARTICLES.sub(" ", bare).split() or bare.split())


def exact_match(prediction: str, references: ReferenceTexts, strict: bool = False) -> float:
    """1.0 if the prediction equals a reference after `normalize_answer`, else 0.0.

    strict: only white space around the text is ignored; case, punctuation, articles and inner
    spaces count.
    """
    prepare: Callable[[str], str] = str.strip if strict else normalize_answer
    return float(prepare(prediction) in {prepare(r) for r in as_list(references)})


def token_f1(prediction: str, references: ReferenceTexts) -> float:
    """F1 of the words shared after `normalize_answer`, counted with multiplicity (SQuAD's F1); the
    best reference counts.

    Two texts that are both empty after normalising agree (1.0); one empty text shares nothing
    (0.0).
    """
    words = normalize_answer(prediction).split()
    return max(_f1(words, normalize_answer(r).split()) for r in as_list(references))


def _f1(predicted: list[str], expected: list[str]) -> float:
    if not predicted or not expected:
        # SQuAD's rule: two empty texts agree
        return float(predicted == expected)
    shared = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * shared / (len(predicted) + len(expected))


def rouge_n(
    prediction: str, references: ReferenceTexts, n: int, stemmer: bool = False
) -> RougeScore:
    """ROUGE-N (Lin 2004, section 2): word n-grams shared, counted with multiplicity; words and
    references as `rouge_l`.
    """
    return _rouge_score(f"rouge{n}", prediction, references, stemmer)


def rouge_l(prediction: str, references: ReferenceTexts, stemmer: bool = False) -> RougeScore:
    """ROUGE-L by the `rouge-score` library; with several references the best of each number.

    stemmer: Porter-stem words of more than three letters first, as TOFU's published numbers do. The
    library's words are runs of ASCII letters and digits, which makes published numbers comparable
    but leaves nothing of other scripts: where fewer than half of a reference's letters are ASCII,
    words of any script are taken instead.
    """
    return _rouge_score("rougeL", prediction, references, stemmer)


def _rouge_score(
    kind: str, prediction: str, references: ReferenceTexts, stemmer: bool
) -> RougeScore:
    scores = []
    for reference in as_list(references):
        letters = [c for c in reference if c.isalpha()]
        # by the reference alone: what a model answers must not choose how it is scored
        any_script = sum(c.isascii() for c in letters) * 2 < len(letters)
        scores.append(_rouge_scorer(kind, stemmer, any_script).score(reference, prediction)[kind])
    return RougeScore(*(float(max(column)) for column in zip(*scores, strict=True)))


class _AnyScriptTokenizer:
    """Words of any script, in the shape `rouge-score` asks of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words_of(text)


@lru_cache(maxsize=16)
def _rouge_scorer(kind: str, stemmer: bool, any_script: bool) -> Any:
    from rouge_score import rouge_scorer  # pulls in nltk; only those who ask for ROUGE wait for it

    return rouge_scorer.RougeScorer(
        [kind], use_stemmer=stemmer, tokenizer=_AnyScriptTokenizer() if any_script else None
    )
