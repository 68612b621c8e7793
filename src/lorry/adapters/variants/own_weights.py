"""Weights of an adapter's own that take the place of the base's where the adapter is active: whole ones
(`modules_to_save`), biases, or rows of an embedding or head (`trainable_token_indices`).

A pass asks for a module as it computes under the pass's mix (`under`): the module itself, or a twin of it
that holds the adapter's weights and lives as long as the graph does. The base's parameters are neither
written nor replaced, so every other mix, and none, has them as they were. A pass has one owner at most of
the weights of a module; `models.owners` runs the sequences of a batch apart that have several.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.tensor_parallel.ranks import CopyToRanks
from lorry.adapters.tensor_parallel.slices import LayerSlices
from lorry.errors import ContractError

SITE = "lorry_own_weights"  # of a module's dictionary: nn.Module would register what is in it
ROWS = "lorry_own_rows"  # of a twin's
Module = TypeVar("Module", bound=nn.Module)


@dataclass
class OwnTensor:
    """A tensor that an adapter has in the base's place: its fp32 master, and the copy of it that passes
    read, in the dtype of the base."""

    param: nn.Parameter | None = None
    # Version counters miss writes through .data and by fused optimizers; `touch` counts those.
    write_count: int = field(default=0, repr=False)
    _copy: tuple[tuple[object, ...], Tensor] | None = field(default=None, repr=False)

    @property
    def master(self) -> nn.Parameter:
        """The fp32 values that train."""
        assert self.param is not None
        return self.param

    def touch(self) -> None:
        """Say that the master has changed, or is about to."""
        self.write_count += 1

    def values(self, dtype: torch.dtype) -> Tensor:
        """What passes compute with, with a graph to the master if that trains."""
        if dtype == self.master.dtype:
            return self.master
        values: Tensor = ComputeCopyFunction.apply(self.master, self, dtype)
        return values

    def compute_copy(self, dtype: torch.dtype) -> Tensor:
        """The master in another dtype, made anew where it has changed."""
        master = self.master
        stamp = (dtype, self.write_count, master._version, master.data_ptr())
        if self._copy is None or self._copy[0] != stamp:
            self._copy = (stamp, master.detach().to(dtype))
        # an alias: autograd marks what a function returns as its own
        return self._copy[1].detach()


class ComputeCopyFunction(torch.autograd.Function):
    """`apply(master, own, dtype)`: the copy of a master, whose gradient is fp32 again."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, own: OwnTensor, dtype: torch.dtype) -> Tensor:
        ctx.own = own
        return own.compute_copy(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # a gradient means that an optimizer will write the master
        ctx.own.touch()
        return grads[0].to(ctx.own.master.dtype), None, None


@dataclass
class OwnRows:
    """Rows of a matrix: ``ids`` [n] int64, in the order of the tensor's rows [n, D]."""

    ids: Tensor
    tensor: OwnTensor
    order: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.order = self.ids.argsort()

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(positions [m] of ids [T] that are among these, which row [m] of the tensor each is)."""
        known = self.ids.to(ids.device)[order := self.order.to(ids.device)]
        at = torch.searchsorted(known, ids).clamp_(max=len(known) - 1)
        positions = torch.nonzero(known[at] == ids)[:, 0]
        return positions, order[at[positions]]


@dataclass
class OwnWeights:
    """What an adapter has in place of a module's: ``whole`` parameters by their names in it, ``rows`` of
    its weight."""

    whole: dict[str, OwnTensor] = field(default_factory=dict)
    rows: OwnRows | None = None


@dataclass
class OwnSite:
    """The adapters with weights of their own at the module of a path. ``merged``: whether one's are in
    the place of the base's for every pass (`adapters.merge`)."""

    path: str
    adapters: dict[str, OwnWeights] = field(default_factory=dict)
    merged: bool = False


def site_at(module: nn.Module, path: str) -> OwnSite:
    """The module's, made where there is none."""
    site: OwnSite = module.__dict__.setdefault(SITE, OwnSite(path))
    return site


def has_own_weights(module: nn.Module) -> bool:
    """Whether an adapter has weights of its own here."""
    site: OwnSite | None = module.__dict__.get(SITE)
    return site is not None and bool(site.adapters)


def under(module: Module, call: AdapterContext) -> Module:
    """A module as it computes under a call: itself, or a twin that holds the active adapter's weights.
    Raises ContractError where the call has several, weighs them, or has them for some rows alone."""
    site: OwnSite | None = module.__dict__.get(SITE)
    if site is None or not site.adapters:
        return module
    owner = owner_of(call.mix, site.adapters, site.path)
    if owner is None:
        return module
    if site.merged:
        raise ContractError(
            f"{site.path} is merged; call unmerge(model) before using its adapters again"
        )
    return _twin(module, site.adapters[owner], call)


def owner_of(mix: Mix, adapters: Mapping[str, object], where: str) -> str | None:
    """The one of these adapters that is active in a whole pass; None where none is. Raises ContractError
    for anything between."""
    terms = [term for term in mix.terms if term.adapter in adapters]
    if not terms:
        return None
    term = terms[0]
    if len(terms) == 1 and term.rows is None and term.route is None:
        if not isinstance(term.gate, Tensor) and term.gate == 1.0:
            return term.adapter
        raise ContractError(
            f"{where}: the adapter {term.adapter!r} has weights of its own here, which have no "
            f"meaning at g = {'a gate' if isinstance(term.gate, Tensor) else term.gate}; use it alone, g = 1"
        )
    names = ", ".join(repr(name) for name in dict.fromkeys(t.adapter for t in terms))
    raise ContractError(
        f"{where}: {names} {'has' if len(terms) == 1 else 'have'} weights of their own here, which "
        "take the base's place in whole passes; run the sequences of each by themselves"
    )


def _twin(module: Module, own: OwnWeights, call: AdapterContext) -> Module:
    """A module with an adapter's weights. It registers nothing: as attributes they hide the base's."""
    twin = copy.copy(module)
    twin.__dict__.pop(SITE)
    # what asks for the twin on a foreign model
    twin.__dict__.pop("forward", None)
    for leaf, tensor in own.whole.items():
        twin.__dict__[leaf] = tensor.values(_dtype_of(module, leaf))
    if own.rows is not None:
        twin.__dict__[ROWS] = own.rows
    if isinstance(module, nn.MultiheadAttention):
        # it never calls its out_proj, whose parameters it multiplies with
        inner = {name: child and under(child, call) for name, child in module._modules.items()}
        twin.__dict__["_modules"] = inner
    if (follow := getattr(twin, "use_own_weights", None)) is not None:
        follow(own.whole)
    return twin


def _dtype_of(module: nn.Module, leaf: str) -> torch.dtype:
    """What a module computes with in a parameter's place."""
    param = module.get_parameter(leaf)
    dtype: torch.dtype = getattr(module, "dtype", param.dtype) if leaf == "weight" else param.dtype
    return dtype


def find_own_rows(module: nn.Module) -> OwnRows | None:
    """Of a twin."""
    rows: OwnRows | None = module.__dict__.get(ROWS)
    return rows


def with_own_rows(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What a twin's own rows change of its output y: of an embedding the vectors of its tokens (x: ids),
    of a head their logits (x: hidden states). The module itself makes them, of those rows alone."""
    rows = find_own_rows(module)
    if rows is None:
        return y
    values = rows.tensor.values(module.get_parameter("weight").dtype)
    part = copy.copy(module)
    part.__dict__.pop(ROWS)
    # behind the sum over ranks an embedding's rows are whole
    cut: LayerSlices | None = part.__dict__.pop("slices", None)
    part.__dict__["slices"] = None
    if x.is_floating_point():
        ids = rows.ids
        if cut is not None:
            assert cut.rows is not None
            at, here = cut.rows.local(ids)
            # each makes those that it has the logits of, and of the gradients a part
            x, values = CopyToRanks.apply(x, cut.ranks), CopyToRanks.apply(values, cut.ranks)
            ids, values = at[here], values[here.to(values.device)]
        if (bias := getattr(module, "bias", None)) is not None:
            part.__dict__["bias"] = bias[ids.to(bias.device)]
        part.__dict__["weight"] = values
        return y.index_copy(-1, ids.to(y.device), _plain_forward(part, x))
    part.__dict__["weight"] = values
    part.__dict__["padding_idx"] = None
    positions, which = rows.find(x.reshape(-1))
    vectors = _plain_forward(part, which)
    return y.reshape(-1, y.shape[-1]).index_copy(0, positions, vectors).view_as(y)


def _plain_forward(part: nn.Module, x: Tensor) -> Tensor:
    """Of a module without hooks, adapters or routers."""
    part.__dict__["slots"] = {}
    part.__dict__["base_terms"] = ()
    y: Tensor = type(part).forward(part, x)
    return y


def run_under(
    module: nn.Module, active: Callable[[], AdapterContext], *args: Any, **kwargs: Any
) -> Any:
    """The forward of a module of a foreign model: as it computes under the call that is ``active``."""
    twin = under(module, active())
    y = type(module).forward(twin, *args, **kwargs)
    return y if find_own_rows(twin) is None else with_own_rows(twin, args[0], y)
