"""One layer of the decoder, for every family: attention and MLP over bank layers, forward and
backward.

The two are written out by hand, so that a layer keeps for backward no more than it must: its input,
q, k, v, the attention's output, the middle of the residual stream, the MLP's two inner products,
and what the A's made of their inputs. Norms, rotary positions and gates are done again; a base
product never is. `models/decoder/layer.py` is the backward, and puts the pair behind autograd.
Which linear and which norm is which, the family says (`LayerLinears`, `LayerNorms`).

T tokens, H heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lorry.adapters.layers import BankLinear, LinearGroup
from lorry.adapters.mix import AdapterContext
from lorry.adapters.product import LinearProducts, StackedAdapters, TermParams
from lorry.families import SITES, LayerLinears, ModelFamily, ModelGeometry, RotaryConfig
from lorry.models.decoder import attention
from lorry.models.decoder.attention import AttentionStats, PackedSegments
from lorry.models.decoder.cache import KVCache
from lorry.models.decoder.pointwise import ACTIVATIONS, DecoderNorm, apply_rotary
from lorry.models.decoder.pointwise import gated_activation as apply_gate


@dataclass
class ForwardContext:
    """One forward pass: the call for the bank, rotary tables [T, dim/2], the segments, and a cache
    when generating.

    ``recompute``: layers keep their input only and run again in backward.
    """

    call: AdapterContext
    cos: Tensor | None
    sin: Tensor | None
    segments: PackedSegments
    positions: Tensor
    cache: KVCache | None = None
    rows: Tensor | None = None
    decoding: bool = False
    recompute: bool = False


class LayerTerms(NamedTuple):
    """The low-rank terms of a layer in one pass, and their masters and gates."""

    stacks: LayerLinears[Sequence[StackedAdapters]]
    terms: LayerLinears[Sequence[TermParams[Tensor | None]]]

    def gates(self) -> list[Tensor | None]:
        """Per term of each product."""
        return [term.gate for own in self.terms for term in own]


@dataclass(slots=True)
class SavedActivations:
    """What forward leaves for backward.

    x [T,width]: the layer's input; q [T,H,D], k and v [T,G,D]: q and k as they left their product
    where heads are normed, else already rotated; attn [T,H,D]: the attention's output; residual
    [T,width]: the stream before the MLP (None where the MLP reads x as well); gate, up [T,mlp]: the
    MLP's inner products (up None where there is no gate); stats: what the attention's backward
    wants besides.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    attn: Tensor
    residual: Tensor | None
    gate: Tensor
    up: Tensor | None
    stats: AttentionStats

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What `save_for_backward` takes; `of` reads it."""
        return (
            self.x,
            self.q,
            self.k,
            self.v,
            self.attn,
            self.residual,
            self.gate,
            self.up,
            self.stats.lse,
        )

    @staticmethod
    def of(tensors: Iterator[Tensor], graph: tuple[Tensor, ...]) -> SavedActivations:
        """`tensors` backwards; ``graph``: torch's own, of the attention."""
        x, q, k, v, attn, residual, gate, up, lse = islice(tensors, 9)
        return SavedActivations(x, q, k, v, attn, residual, gate, up, AttentionStats(lse, graph))


