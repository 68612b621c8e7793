"""How firmly a model holds given answers: probability, probability among options, exact
memorization, extraction strength.

Try: ``extraction_strength([False, True, True])`` is 2/3.

Everything here works on the numbers of one answer under teacher forcing, no model is asked. **Which
token counts differs by metric, as in open-unlearning**: a probability is over the answer *and* its
end of turn, exact memorization and extraction strength are over the answer alone. The caller passes
the tokens that count.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from lorry.errors import DataError


def mean_loss(log_probs: Sequence[float]) -> float:
    """Mean negative log-likelihood of tokens, nats. Raises DataError for no tokens."""
    if not log_probs:
        raise DataError("an answer without tokens has no probability; give every row an answer")
    return -math.fsum(log_probs) / len(log_probs)


def probability(loss: float) -> float:
    """exp(-mean loss): the geometric mean of the tokens' probabilities, as TOFU has it (Maini et
    al. 2024, section 2.2.1).
    """
    return math.exp(-loss)


def probability_with_options(loss: float, wrong: Sequence[float]) -> float:
    """p / (p + sum of the wrong answers' p), from mean losses; TOFU's for real authors and world
    facts. Raises DataError without a wrong answer.
    """
    if not wrong:
        raise DataError("a probability among options needs at least one wrong answer")
    # divided by p first: of losses in the hundreds every p is 0 and the quotient still is a number
    return 1 / (1 + math.fsum(bounded_exp(loss - other) for other in wrong))


def exact_memorization(correct: Sequence[bool]) -> float:
    """Share of tokens that are the likeliest ones (Tirumala et al. 2022). Raises DataError for no
    tokens.
    """
    if not correct:
        raise DataError("an answer without tokens cannot be memorized; give every row an answer")
    return sum(correct) / len(correct)


def extraction_strength(correct: Sequence[bool], peer_floor: bool = False) -> float:
    """1 - k / n: k is the first of n places from which all tokens to the end are the likeliest ones
    (Carlini et al. 2021); 0 where even the last is not.

    ``peer_floor``: 1 / n there, as open-unlearning's loop gives, which cannot tell a total miss from
    an answer whose last token alone is right. Raises DataError for no tokens.
    """
    if not correct:
        raise DataError("an answer without tokens cannot be extracted; give every row an answer")
    suffix = next((n for n, hit in enumerate(reversed(correct)) if not hit), len(correct))
    return max(suffix, int(peer_floor)) / len(correct)


def bounded_exp(value: float) -> float:
    """exp, the largest double where a double cannot hold it: JSON has no infinity."""
    return math.exp(value) if value < 709.0 else sys.float_info.max if value == value else math.nan
