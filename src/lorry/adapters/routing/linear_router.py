"""Routers that train nothing: every linear gates the experts that it has, by what their deltas B A
would make of its own input (docs/experts.md).

    arrow    score = |v . x|, v the first right singular vector of B A (arXiv 2405.11157)
    spectr   score = ||B A x|| (arXiv 2504.03454)

and g = softmax of the ``top_k`` largest scores over ``temperature``, 0 for the others. The scale of
an adapter is in neither score, as in PEFT and in the papers. T tokens, I in, K experts, R rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.attach import get_bank
from lorry.adapters.bank import AdapterBank
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.layers.slot import AdapterSlot
from lorry.adapters.mix import Half, Mix
from lorry.adapters.parameters.weights import ForeignWeight
from lorry.adapters.router import ROUTER_NAME, refuse_router_name, refuse_unweighable
from lorry.adapters.targets.candidates import head_and_embedding
from lorry.errors import ConfigError


def softmax_of_largest(scores: Tensor, top_k: int, temperature: float) -> Tensor:
    """[..., K] -> gates of the same shape: softmax over the ``top_k`` largest, 0 elsewhere and where
    a score is -inf. At least one of each row has to be finite."""
    largest, chosen = scores.topk(min(top_k, scores.shape[-1]), -1)
    return torch.zeros_like(scores).scatter(-1, chosen, (largest / temperature).softmax(-1))


@dataclass(frozen=True)
class ExpertReaders:
    """What scores the experts of linears with one input x [T,I]: a few rows for each (linear,
    expert). ``rows`` [linears * K * n, I] fp32; ``present`` [linears, K]: who has an adapter there;
    ``stamp``: what they were made from."""

    stamp: tuple[object, ...]
    rows: Tensor
    present: Tensor


@dataclass(eq=False)  # requests are grouped by their mixes: a router is itself and no other
class SpectralRouter(ABC):
    """A `LinearRouter` and `MixtureRouter` over the adapters of a bank, which it reads as they are at
    each call: an expert that has changed has other rows, one that has gone is scored no more.
    """

    bank: AdapterBank
    adapters: Sequence[str]
    top_k: int = 2
    temperature: float = 1.0
    halves: Sequence[Half] = ("attn", "mlp")
    _readers: dict[tuple[str, ...], ExpertReaders] = field(default_factory=dict, repr=False)

    router_kind = ""

    def __post_init__(self) -> None:
        check_choice(self.top_k, self.temperature, len(self.adapters))

    @abstractmethod
    def expert_rows(self, core: Tensor) -> Tensor:
        """[n, I] of an expert at a linear, from ``core`` [m, I] float64, whose product with an
        input has the norm of B A's (`delta_core`)."""

    @abstractmethod
    def scores(self, products: Tensor) -> Tensor:
        """[T, linears, K] from the rows' products with x, [T, linears, K, n]."""

    def parameters(self, layer: int) -> list[Tensor]:
        """None."""
        return []

    def linear_gates(self, linears: Sequence[str], x: Tensor) -> Tensor:
        """x [T,I] -> [T, linears * K] fp32; zeros at a linear where no expert has an adapter."""
        readers = self.expert_readers(linears)
        has_expert = readers.present.any(1)
        # in fp32: half precision would swap experts whose scores nearly agree
        products = F.linear(x.float(), readers.rows).view(x.shape[0], *readers.present.shape, -1)
        scores = self.scores(products)
        # an absent expert is no choice, rather than one of score 0, which another may have too
        absent = ~readers.present & has_expert[:, None]
        gates = softmax_of_largest(
            scores.masked_fill(absent, float("-inf")), self.top_k, self.temperature
        )
        return (gates * has_expert[:, None]).flatten(1)

    @torch.no_grad()
    def expert_readers(self, linears: Sequence[str]) -> ExpertReaders:
        """The rows of these linears, made again where an adapter has changed, come or gone."""
        slots = [
            self.bank.modules[path].slots.get(name) if path in self.bank.modules else None
            for path in linears
            for name in self.adapters
        ]
        stamp = tuple(None if slot is None else (slot.slot_id, *slot.stamp()) for slot in slots)
        readers = self._readers.get(tuple(linears))
        if readers is None or readers.stamp != stamp:
            readers = self._make_readers(len(linears), slots, stamp)
            self._readers[tuple(linears)] = readers
        return readers

    def _make_readers(
        self, linears: int, slots: Sequence[AdapterSlot | None], stamp: tuple[object, ...]
    ) -> ExpertReaders:
        slot_rows = [None if slot is None else self.expert_rows(delta_core(slot)) for slot in slots]
        some = next(slot for slot in slots if slot is not None)
        # experts of other ranks have fewer rows: rows of zeros beside them change no norm
        count = max(len(rows) for rows in slot_rows if rows is not None)
        width = some.whole_shape("A")[1]
        rows = torch.zeros(len(slot_rows), count, width, dtype=torch.float32, device=some.A.device)
        for into, values in zip(rows, slot_rows, strict=True):
            if values is not None:
                into[: len(values)] = values
        present = torch.tensor([slot is not None for slot in slots], device=rows.device)
        return ExpertReaders(stamp, rows.flatten(0, 1), present.view(linears, -1))

    def settings(self) -> Mapping[str, Any]:
        """How scores become gates."""
        return {"top_k": self.top_k, "temperature": self.temperature}

    def tensors(self) -> dict[str, Tensor]:
        """None: everything follows from the experts."""
        return {}

    def mix(self) -> Mix:
        """Every expert, gated linear by linear."""
        return Mix.layer_routed(self)