class DecoderBlock:
    """The computation of layer ``index``. It holds the layer's modules but registers nothing: names
    stay the family's.
    """

    def __init__(
        self, index: int, layer: nn.Module, family: ModelFamily, geometry: ModelGeometry
    ) -> None:
        def linears(targets: Sequence[str]) -> LinearGroup:
            return LinearGroup(
                [
                    cast(BankLinear, layer.get_submodule(family.targets[target]))
                    for target in targets
                ]
            )

        self.index, self.geometry = index, geometry
        self.linears = family.roles.map(linears)
        self.norms = family.norms.map(lambda path: cast(DecoderNorm, layer.get_submodule(path)))
        # the dimension of q, k, v where one product makes all of them: [T, 3, H, D] or [T, H, 3, D]
        self.fused_at = {"separate": None, "thirds": 1, "heads": 2}[family.qkv]
        self.activation = ACTIVATIONS[geometry.activation]

    def work(self, call: AdapterContext) -> LayerTerms:
        """What the call's adapters add in this layer."""
        found = [
            group.stacks(call, f"{self.index}.{site}", routed=True)
            for group, site in zip(self.linears, SITES, strict=True)
        ]
        return LayerTerms(
            LayerLinears(*(stacks for stacks, _ in found)),
            LayerLinears(*(terms for _, terms in found)),
        )

    def products(
        self, work: LayerTerms, gates: Iterable[Tensor | None]
    ) -> LayerLinears[LinearProducts]:
        """The layer's four products, with these gates: one per term of each, in order."""
        rest = iter(gates)
        parts = zip(self.linears, work.stacks, strict=True)
        return LayerLinears(
            *(
                LinearProducts(group.base_products(), stacks, [next(rest) for _ in stacks])
                for group, stacks in parts
            )
        )

    def trained(self) -> list[Tensor]:
        """What of the base trains, in the order `backward` gives the gradients: linears, then
        norms.
        """
        norms = [p for norm in self.norms.present() for p in (norm.weight, norm.bias)]
        linears = [t for group in self.linears for t in group.trainable_base_tensors()]
        return [*linears, *(p for p in norms if p is not None and p.requires_grad)]

    def forward(
        self,
        x: Tensor,
        state: ForwardContext,
        products: LayerLinears[LinearProducts],
        *,
        save: bool = False,
    ) -> tuple[Tensor, SavedActivations | None]:
        """x [T, width] -> [T, width], without a graph, and what backward needs if there is to be
        one (``save``).
        """
        router, normed = state.call.router, self.norms.attn.compute(x)
        if router is not None:
            route(router.gates(self.index, "attn", normed), products.qkv, products.attn_out)
        heads = products.qkv.forward(normed)
        del normed  # as soon as it has served: it is as large as the layer's input
        q, k, v = self.split(heads)
        del heads
        raw_q, raw_k = q, k
        q, k = self.apply_positions(q, k, state)
        if state.cache is not None and state.rows is not None:
            state.cache.write(self.index, state.rows, state.positions, k, v)
        stats = AttentionStats()
        if state.decoding and state.cache is not None:
            attn = state.cache.attend(self.index, q)
        else:
            attn, stats = attention.attention_forward(q, k, v, state.segments, keep=save)
        (attended,) = products.attn_out.forward(attn.flatten(1))
        parallel = self.geometry.parallel_residual
        if parallel:
            residual, normed = attended.add_(x), self.norms.mlp.compute(x)
        else:
            residual, normed = self.norms.mlp.after_adding(attended, x)
        if router is not None:
            route(router.gates(self.index, "mlp", normed), products.mlp_in, products.mlp_out)
        inner = products.mlp_in.forward(normed)
        gate, up = inner if len(inner) > 1 else (inner[0], None)
        (y,) = products.mlp_out.forward(apply_gate(self.activation, gate, up))
        saved = None
        if save:
            if self.norms.q is not None:
                q, k = raw_q, raw_k
            saved = SavedActivations(
                x, q, k, v, attn, None if parallel else residual, gate, up, stats
            )
        return y.add_(residual), saved

    def apply_positions(self, q: Tensor, k: Tensor, state: ForwardContext) -> tuple[Tensor, Tensor]:
        """q and k with their head norms and positions."""
        if self.norms.q is not None and self.norms.k is not None:
            q, k = self.norms.q.compute(q), self.norms.k.compute(k)
        if state.cos is not None and state.sin is not None:
            q, k = apply_rotary(q, state.cos, state.sin), apply_rotary(k, state.cos, state.sin)
        return q, k

    def split(self, made: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q [T,H,D], k and v [T,G,D] from the products, however the family stores them; contiguous."""
        g, t = self.geometry, made[0].shape[0]
        if self.fused_at is None:
            q, k, v = made
            return q.view(t, g.heads, -1), k.view(t, g.kv_heads, -1), v.view(t, g.kv_heads, -1)
        shape = [t, g.heads, g.head_dim]
        shape.insert(self.fused_at, 3)
        q, k, v = made[0].view(shape).unbind(self.fused_at)
        return q.contiguous(), k.contiguous(), v.contiguous()

    def join(self, dq: Tensor, dk: Tensor, dv: Tensor) -> list[Tensor]:
        """`split` backwards."""
        if self.fused_at is None:
            return [dq.flatten(1), dk.flatten(1), dv.flatten(1)]
        return [torch.stack([dq, dk, dv], self.fused_at).flatten(1)]


def route(gates: Tensor, *products: LinearProducts) -> None:
    """Give the terms that a router gates their columns of ``gates`` [T, adapters]."""
    for product in products:
        product.gates = [
            gate if stack.route is None else gates[stack.tokens, stack.route]
            for stack, gate in zip(product.stacks, product.gates, strict=True)
        ]


def compute_inv_freq(rotary: RotaryConfig, device: torch.device) -> Tensor:
    """[dim/2] fp32 angular frequencies; `linear` divides them all, `llama3` only the slow ones with
    a smooth passage (the published Llama 3.1 rule, by wavelength against the original context)."""
    base = torch.arange(0, rotary.dim, 2, dtype=torch.int64, device=device).float() / rotary.dim
    inverse = 1.0 / (rotary.theta**base)
    if rotary.kind == "default":
        return inverse
    factor = rotary.scaling["factor"]
    if rotary.kind == "linear":
        return inverse / factor
    low, high = rotary.scaling["low_freq_factor"], rotary.scaling["high_freq_factor"]
    context = rotary.scaling["original_max_position_embeddings"]
    turns = context * inverse / (2 * torch.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inverse / factor + smooth * inverse
