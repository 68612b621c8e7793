"""Mix: the g of the one equation, as data that travels with a forward pass, in a `AdapterContext`.

    y = W x + b + sum_k g_k s_k B_k (A_k x)

A mix is a few `MixTerm`s: which adapter, for which packed tokens, how strongly. g = 0 is the
absence of a term. Nothing here is read during backward: the autograd function captures what it
needs in forward, so recompute sees the same mix.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from torch import Tensor

from lorry.adapters.dropout import DropoutNoise


@dataclass(frozen=True)
class MixTerm:
    """One adapter's share: ``rows`` of the packed tokens (None = all), ``gate`` g: a number, or a
    tensor [rows] with gradient.
    """

    adapter: str
    rows: slice | None = None
    gate: float | Tensor = 1.0


@dataclass(frozen=True)
class Mix:
    """The terms of a forward pass over T packed tokens."""

    terms: tuple[MixTerm, ...] = ()

    @staticmethod
    def none() -> Mix:
        """g = 0: the frozen base, which is the reference model of NPO, DPO, KL, GRPO."""
        return Mix()

    @staticmethod
    def one(adapter: str) -> Mix:
        """g = 1 for one adapter, everywhere."""
        return Mix((MixTerm(adapter),))

    @staticmethod
    def constants(weights: Mapping[str, float]) -> Mix:
        """The same g for every token: task arithmetic, negation, interpolation."""
        return Mix(tuple(MixTerm(name, None, float(g)) for name, g in weights.items() if g != 0))

    @staticmethod
    def per_sequence(adapters: Sequence[str | None], starts: Sequence[int]) -> Mix:
        """One-hot per packed sequence: ``adapters`` [S] (None = base), ``starts`` [S+1]. Equal
        neighbours share a term.
        """
        runs: list[tuple[str | None, int, int]] = []
        for name, start, stop in zip(adapters, starts[:-1], starts[1:], strict=True):
            if runs and runs[-1][0] == name:
                runs[-1] = (name, runs[-1][1], stop)
            else:
                runs.append((name, start, stop))
        if len(runs) == 1:
            return Mix() if runs[0][0] is None else Mix.one(runs[0][0])
        return Mix(
            tuple(
                MixTerm(name, slice(start, stop)) for name, start, stop in runs if name is not None
            )
        )

    @staticmethod
    def routed(adapters: Sequence[str], gates: Tensor) -> Mix:
        """A router's weights, ``gates`` [T, K], differentiable: a mixture of experts."""
        return Mix(tuple(MixTerm(name, None, gates[:, k]) for k, name in enumerate(adapters)))

    def narrow(self, rows: Tensor) -> Mix:
        """The mix of some of the tokens, ``rows`` [t] sorted positions: for the head, which sees
        supervised tokens only.
        """
        edges = rows.tolist()
        terms = []
        for term in self.terms:
            gate = (
                term.gate[rows]
                if isinstance(term.gate, Tensor) and term.rows is None
                else term.gate
            )
            if term.rows is None:
                terms.append(MixTerm(term.adapter, None, gate))
                continue
            start, stop = bisect_left(edges, term.rows.start), bisect_left(edges, term.rows.stop)
            if isinstance(gate, Tensor):
                gate = gate[rows[start:stop] - term.rows.start]
            if stop > start:
                terms.append(MixTerm(term.adapter, slice(start, stop), gate))
        return Mix(tuple(terms))


class LayerRouter(Protocol):
    """Gates that every decoder layer makes of its own normed inputs: a mixture of LoRA experts with
    a router per layer, where `Mix.routed` has one for all of them.

    ``adapters``: those that it gates; a number that their terms have multiplies the gate. It works
    in layers of Lorry's own decoder alone: an adapter of its at another module (the head, the
    embedding, a model that runs through transformers) raises ContractError when that module is
    called.
    """

    adapters: Sequence[str]

    def parameters(self, layer: int) -> Sequence[Tensor]:
        """What `gates` of this layer reads and gradients may go to."""

    def gates(self, layer: int, half: Literal["attn", "mlp"], x: Tensor) -> Tensor:
        """x [T,width], what attention's or the MLP's projections read -> [T, adapters], for the
        terms of that half's linears. By operations that autograd follows; and the same for the same
        x, since it is called again in backward."""


@dataclass(frozen=True)
class AdapterContext:
    """What a forward pass hands to every adapted layer: the mix, the dropout noise (None = no
    dropout), and the router of the layers, if they have one."""

    mix: Mix = Mix()
    noise: DropoutNoise | None = None
    router: LayerRouter | None = None

    def route_of(self, adapter: str) -> int | None:
        """The column of the router's gates that this adapter's terms take."""
        if self.router is None or adapter not in self.router.adapters:
            return None
        return list(self.router.adapters).index(adapter)

    def narrow(self, rows: Tensor) -> AdapterContext:
        """The same call for some of the tokens, ``rows`` [t] sorted positions."""
        noise = None if self.noise is None else replace(self.noise, rows=rows)
        return replace(self, mix=self.mix.narrow(rows), noise=noise)

    def padded(self, tokens: int, total: int) -> AdapterContext:
        """The same call for a batch of ``tokens`` with padding up to ``total``, which no gated term
        and no other row can tell.
        """
        gated = [t.rows is None and isinstance(t.gate, Tensor) for t in self.mix.terms]
        terms = [
            MixTerm(t.adapter, slice(0, tokens), t.gate) if g else t
            for t, g in zip(self.mix.terms, gated, strict=True)
        ]
        noise = None if self.noise is None else self.noise.padded(total)
        return replace(self, mix=Mix(tuple(terms)), noise=noise)
