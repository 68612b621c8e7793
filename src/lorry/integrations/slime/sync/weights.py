"""slime's named weights without adapters, or with adapters in them, which is all that its converters
know; the model and slime's copies of it are never written to.

slime names weights by `named_params_and_buffers(args, model)`, and sends either what that yields (to
engines over NCCL, to a disk, by --save-hf), or copies on the CPU under the same names (to colocated
engines, while the model's own memory may be given up).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lorry.integrations.megatron.attach import list_chunks
from lorry.integrations.megatron.linear import LoraParallelLinear
from lorry.integrations.megatron.merge import merged_weight

# slime's `named_params_and_buffers(args, model, **options)`
NamedWeights = Callable[..., Iterable[tuple[str, Tensor]]]
# what slime reads of a parameter to gather it over ranks
MARKS = ("tensor_model_parallel", "partition_dim", "partition_stride", "parallel_mode")


def is_adapter(name: str) -> bool:
    """Whether a parameter's name, slime's or Megatron's, is that of an adapter's matrix."""
    return ".lora_" in name


def base_weights(named: NamedWeights) -> NamedWeights:
    """slime's function without the parameters of adapters: what can be loaded from a Hugging Face
    checkpoint, and sent where an engine adds the adapter itself."""

    def without_adapters(*args: Any, **options: Any) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named(*args, **options):
            if not is_adapter(name):
                yield name, tensor

    return without_adapters


def merged_weights(named: NamedWeights) -> NamedWeights:
    """slime's function with adapters in the weights that they are on. A merged weight is made when it
    is asked for; the caller alone holds it."""

    def with_adapters(args: Any, model: Any, **options: Any) -> Iterator[tuple[str, Tensor]]:
        merged = MergedWeights(named, args, model)
        for name, tensor in named(args, model, **options):
            if not is_adapter(name):
                yield name, merged.of(name, tensor)

    return with_adapters


class MergedWeights(Mapping[str, Tensor]):
    """Weights by slime's names, merged one by one as they are asked for. ``held``: slime's copies; what
    it lacks is taken from the model itself."""

    def __init__(
        self,
        named: NamedWeights,
        args: Any,
        model: Any,
        held: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._live = dict(named(args, model))
        self._held = {} if held is None else held
        names = {id(tensor): name for name, tensor in self._live.items()}
        self._linears = {
            names[id(linear.get_parameter("weight"))]: (linear, names)
            for chunk in list_chunks(model)
            for linear in list_adapted(chunk)
        }

    def __getitem__(self, name: str) -> Tensor:
        return self.of(name, self._value(name))

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._live if not is_adapter(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def of(self, name: str, weight: Tensor) -> Tensor:
        """``weight``, which slime calls ``name``, with the adapter on it, if there is one."""
        if name not in self._linears:
            return weight
        linear, names = self._linears[name]
        values = {
            leaf: self._value(names[id(parameter)]) for leaf, parameter in linear.lora_parameters()
        }
        merged = merged_weight(linear, {**values, "weight": weight})
        live = self._live[name]
        for mark in MARKS:
            if hasattr(live, mark):
                setattr(merged, mark, getattr(live, mark))
        return merged

    def _value(self, name: str) -> Tensor:
        return (self._held[name] if name in self._held else self._live[name]).detach()


def list_adapted(chunk: nn.Module) -> list[LoraParallelLinear]:
    """The linears of a chunk that have adapters; none of a critic."""
    return [module for module in chunk.modules() if isinstance(module, LoraParallelLinear)]


def has_adapters(model: Any) -> bool:
    """Whether a model, in whatever wraps it, has adapters: a critic has none."""
    return any("lorry_adapter" in chunk.__dict__ for chunk in list_chunks(model))
