"""Mix: the g of the one equation, as data that travels with a forward pass, in a `AdapterContext`.

    y = W x + b + sum_k g_k s_k B_k (A_k x)

A mix is a few `MixTerm`s: which adapter, for which packed tokens, how strongly. g = 0 is the
absence of a term. Nothing here is read during backward: the autograd function captures what it
needs in forward, so recompute sees the same mix.
"""

from __future__ import annotations

import numbers
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from lorry.adapters.dropout import DropoutNoise
from lorry.errors import ConfigError, ContractError, describe_value


def check_weights(weights: object) -> None:
    """Raises ConfigError for what is no map of an adapter's name to a number, which a name or a list of
    them is not."""
    if not isinstance(weights, Mapping):
        names = [weights] if isinstance(weights, str) else weights
        listed = names if isinstance(names, list | tuple) else ()
        example = {name: 1.0 for name in listed if isinstance(name, str)} or {"name": 1.0}
        raise ConfigError(
            f"weights is {describe_value(weights)}; give a number for each adapter: weights={example}"
        )
    for name, weight in weights.items():
        if not isinstance(name, str):
            raise ConfigError(f"weights names {describe_value(name)}; give the names of adapters")
        if not isinstance(weight, numbers.Real):
            raise ConfigError(
                f"the weight of adapter {name!r:.80} is {describe_value(weight)}; give a number"
            )


@dataclass(frozen=True)
class MixTerm:
    """One adapter's share: ``rows`` of the packed tokens (None = all), ``gate`` g: a number, or a
    tensor [rows] with gradient; ``route``: the column of the mix's router (of the layers, or of the
    sequence) whose gates multiply it; ``invoked``: of an adapter that tokens invoke (`variants.alora`),
    whether its gates are those of the tokens already.
    """

    adapter: str
    rows: slice | None = None
    gate: float | Tensor = 1.0
    route: int | None = None
    invoked: bool = False


Half = Literal["attn", "mlp"]
Level = Literal["delta", "expert"]


class LayerRouter(Protocol):
    """Gates that every decoder layer makes of its own normed inputs: a mixture of LoRA experts with
    a router per layer, where `Mix.routed` has one for all of them.

    ``adapters``: the experts, in the order of the gates' columns; ``halves``: those of a layer that
    are gated; ``level``: whether the MLP's gates multiply the terms of its linears (delta) or whole
    MLPs, the base's with an expert's terms in each (expert; its gates sum to 1). Attention's are
    its terms' at either. It works in layers of Lorry's own decoder, and at `delta` where transformers' code
    runs layers of two such modules (`HfModel.router_halves`): a routed term at another module (the
    head, the embedding), or in a half that has no gates, raises ContractError when that module is
    called.
    """

    adapters: Sequence[str]
    halves: Sequence[Half]

    @property
    def level(self) -> Level:
        """What the MLP's gates multiply."""

    def parameters(self, layer: int) -> Sequence[Tensor]:
        """What `logits` of this layer reads and gradients may go to."""

    def logits(self, layer: int, half: Half, x: Tensor) -> Tensor:
        """x [T,width], what attention's or the MLP's projections read -> [T, adapters]. By
        operations that autograd follows; and the same for the same x, since it is called again in
        backward."""

    def gates(self, logits: Tensor) -> Tensor:
        """[T, adapters] -> the gates of the same shape, of the terms of that half's linears."""


@runtime_checkable
class MixtureRouter(Protocol):
    """A router over attached experts as the mixture's directory knows it (`adapters.routing.files`).

    ``router_kind``: one of `config.moe.ROUTER_KINDS`; ``adapters``: the experts, in the order of the
    gates' columns.
    """

    router_kind: str
    adapters: Sequence[str]

    def settings(self) -> Mapping[str, Any]:
        """Those of router.json that are the kind's own, plain values of `RouterRecord`'s fields."""

    def tensors(self) -> Mapping[str, Tensor]:
        """The values of router.safetensors by name, fp32: views that can be written. None: no file."""

    def mix(self) -> Mix:
        """Every expert, gated by the router."""


@runtime_checkable
class LinearRouter(Protocol):
    """Gates that differ from linear to linear, each made of what that linear reads. ``adapters``,
    ``halves``: as of a `LayerRouter`; its logits are nobody's. Layers of Lorry's own decoder ask it
    for linears with one input together, any other `BankLinear` for itself.
    """

    adapters: Sequence[str]
    halves: Sequence[Half]

    def parameters(self, layer: int) -> Sequence[Tensor]:
        """What `linear_gates` of this layer's linears reads and gradients may go to."""

    def linear_gates(self, linears: Sequence[str], x: Tensor) -> Tensor:
        """x [T,I], what the linears of these paths read -> [T, linears * adapters], the first
        linear's gates first. By operations that autograd follows; and the same for the same x,
        since it is called again in backward."""


AnyRouter = LayerRouter | LinearRouter


def mixes_mlps(router: AnyRouter | None) -> bool:
    """Whether whole MLPs are mixed under this router, and not the terms of their linears."""
    return (
        router is not None
        and not isinstance(router, LinearRouter)
        and router.level == "expert"
        and "mlp" in router.halves
    )


