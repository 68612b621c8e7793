"""The ways to start an adapter's matrices that are more than random numbers, by PEFT's names
(`init_lora_weights`). No torch here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from lorry.errors import ConfigError, suggest_nearest

ReadsWhat = Literal["nothing", "weight", "rounding", "inputs", "inputs and weight", "gradients"]
PISSA_NITER = re.compile(r"pissa_niter_(\d{1,3})")


@dataclass(frozen=True)
class Initialization:
    """One way to start. ``reads``: what of the base and its rows it is made from (rounding: the base
    whole and as it is packed); ``takes_off``: the product of the first A and B is taken off, so that
    the model begins as its base; ``niter``: power iterations of a randomised SVD; ``trains``: the only
    half that trains, the other being what it is about; None: both do."""

    name: str
    reads: ReadsWhat
    takes_off: bool = False
    niter: int | None = None
    trains: Literal["A", "B"] | None = None

    @property
    def reads_rows(self) -> bool:
        """Whether the model has to be run on rows first."""
        return self.reads in ("inputs", "inputs and weight", "gradients")

    @property
    def changes_base(self) -> bool:
        """Whether the adapter is for another base than the one that it was made from."""
        return self.takes_off or self.reads == "rounding"

    @property
    def is_repeatable(self) -> bool:
        """Whether another program, given the base alone, finds the same product to take off."""
        return self.name in ("pissa", "olora") and self.niter is None


INITIALIZATIONS = {
    each.name: each
    for each in (
        Initialization("pissa", "weight", takes_off=True),
        Initialization("olora", "weight", takes_off=True),
        Initialization("milora", "weight", takes_off=True),
        Initialization("corda", "inputs and weight", takes_off=True),
        Initialization("lora_ga", "gradients", takes_off=True),
        Initialization("eva", "inputs"),
        Initialization("loftq", "rounding"),
        Initialization("orthogonal", "nothing"),
        Initialization("mica", "weight", trains="A"),
    )
}


def find_initialization(value: bool | str) -> Initialization | None:
    """The way that a value of `init_lora_weights` names; None for the random starts (true, false,
    gaussian). Raises ConfigError for what is none."""
    if isinstance(value, bool) or value == "gaussian":
        return None
    if match := PISSA_NITER.fullmatch(str(value)):
        return Initialization("pissa", "weight", takes_off=True, niter=int(match[1]))
    if not isinstance(value, str) or value not in INITIALIZATIONS:
        known = ("true", "false", "gaussian", *INITIALIZATIONS, "pissa_niter_16")
        raise ConfigError(
            f"init_lora_weights is {value!r:.80}; give one of {', '.join(known)}"
            f"{suggest_nearest(str(value), known)}"
        )
    return INITIALIZATIONS[value]


def check_initialization(
    value: bool | str, ranks: list[int], *, keep_residual: bool = False, use_dora: bool = False
) -> None:
    """Raise ConfigError for a start that an adapter of these ranks, or a DoRA, cannot have."""
    way = find_initialization(value)
    if way is not None and use_dora:
        raise ConfigError(
            f"init_lora_weights={value} does not go with use_dora, whose magnitudes begin as the norms of "
            "the base's rows; give init_lora_weights=true or gaussian, or leave use_dora out"
        )
    if way is not None and way.name == "orthogonal" and (odd := [r for r in ranks if r % 2]):
        raise ConfigError(
            f"init_lora_weights=orthogonal needs an even rank, half of it for A and half for B; r is {odd[0]}"
        )
    if keep_residual and (way is None or not way.is_repeatable):
        raise ConfigError(
            f"keep_residual=true writes the adapter without what {value!r} took off the base, which PEFT "
            "finds again for pissa and olora alone; leave it out: the saved adapter then has "
            "all of it, and any reader computes the same"
        )


def check_run_initialization(
    value: bool | str, *, quantize: str | None, cut_by: str | None, streaming: bool
) -> None:
    """Raise ValueError where a run's base or rows cannot be what its adapter begins from. ``cut_by``: the
    setting that gives each process a part of every matrix."""
    way = find_initialization(value)
    if way is None or way.reads == "nothing":
        return
    written = f"lora.init_lora_weights={value}"
    if cut_by is not None:
        raise ValueError(
            f"{written} reads whole matrices, and with {cut_by} each process has a part; train on one "
            "device or with backend=ddp or fsdp, or leave init_lora_weights out"
        )
    # what is kept as a file has it rounds nothing off
    if way.reads == "rounding" and quantize in (None, "keep"):
        raise ValueError(
            f"{written} begins from what packing the base rounds off; give model.quantize=nf4 (or fp4, "
            "int8), or init_lora_weights=pissa"
        )
    if way.reads_rows and streaming:
        raise ValueError(
            f"{written} reads rows before training, and a streamed source does not go back; leave "
            "data.streaming out"
        )
