"""Concept coverage: how many of the words a sentence was to be made of are in it, in any inflection (CommonGen, Lin et al. 2020).

Try: ``coverage("The players stood around.", ["player", "stand", "field"])`` is 2/3.

Lemmas come from lemminflect's English dictionary. Measured on CommonGen's validation sets (993 sets of concepts, 4,018 sentences
written for them, 15,315 pairs of concept and sentence): it finds 99.89% of the concepts, mean coverage 0.9988; what it misses are
typing errors and "sle" (of "sledding"). simplemma 2.0.0, used alike, finds 98.68%: it gives a word one lemma, and "sitting" and
"cut" have two. Concepts of another set are found in 0.34% and 0.32% of 14,916 pairs, by eye where they do occur. lemminflect is
0.8 MB (simplemma: 19 MB, 54 languages) and rests: 0.2.3 is of 2022 and pure Python; simplemma is maintained. Its rules for
unknown words, which take "bed" for a form of "be", are not used.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from lorry.evaluate.words import words_of


def coverage(prediction: str, concepts: Sequence[str]) -> float:
    """Share of the concepts that occur in the text as a word with the same lemma; a concept of several words, as neighbours.

    Raises ValueError without concepts.
    """
    if not concepts:
        raise ValueError("coverage needs at least one concept")
    words = _words(prediction)
    return sum(_occurs(_words(concept), words) for concept in concepts) / len(concepts)


def _occurs(concept: list[str], words: list[str]) -> bool:
    starts = range(len(words) - len(concept) + 1)
    return bool(concept) and any(all(map(_same, concept, words[start:])) for start in starts)


def _same(concept: str, word: str) -> bool:
    """The word is an inflection of the concept; a regular plural also where the dictionary has no such word (wetsuits)."""
    return word in (concept, concept + "s", concept + "es") or not _base(concept).isdisjoint(_lemmas(word))


def _base(concept: str) -> frozenset[str]:
    """The concept itself if it is a lemma (a building is not to build), else its lemmas."""
    return frozenset({concept}) if concept in _lemmas(concept) else _lemmas(concept)


@lru_cache(maxsize=1 << 16)
def _lemmas(word: str) -> frozenset[str]:
    """Every lemma of a lower-case word, whatever its part of speech; the word itself where the dictionary lacks it."""
    import lemminflect  # loads numpy and a dictionary of 0.6 MB: only those who ask for coverage wait for it

    found = lemminflect.getAllLemmas(word)
    return frozenset(lemma for lemmas in found.values() for lemma in lemmas) or frozenset({word})


def _words(text: str) -> list[str]:
    return words_of(unicodedata.normalize("NFC", text))
