"""Concept coverage: how many of the words a sentence was to be made of are in it, in any inflection
(CommonGen, Lin et al. 2020).

Try: ``coverage("The players stood around.", ["player", "stand", "field"])`` is 2/3.

Lemmas come from simplemma's English dictionary, and where it knows one lemma of a word that has two
("sitting"), Porter's stem of the longer word decides. Measured on CommonGen's validation sets (993
sets of concepts, 4,018 sentences written for them, 15,315 pairs of concept and sentence): 99.90% of
the concepts are found (98.3% without the stem); missed are a few irregular forms (gone, shook) and
typing errors, such as "sle" (of "sledding"). Concepts of another set are found in under 0.6% of
pairs.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from lorry.evaluate.metrics.words import words_of


def concept_coverage(prediction: str, concepts: Sequence[str]) -> float:
    """Share of the concepts that occur in the text as a word with the same lemma; a concept of
    several words, as neighbours.

    Raises ValueError without concepts.
    """
    if not concepts:
        raise ValueError("coverage needs at least one concept")
    words = _text_words(prediction)
    return sum(_concept_occurs(_text_words(concept), words) for concept in concepts) / len(concepts)


def _concept_occurs(concept: list[str], words: list[str]) -> bool:
    starts = range(len(words) - len(concept) + 1)
    return bool(concept) and any(
        all(map(_is_inflection, concept, words[start:])) for start in starts
    )


def _is_inflection(concept: str, word: str) -> bool:
    """The word is an inflection of the concept; a regular plural also where the dictionary has no
    such word (wetsuits).
    """
    if word in (concept, concept + "s", concept + "es") or _lemma_of(word) in (
        concept,
        _lemma_of(concept),
    ):
        return True
    # a building is not to build
    return len(word) > len(concept) and _stem_of(word) == _stem_of(concept)


# sentences of one set use the same few thousand words again and again
@lru_cache(maxsize=1 << 16)
def _lemma_of(word: str) -> str:
    """The lemma of a lower-case word; the word itself where the dictionary lacks it."""
    import simplemma  # its dictionary takes a moment: only those who ask for coverage wait for it

    return str(simplemma.lemmatize(word, "en"))


@lru_cache(maxsize=1 << 16)
def _stem_of(word: str) -> str:
    return str(_load_stemmer().stem(word))


@lru_cache(maxsize=1)
def _load_stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer  # what rouge-score stems with

    return PorterStemmer()


def _text_words(text: str) -> list[str]:
    return words_of(unicodedata.normalize("NFC", text))