class SequenceRouter(Protocol):
    """Gates of a whole sequence, made of its prompt's hidden state in the base: the same in every
    layer and for every token, those of the answer too.

    ``adapters``: the experts, in the order of the gates' columns; ``layer`` (0-based; None: after the
    final norm) and ``pooling`` (mean or last): the state that it reads, of the prompt under
    ``state_mix`` (the base alone, or with an adapter of the router's own).
    Whoever runs a model makes the gates first (`models.causal_lm.prompt_gates`, generation for
    each request once); a layer that meets a term without its gate raises ContractError.
    """

    adapters: Sequence[str]
    layer: int | None
    pooling: str
    state_mix: Mix

    def gates(self, states: Tensor) -> Tensor:
        """[S,D] fp32 of S prompts -> [S, adapters]; of each row by itself."""


@dataclass(frozen=True)
class Mix:
    """The terms of a forward pass over T packed tokens, and the router that those with a ``route``
    ask: ``router`` in every layer, ``sequence_router`` once, before the layers run."""

    terms: tuple[MixTerm, ...] = ()
    router: AnyRouter | None = None
    sequence_router: SequenceRouter | None = None

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
        """The same g for every token: task arithmetic, negation, interpolation. Raises ConfigError for what
        are no weights."""
        check_weights(weights)
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

    @staticmethod
    def layer_routed(router: AnyRouter) -> Mix:
        """Every expert of a router, gated by it in each layer."""
        terms = (MixTerm(name, route=k) for k, name in enumerate(router.adapters))
        return Mix(tuple(terms), router)

    @staticmethod
    def by_prompt(router: SequenceRouter) -> Mix:
        """Every expert of a router, gated by it sequence by sequence."""
        terms = (MixTerm(name, route=k) for k, name in enumerate(router.adapters))
        return Mix(tuple(terms), sequence_router=router)

    def with_gates(self, gates: Sequence[float]) -> Mix:
        """The mix of one sequence whose prompt got these ``gates`` [adapters]."""
        terms = (
            term
            if term.route is None
            else MixTerm(term.adapter, term.rows, term.gate * gates[term.route])
            for term in self.terms
        )
        return Mix(
            tuple(t for t in terms if isinstance(t.gate, Tensor) or t.gate != 0), self.router
        )

    def with_token_gates(self, gates: Tensor) -> Mix:
        """The mix where a router has made ``gates`` [T, adapters] of these very tokens."""
        terms = (
            term
            if term.route is None
            else MixTerm(
                term.adapter, term.rows, gates[term.rows or slice(None), term.route] * term.gate
            )
            for term in self.terms
        )
        return Mix(tuple(terms))

    @staticmethod
    def packed(mixes: Sequence[Mix], starts: Sequence[int]) -> Mix:
        """Each packed sequence under its own mix of whole-batch terms: ``mixes`` [S], ``starts``
        [S+1]. Equal neighbours share their terms, and terms that are for everybody name no rows.
        Raises ContractError for two different routers, of which a layer asks one.
        """
        runs: list[tuple[Mix, int, int]] = []
        for mix, start, stop in zip(mixes, starts[:-1], starts[1:], strict=True):
            if runs and runs[-1][0] == mix:
                runs[-1] = (mix, runs[-1][1], stop)
            else:
                runs.append((mix, start, stop))
        if len(runs) == 1:
            return runs[0][0]
        routers = {id(mix.router): mix.router for mix in mixes if mix.router is not None}
        of_sequences = {
            id(mix.sequence_router): mix.sequence_router
            for mix in mixes
            if mix.sequence_router is not None
        }
        if len(routers) + len(of_sequences) > 1:
            raise ContractError(
                "a forward pass uses one router; run the sequences of different routers separately"
            )
        terms = (
            replace(term, rows=slice(start, stop))
            for mix, start, stop in runs
            for term in mix.terms
        )
        return Mix(
            tuple(terms),
            next(iter(routers.values()), None),
            next(iter(of_sequences.values()), None),
        )

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
                terms.append(replace(term, gate=gate))
                continue
            start, stop = bisect_left(edges, term.rows.start), bisect_left(edges, term.rows.stop)
            if isinstance(gate, Tensor):
                gate = gate[rows[start:stop] - term.rows.start]
            if stop > start:
                terms.append(replace(term, rows=slice(start, stop), gate=gate))
        return replace(self, terms=tuple(terms))


@dataclass(frozen=True)
class AdapterContext:
    """What a forward pass hands to every adapted layer: the mix and the dropout noise (None = no
    dropout)."""

    mix: Mix = Mix()
    noise: DropoutNoise | None = None

    @property
    def router(self) -> AnyRouter | None:
        """What the layers ask for gates, if anything."""
        return self.mix.router

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
            replace(t, rows=slice(0, tokens)) if g else t
            for t, g in zip(self.mix.terms, gated, strict=True)
        ]
        noise = None if self.noise is None else self.noise.padded(total)
        return replace(self, mix=replace(self.mix, terms=tuple(terms)), noise=noise)


# Other people's models cannot pass an AdapterContext down; `models/hf/model.py` sets it around their forward.
# It is read in forward only.
AMBIENT_CONTEXT: ContextVar[AdapterContext | None] = ContextVar("lorry_call", default=None)
