"""Whatever trains: a set of parameters in one flat fp32 buffer, with gradients in another of the
same shape. Where ranks share the model, the buffer has this rank's part of the set.

An adapter is one (`adapter.Adapter`), the base's own weights are one (`base_weights.BaseWeights`).
So is what of a router trains (`router.RouterParameters`).
What is to come (magnitudes, a value head) implements the same face, and optimizer,
backend, contracts and checkpoints take it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from lorry.adapters.attach import get_bank
from lorry.adapters.base_weights import get_base_weights
from lorry.adapters.mix import Mix
from lorry.adapters.router import RouterParameters

# the first part of the names of what trains, in a checkpoint
PARAMETER_KINDS = ("adapter", "weights", "router")


@dataclass(frozen=True)
class ParamGroup:
    """A contiguous range of a set's buffer, its learning rate over the run's, and its weight decay."""

    part: slice
    lr_ratio: float
    weight_decay: float


class ParameterSet(Protocol):
    """values, grads: [P] fp32, on the model's device.

    ``name``: what batches, metrics and checkpoints call it. ``kind``: the prefix of its tensors in
    a checkpoint, one of `PARAMETER_KINDS`. ``drops``: whether its forward pass draws dropout masks.
    ``start_digest``: of the base before training, where this set's values are the base's own; None
    where the base stays as it is.
    """

    name: str
    grads: Tensor

    @property
    def values(self) -> Tensor: ...
    @property
    def kind(self) -> str: ...
    @property
    def label(self) -> str:
        """What messages call it: adapter 'people', a base weight."""

    @property
    def drops(self) -> bool: ...
    @property
    def start_digest(self) -> str | None: ...

    def mix(self) -> Mix:
        """What its sequences run under: an adapter its own term, base weights none, a router every
        expert, gated by it.
        """

    def num_parameters(self) -> int:
        """How many numbers train: fewer than ``values`` where that has gaps of alignment."""

    def ranges(self) -> Sequence[tuple[slice, bool, bool]]:
        """(part of the buffer, whether it takes LoRA+'s own rate, whether it decays), in order,
        none empty.
        """

    def targets(self) -> list[str]:
        """What has to see a gradient: modules of an adapter, tensors of base weights."""

    def split_like(self, flat: Tensor) -> dict[str, Tensor]:
        """Any [P] tensor (values, moments) as views by canonical names."""

    def masters(self) -> Mapping[str, Tensor]:
        """The tensors that the optimizer has to cover, by canonical names: found by the memory they
        occupy.
        """

    def base_parameters(self) -> Mapping[str, nn.Parameter]:
        """Those of the model's own parameters that are this set's."""

    def wanting_gradients(self) -> set[str]:
        """The names of the masters that autograd sees, where they are none of the model's own
        parameters.
        """

    def frozen_state(self) -> Mapping[str, Tensor]:
        """{kind: [P]} of what a checkpoint keeps of it that does not train; usually nothing."""

    def bind_grads(self) -> None:
        """Let autograd accumulate into ``grads``."""

    def touch(self) -> None:
        """Say that ``values`` was written as a whole: what is computed with is made again from it."""

    def held_still(self) -> AbstractContextManager[None]:
        """While the block runs nobody writes ``values`` without `touch`, whatever gradients are made."""

    def norm(self) -> float:
        """Euclidean norm of the gradient; inf or nan if any entry is."""

    def dot(self, a: Tensor, b: Tensor) -> float:
        """The inner product of two [P] tensors, in float64."""

    def partial_sums(self) -> Sequence[str]:
        """The tensors whose gradient each of the ranks that share the model (tensor parallel) has a
        part of, to be added up once per step; none of one device."""

    @property
    def shard(self) -> int | None:
        """The number of this rank's share where the set is cut over the data ranks, whose passes add
        its gradients up; None where each of them has the set as one device has it, or the same part."""

    def whole_tensors(self, flat: Tensor) -> Mapping[str, Tensor]:
        """`split_like` as one device has it, whatever part of the set this process holds. Where ranks
        share it, all of them call this together; where it is cut over them, a tensor is made when it
        is read."""

    def own_part(self, name: str, whole: Tensor) -> Tensor:
        """`whole_tensors` backwards: of one tensor what this process has."""

    def zero_grad_names(self) -> list[str]:
        """The ``targets`` whose gradient is exactly zero."""


def param_groups(params: ParameterSet, *, lr_ratio: float, weight_decay: float) -> list[ParamGroup]:
    """The ranges of a set with the numbers of a run. ``lr_ratio``: LoRA+'s, of lora_B over lora_A
    (arXiv 2402.12354).
    """
    return [
        ParamGroup(part, lr_ratio if own_rate else 1.0, weight_decay if decays else 0.0)
        for part, own_rate, decays in params.ranges()
    ]


def parameter_set(model: nn.Module, name: str) -> ParameterSet:
    """What trains under this name: the base's weights if they were switched on as such, a router,
    else an adapter. Raises ConfigError.
    """
    weights, bank = get_base_weights(model), get_bank(model)
    if weights is not None and weights.name == name:
        return weights
    router = bank.routers.get(name)
    return router if isinstance(router, RouterParameters) else bank[name]


def base_parameter_set(model: nn.Module) -> ParameterSet | None:
    """The base's own weights where they train, else None."""
    return get_base_weights(model)
