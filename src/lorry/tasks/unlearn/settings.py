"""The settings of an unlearning method: their types, their bounds, and which of them a method reads.

settings = resolve_settings("NPO", {"beta": 0.5})
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from lorry.config.unlearning.unlearn import UNLEARN_METHODS
from lorry.errors import ConfigError, suggest_nearest

RetainLoss = Literal["NLL", "KL", "EMBED"]
DualUpdate = Literal["step", "epoch"]


@dataclass(frozen=True)
class UnlearnSettings:
    """Every setting that a method may read; one that it does not read keeps the value here.

    ``gamma``, ``alpha``: of the forget and the retain term (PDU's alpha is the multiplier it starts
    with); ``retain_loss``: NLL, KL against the start, or EMBED, the distance of a layer's output
    from the start's; ``layer``: which (0-based); ``peer_masks``: average where open-unlearning
    does, over prompts, too. ``retain_loss_eps``, ``dual_*``: PDU's bound, rate, moment and first
    epoch.
    """

    gamma: float = 1.0
    alpha: float = 0.0
    retain_loss: RetainLoss = "NLL"
    layer: int = 7
    peer_masks: bool = False
    beta: float = 1.0
    beta1: float = 1.0
    beta2: float = 1.0
    delta: float = 0.0
    steering_coeff: float = 1.0
    adaptive: bool = False
    ignore_first_n_answer_tokens: int = 0
    retain_loss_eps: float | None = None
    dual_step_size: float = 1.0
    dual_update_upon: DualUpdate = "step"
    dual_warmup_epochs: int = 0


SETTINGS = tuple(field.name for field in fields(UnlearnSettings))
# not 0: NPO and its kin divide by beta, UNDIAL and RMU would push nowhere
POSITIVE = ("beta", "steering_coeff", "dual_step_size")
NOT_NEGATIVE = ("gamma", "alpha", "beta1", "beta2", "layer", "ignore_first_n_answer_tokens",
                "retain_loss_eps", "dual_warmup_epochs")  # fmt: skip
WORDS = {"retain_loss": get_args(RetainLoss), "dual_update_upon": get_args(DualUpdate)}


def resolve_settings(method: str, values: Mapping[str, Any]) -> UnlearnSettings:
    """The given settings over the method's defaults. Raises ConfigError for an unknown method, a
    setting that the method does not read, or a value out of bounds.
    """
    if method not in UNLEARN_METHODS:
        raise ConfigError(
            f"unlearn.method={method!r}; choose one of {', '.join(UNLEARN_METHODS)}"
            f"{suggest_nearest(method, UNLEARN_METHODS)}"
        )
    defaults = dict(UNLEARN_METHODS[method])
    if defaults.get("retain_loss_eps") == "auto":  # a number of the start, which nobody knows here
        defaults["retain_loss_eps"] = None
    for name, value in values.items():
        if name not in defaults:
            readers = [m for m, reads in UNLEARN_METHODS.items() if name in reads]
            whose = f"it is a setting of {', '.join(readers)}" if readers else "no method uses it"
            raise ConfigError(
                f"unlearn.{name}: {method} does not use it ({whose}); {method} uses "
                f"{', '.join(defaults)}{suggest_nearest(name, defaults)}"
            )
        _check_value(name, value)
    return UnlearnSettings(**{**defaults, **values})


def _check_value(name: str, value: Any) -> None:
    if name in WORDS and value not in WORDS[name]:
        raise ConfigError(
            f"unlearn.{name}={value!r}; choose one of {', '.join(WORDS[name])}"
            f"{suggest_nearest(str(value), WORDS[name])}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"unlearn.{name}={value}; give a finite number")
    if name in POSITIVE and not value > 0:
        raise ConfigError(f"unlearn.{name}={value}; give a number above 0")
    if name in NOT_NEGATIVE and value is not None and value < 0:
        raise ConfigError(f"unlearn.{name}={value}; give 0 or more")
