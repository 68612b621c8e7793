"""Adapters at the weight of a module that is no linear but multiplies by it all the same: the router
of a mixture of experts, `F.linear(x, self.weight)` and then a top-k of its own.

The module stays, with its names. While its forward runs, `self.weight` is a stand-in, by which
`F.linear` is the bank's product; any other use of the weight is an error and not another model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.layers.linear import BankLinear
from lorry.errors import ContractError

WEIGHT = "weight"
_LAYER = "lorry_weight"  # where a module keeps its bank layer


class ForeignWeight(BankLinear):
    """The weight [out, in] of a module of another library (``holders``), and its adapters. It is no
    module of the model's tree."""

    def __init__(self, holder: nn.Module, path: str) -> None:
        super().__init__(holder.get_parameter(WEIGHT), None, path=path)
        self.holders = (holder,)

    def use_merged_weight(self, merged: nn.Parameter) -> None:
        super().use_merged_weight(merged)
        setattr(self.holders[0], WEIGHT, self.weight)

    def restore_weight(self) -> None:
        super().restore_weight()
        setattr(self.holders[0], WEIGHT, self.weight)

    def install(self) -> None:
        """Let the module's `F.linear` go through this layer."""
        holder = self.holders[0]
        holder.__dict__[_LAYER] = self
        # a partial and no closure: `copy.deepcopy` of the model copies what a partial holds
        holder.__dict__["forward"] = partial(_run_with_weight, holder)

    def cast_forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [..., in] -> [..., out], all of it in ``dtype``, which x is in; as autocast wants it where that
        is on."""
        call = self.resolve(None)
        if dtype == self.dtype or torch.is_autocast_enabled(x.device.type):
            return self(x, call)
        if not self.terms(call):
            return F.linear(x, self.weight.to(dtype))
        (y,) = self.group.forward(x.reshape(-1, x.shape[-1]), call, self.path, dtype)
        return y.view(*x.shape[:-1], -1)

    def release(self) -> None:
        """Give the module its own forward back."""
        del self.holders[0].__dict__[_LAYER], self.holders[0].__dict__["forward"]


def find_foreign_weight(module: nn.Module, path: str) -> ForeignWeight | None:
    """The bank layer of a module's own [out, in] weight, made if there is none; None for linears,
    embeddings and modules without such a weight."""
    if (layer := module.__dict__.get(_LAYER)) is not None:
        assert isinstance(layer, ForeignWeight)
        return layer
    weight = module._parameters.get(WEIGHT)
    matrix = weight is not None and weight.dim() == 2 and weight.is_floating_point()
    # a subclass of a linear or an embedding computes something else with it
    return (
        None
        if not matrix or isinstance(module, (nn.Linear, nn.Embedding, BankLinear))
        else ForeignWeight(module, path)
    )


class _WeightStandIn:
    """What a module finds as its weight while it runs: facts about it, `F.linear`, and itself in another
    ``dtype``, in which many a router scores."""

    def __init__(self, layer: ForeignWeight, dtype: torch.dtype) -> None:
        self.layer, self.dtype = layer, dtype

    device = property(lambda self: self.layer.weight.device)
    shape = property(lambda self: self.layer.weight.shape)

    def float(self) -> _WeightStandIn:
        return _WeightStandIn(self.layer, torch.float32)

    def to(self, dtype: object) -> _WeightStandIn:
        """Raises ContractError for anything but a dtype."""
        if not isinstance(dtype, torch.dtype):
            raise _other_use(self.layer, f"to({dtype!r:.40})")
        return _WeightStandIn(self.layer, dtype)

    def type(self, dtype: object) -> _WeightStandIn:
        """As `to`."""
        return self.to(dtype)

    def __getattr__(self, name: str) -> Any:
        raise _other_use(self.layer, name)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs or {})
        stand_in = given.get("weight")
        if function is not F.linear or not isinstance(stand_in, cls):
            layer = next(a.layer for a in (*args, *(kwargs or {}).values()) if isinstance(a, cls))
            raise _other_use(layer, getattr(function, "__name__", str(function)))
        y = stand_in.layer.cast_forward(given["input"], stand_in.dtype)
        bias = given.get("bias")
        return y if bias is None else y + bias


def _other_use(layer: ForeignWeight, use: str) -> ContractError:
    return ContractError(
        f"{layer.path}: {type(layer.holders[0]).__name__} uses its weight otherwise than in F.linear "
        f"({use}), so no adapter can sit on it; take it out of the targets"
    )


def _run_with_weight(holder: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward, with the stand-in in place of its weight."""
    # an instance attribute hides the parameter, which stays registered under its name
    layer: ForeignWeight = holder.__dict__[_LAYER]
    holder.__dict__[WEIGHT] = _WeightStandIn(layer, layer.dtype)
    try:
        return type(holder).forward(holder, *args, **kwargs)
    finally:
        del holder.__dict__[WEIGHT]


def foreign_weight_of(module: nn.Module) -> ForeignWeight | None:
    """The bank layer that a module's weight has, if it has one."""
    layer: ForeignWeight | None = module.__dict__.get(_LAYER)
    return layer
