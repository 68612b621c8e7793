"""The further parameters of an adapter: what lies behind its A's and B's in the flat buffer, and is
clipped, stepped, saved, reduced and resumed with them.

A variant that has such parameters is a function of (model, name, spec, targets) that gives their starts
(`FurtherStart`), in the order in which they lie in the buffer, and stands in `registry.VARIANTS`. Names are
canonical and PEFT's: what an adapter's file has behind `base_model.model.`, such as
`MODULE.lora_magnitude_vector`, so that files are written and read without a word of the variant's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.slot import AdapterSlot
from lorry.adapters.spec import LoraSpec
from lorry.adapters.tensor_parallel.slices import DimensionSlice


def whole_shape(shape: Sequence[int], cut: tuple[int, DimensionSlice] | None) -> list[int]:
    """What one device has of a tensor that is cut over ranks along a dimension."""
    whole = list(shape)
    if cut is not None:
        whole[cut[0]] = cut[1].whole
    return whole


def zeros(*shape: int) -> Callable[[AdapterSlot | None], Tensor]:
    """Of a start that changes nothing, the `FurtherStart.make_values`."""
    return lambda _: torch.zeros(shape)


def _nothing() -> None:
    """What a parameter asks for that nothing is made of but its module's output."""


@dataclass(frozen=True)
class Replacement:
    """What a parameter takes the place of where its adapter is active, g = 1: the parameters of the base at
    ``sites`` [(path of a module, name in it)], or their rows ``ids`` [n] int64."""

    sites: tuple[tuple[str, str], ...]
    ids: Tensor | None = None


@dataclass(frozen=True)
class FurtherParameter:
    """One of an adapter's: ``param``, a view of its buffer; ``module``: the path of the module whose it
    is, an adapted one or another; ``decays``: whether weight decay counts it; ``cut``: along which
    dimension ranks share it and how, None where each has it whole; ``touch``: called when its values
    were written; ``forget``: when the adapter is removed; ``replaces``: what of the base it stands for;
    ``also``: other names under which files hold it; ``low_rank``: whether it is a factor of the low-rank
    term itself, which merging and saving as plain LoRA fold in; ``partial``: whether each rank that has it
    whole makes a part of its gradient."""

    param: nn.Parameter
    module: str
    decays: bool = True
    cut: tuple[int, DimensionSlice] | None = None
    touch: Callable[[], None] = field(default=_nothing, repr=False)
    forget: Callable[[], None] = field(default=_nothing, repr=False)
    replaces: Replacement | None = None
    also: tuple[str, ...] = ()
    low_rank: bool = False
    partial: bool = False

    def num_parameters(self) -> int:
        """How many numbers it is, on all ranks that share it."""
        return math.prod(whole_shape(self.param.shape, self.cut))


@dataclass(frozen=True)
class FurtherStart:
    """What a further parameter begins as, before it lies in a buffer: its shape, ``make_values``, which
    gives this rank's (any float dtype) from the slot at its module, and ``use``, called once with the parameter and the slot at its
    module (None of a module without A and B), so that the module computes with it. The others: see
    `FurtherParameter`."""

    shape: tuple[int, ...]
    make_values: Callable[[AdapterSlot | None], Tensor] = field(repr=False)
    module: str
    use: Callable[[nn.Parameter, AdapterSlot | None], None] = field(repr=False)
    decays: bool = True
    cut: tuple[int, DimensionSlice] | None = None
    touch: Callable[[], None] = field(default=_nothing, repr=False)
    forget: Callable[[], None] = field(default=_nothing, repr=False)
    replaces: Replacement | None = None
    also: tuple[str, ...] = ()
    low_rank: bool = False
    partial: bool = False

    def parameter(self, param: nn.Parameter) -> FurtherParameter:
        """The adapter's, once it lies in its buffer."""
        return FurtherParameter(
            param,
            self.module,
            self.decays,
            self.cut,
            self.touch,
            self.forget,
            self.replaces,
            self.also,
            self.low_rank,
            self.partial,
        )

    @property
    def whole_shape(self) -> list[int]:
        """As one device has it."""
        return whole_shape(self.shape, self.cut)

    @property
    def numel(self) -> int:
        """How many values this process has."""
        return math.prod(self.shape)


Variant = Callable[
    [nn.Module, str, LoraSpec, Mapping[str, AdaptableLayer]], Mapping[str, FurtherStart]
]
