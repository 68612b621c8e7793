"""The learning rate as a pure function of the step: linear, cosine, constant, constant_with_warmup.

    rate(0, 1000, kind="cosine", base=2e-4, warmup=30)  # 0.0, the rate of the first update

Steps count from 0: ``rate(i, ...)`` is the rate of the (i+1)-th update. With a warmup of w > 0 the
first update has rate 0 (it moves nothing but the moments), update w+1 is the first with ``base``,
and the last of ``total`` updates has a rate just above 0; ``rate(total, ...)`` would be 0. These
are the values of ``transformers.get_scheduler`` to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from lorry.errors import ConfigError, suggest_nearest

# After the warmup: (steps since then, steps from then to the end) -> a factor on the base rate.
SCHEDULE_SHAPES: dict[str, Callable[[int, int], float]] = {
    "linear": lambda i, n: max(0.0, (n - i) / max(1, n)),
    "cosine": lambda i, n: max(0.0, 0.5 * (1.0 + math.cos(math.pi * (i / max(1, n))))),
    "constant": lambda i, n: 1.0,
    "constant_with_warmup": lambda i, n: 1.0,
}


def learning_rate_at(step: int, total: int, *, kind: str, base: float, warmup: int = 0) -> float:
    """The learning rate of update ``step`` (from 0) of ``total``, after ``warmup`` steps of linear
    rise from 0.

    Raises ConfigError on an unknown kind, and on "constant" with a warmup, which transformers
    ignores without a word.
    """
    if kind not in SCHEDULE_SHAPES:
        raise ConfigError(
            f"lr_scheduler_type={kind!r} is unknown; choose one of: {', '.join(SCHEDULE_SHAPES)}{suggest_nearest(kind, SCHEDULE_SHAPES)}"
        )
    if kind == "constant" and warmup:
        raise ConfigError(
            f"lr_scheduler_type=constant has no warmup, got {warmup} steps; use constant_with_warmup or set it to 0"
        )
    if step < 0 or total < 0 or warmup < 0:
        raise ValueError(f"step, total and warmup count from 0, got {step}, {total} and {warmup}")
    # the factor first, as torch's LambdaLR has it: another order would round otherwise
    if step < warmup:
        return base * (step / warmup)
    return base * SCHEDULE_SHAPES[kind](step - warmup, total - warmup)


def warmup_steps(total: int, ratio: float) -> int:
    """Steps of warmup for a ``warmup_ratio`` of ``total`` steps, rounded up. Raises ConfigError
    outside [0, 1].
    """
    if not 0.0 <= ratio <= 1.0:
        raise ConfigError(
            f"warmup_ratio={ratio} must lie in [0, 1]; for a number of steps use warmup_steps"
        )
    return math.ceil(total * ratio)
