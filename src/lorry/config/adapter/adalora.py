"""AdaLoRA's numbers (Zhang et al. 2023, arXiv 2303.10512), in PEFT's names, and its budget of ranks over
the steps of a run. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorry.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AdaLoraSettings:
    """How an adapter's ranks go from the spec's r at every module to ``target_r`` on average.

    tinit: steps before the first rank goes; tfinal: steps after the last one has gone; deltaT: every
    how many steps some go; beta1, beta2: smoothing of the sensitivities and of their uncertainty;
    orth_reg_weight: factor of the penalty that keeps A's rows and B's columns orthogonal. Raises
    ConfigError for values outside their range.
    """

    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5

    def __post_init__(self) -> None:
        for name, least in (("target_r", 1), ("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
            value = getattr(self, name)
            # True is an int to Python
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(
                    f"{name} is {value!r}; it must be a whole number of at least {least}"
                )
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; it must be between 0 and 1, both excluded"
                )
        if not 0 <= self.orth_reg_weight < float("inf"):
            raise ConfigError(
                f"orth_reg_weight is {self.orth_reg_weight!r}; it must be a number of at least 0"
            )

    def refuse_rank(self, r: int) -> None:
        """Raises ConfigError unless there are ranks to take away from ``r`` at every module."""
        if self.target_r >= r:
            raise ConfigError(
                f"AdaLoRA begins with init_r={r} and ends with target_r={self.target_r} ranks a module "
                "on average; target_r must be the smaller one (without ranks to take away use "
                "variant=lora)"
            )

    def refuse_steps(self, total: int) -> None:
        """Raises ConfigError unless a run of ``total`` steps has some for taking ranks away."""
        if self.tinit + self.tfinal >= total:
            raise ConfigError(
                f"AdaLoRA takes ranks away between tinit={self.tinit} and the last tfinal={self.tfinal} "
                f"steps, and the run has {total}; make tinit + tfinal smaller, or the run longer"
            )

    def budget(self, step: int, total: int, first: int, last: int) -> int | None:
        """How many ranks may stay after ``step`` of ``total`` steps (from 1), on the way from ``first``
        to ``last`` of all modules; None where this step takes none away."""
        end = total - self.tfinal
        if step <= self.tinit or (step < end and step % self.deltaT):
            return None
        if step >= end:
            return last
        left = 1 - (step - self.tinit) / (end - self.tinit)
        return int((first - last) * left**3 + last)