class ArrowRouter(SpectralRouter):
    """|v . x|, v [I] the direction that B A stretches most. PEFT finds v by 15 steps of power
    iteration from a random vector; this one is exact, also where two singular values nearly agree.
    """

    router_kind = "arrow"

    def expert_rows(self, core: Tensor) -> Tensor:
        """v, or zeros of a delta that is zero."""
        # the m x m product instead of the decomposition of [m, I]: I is wide and m a rank
        values, vectors = torch.linalg.eigh(core @ core.t())
        largest = values[-1]
        if largest <= 0:
            return core.new_zeros(1, core.shape[1])
        return (vectors[:, -1] @ core / largest.sqrt())[None]

    def scores(self, products: Tensor) -> Tensor:
        """Absolute values: the sign of a singular vector is arbitrary."""
        return products.abs().squeeze(-1)


class SpectrRouter(SpectralRouter):
    """||B A x||, how much the expert's delta makes of this very input."""

    router_kind = "spectr"

    def expert_rows(self, core: Tensor) -> Tensor:
        """The core itself."""
        return core

    def scores(self, products: Tensor) -> Tensor:
        """Norms; the gradient of one that is zero is zero."""
        return torch.linalg.vector_norm(products, dim=-1)


def delta_core(slot: AdapterSlot) -> Tensor:
    """C [m, I] float64, m = min(O, R), with ||C x|| = ||B A x|| for every x, and the right singular
    vectors of B A: B = Q R with Q orthonormal, C = R A. Of ranks that share the linear all call this
    together, and have the same."""
    a, b = slot.factors()
    cut = slot.slices
    if cut is not None and cut.columns is not None:
        a = cut.columns.gather(a, cut.ranks)
    if cut is not None and cut.rows is not None:
        b = cut.rows.gather(b.t(), cut.ranks).t()
    return torch.linalg.qr(b.double()).R @ a.double()


def check_choice(top_k: int, temperature: float, experts: int) -> None:
    """Raise ConfigError for a choice that ``experts`` experts do not have."""
    if not 1 <= top_k <= experts:
        raise ConfigError(
            f"router.top_k={top_k}: a token may have 1 to {experts} of {experts} experts"
        )
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"router.temperature={temperature:g}: give a number above 0")


def refuse_outside_layers(model: nn.Module, experts: Sequence[str]) -> None:
    """Raise ConfigError for an expert with an adapter that is on no linear of a layer: on the head or
    an embedding, which no router gates."""
    bank, outside = get_bank(model), head_and_embedding(model)
    for name in experts:
        for path, slot in bank[name].slots.items():
            layer = bank.modules[path]
            alone = isinstance(layer, BankLinear) and not isinstance(layer, ForeignWeight)
            if path in outside or not alone:
                raise ConfigError(
                    f"expert {name!r} has an adapter at {path}, which no router of the linears gates; "
                    "train it without"
                )
            if not bool(torch.isfinite(slot.A).all() and torch.isfinite(slot.B).all()):
                raise ConfigError(f"expert {name!r}: {path} holds NaN or infinity")


SPECTRAL_ROUTERS: dict[str, type[SpectralRouter]] = {"arrow": ArrowRouter, "spectr": SpectrRouter}


def attach_spectral_router(
    model: nn.Module, kind: str, experts: Sequence[str], *, top_k: int = 2, temperature: float = 1.0
) -> SpectralRouter:
    """A router of a kind of `SPECTRAL_ROUTERS` over adapters of the model. Raises ConfigError."""
    refuse_outside_layers(model, experts)
    bank = get_bank(model)
    refuse_router_name(bank)
    refuse_unweighable(bank, experts)
    router = SPECTRAL_ROUTERS[kind](bank, tuple(experts), top_k, temperature)
    bank.routers[ROUTER_NAME] = router
    return router
