"""Whether an answer is language at all, without a downloaded classifier: token entropy, repeated
4-grams.

Try: ``token_entropy([7, 7, 7, 7])`` is 0.0; ``repeated_ngrams([1, 2, 3, 4] * 3)`` is 5/9.

This is not open-unlearning's ``gibberish`` (the mean probability that a DistilBERT classifier finds
a text clean): no model is downloaded here. Random words have a high entropy, so look at the start's
own perplexity of the answer beside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

NGRAM = 4


def token_entropy(tokens: Sequence[int]) -> float:
    """Entropy of an answer's token counts over log2 of their number, 0 to 1 (closer-look's "token
    entropy", arXiv 2410.08109); 0 for fewer than two tokens.
    """
    if len(tokens) < 2:
        return 0.0
    shares = [count / len(tokens) for count in Counter(tokens).values()]
    # abs: a sum of negative terms, and 0.0 rather than -0.0 for a single token repeated
    return abs(math.fsum(p * math.log2(p) for p in shares)) / math.log2(len(tokens))


def repeated_ngrams(tokens: Sequence[int], n: int = NGRAM) -> float:
    """Share of an answer's n-grams that stood in it before, 0 to 1; 0 where there are none."""
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
