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

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from lorry.adapters.layers.linear import BankLinear, LinearGroup
from lorry.adapters.layers.stacks import StackedAdapters
from lorry.adapters.mix import AdapterContext, Half, LinearRouter, mixes_mlps
from lorry.adapters.product import LinearProducts, TermParams
from lorry.adapters.tensor_parallel.ranks import TensorRanks
from lorry.adapters.tensor_parallel.slices import gather_inputs
from lorry.adapters.variants.own_weights import has_own_weights, under
from lorry.errors import ContractError
from lorry.families import SITES, LayerLinears, ModelFamily, ModelGeometry, RotaryConfig
from lorry.models.decoder import attention
from lorry.models.decoder.attention import AttentionStats, PackedSegments
from lorry.models.decoder.cache import KVCache
from lorry.models.decoder.experts import ExpertMlps
from lorry.models.decoder.pointwise import (
    ACTIVATIONS,
    ActivationFunction,
    DecoderNorm,
    apply_rotary,
)
from lorry.models.decoder.pointwise import gated_activation as apply_gate
from lorry.models.layer_weights import WHOLE_WEIGHTS, LayerWeights


@dataclass
class ForwardContext:
    """One forward pass: the adapters' context, rotary tables [T, dim/2], the segments, and a cache
    when generating.

    ``rows`` [tokens]: the cache's row of each token, but for padding behind them;
    ``recompute``: layers keep their input only and run again in backward; ``keepers``: the ranks that
    divide by tokens what a layer keeps of the residual stream, which all of them have (sequence
    parallel);
    ``router_logits``: what the router made in the layers so far, layer by layer and half by half,
    [T, adapters] each; ``weights``: where those of the layers are.
    """

    call: AdapterContext
    # None for families with learned positions
    cos: Tensor | None
    sin: Tensor | None
    segments: PackedSegments
    positions: Tensor
    cache: KVCache | None = None
    rows: Tensor | None = None
    # one new token a row: attention reads the cache instead of the segments
    decoding: bool = False
    # so it does where prompts go on behind what their rows hold
    continuing: bool = False
    recompute: bool = False
    keepers: TensorRanks | None = None
    router_logits: list[Tensor] = field(default_factory=list)
    weights: LayerWeights = WHOLE_WEIGHTS


LinearRole = Literal["qkv", "attn_out", "mlp_in", "mlp_out"]  # the fields of `LayerLinears`


class LayerTerms(NamedTuple):
    """The low-rank terms of a layer in one pass, and their masters and gates."""

    stacks: LayerLinears[Sequence[StackedAdapters]]
    terms: LayerLinears[Sequence[TermParams[Tensor | None]]]

    def gates(self) -> list[Tensor | None]:
        """Per term of each product."""
        return [term.gate for terms in self.terms for term in terms]


@dataclass(slots=True)
class SavedActivations:
    """What forward leaves for backward.

    x [T,width]: the layer's input; q [T,H,D], k and v [T,G,D]: q and k as they left their product
    where heads are normed, else already rotated; attn [T,H,D]: the attention's output; residual
    [T,width]: the stream before the MLP (None where the MLP reads x as well, and where it is x and
    attended); gate, up [T,mlp]: the MLP's inner products (up None where there is no gate); attended, mlp_output
    [T,width]: what attention and the MLP add to the stream, where a DoRA term scales it, else None; stats: what
    the attention's backward wants besides; experts: in place of gate and up, where whole MLPs are mixed.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    attn: Tensor
    residual: Tensor | None
    gate: Tensor | None
    up: Tensor | None
    attended: Tensor | None
    mlp_output: Tensor | None
    stats: AttentionStats
    experts: ExpertMlps | None = None

    def mlp_stream(self, parallel: bool) -> Tensor:
        """[T,width]: the stream as the MLP's norm read it; ``parallel``: that was x."""
        if self.residual is not None:
            return self.residual
        # rounded once, as it was
        return self.x if parallel or self.attended is None else self.x + self.attended

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
            self.attended,
            self.mlp_output,
            self.stats.lse,
        )

    @staticmethod
    def of(
        tensors: Iterator[Tensor], graph: tuple[Tensor, ...], experts: ExpertMlps | None
    ) -> SavedActivations:
        """`tensors` backwards; ``graph``: torch's own, of the attention."""
        # eleven of them; what follows in the iterator belongs to the terms
        x, q, k, v, attn, residual, gate, up, attended, mlp_output, lse = islice(tensors, 11)
        stats = AttentionStats(lse, graph)
        return SavedActivations(
            x, q, k, v, attn, residual, gate, up, attended, mlp_output, stats, experts
        )


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
        # one LinearGroup a role: linears with the same input share the stacked A products
        self.linears = family.roles.map(linears)
        self.norms = family.norms.map(lambda path: cast(DecoderNorm, layer.get_submodule(path)))
        # the dimension of q, k, v where one product makes all of them: [T, 3, H, D] or [T, H, 3, D]
        self.fused_dim = {"separate": None, "thirds": 1, "heads": 2}[family.qkv]

    @property
    def kept_stream(self) -> tuple[str, ...]:
        """The fields of `SavedActivations` that are the residual stream, or a part it is made of."""
        return ("x",) if self.geometry.parallel_residual else ("x", "residual", "attended")

    @property
    def activation(self) -> ActivationFunction:
        """Of its MLP. Looked up, not kept: of a copied model too it is the very one that has a kernel."""
        return ACTIVATIONS[self.geometry.activation]

    def under(self, call: AdapterContext) -> DecoderBlock:
        """The layer as it computes under a call: itself, or one with the weights that the active adapter
        has in the base's place. Whoever runs it keeps it until backward."""
        norms = self.norms.present()
        linears = [linear for group in self.linears for linear in group.linears]
        if not any(has_own_weights(module) for module in (*norms, *linears)):
            return self
        twin = copy.copy(self)
        twin.norms = self.norms.map(lambda norm: under(norm, call))
        twin.linears = self.linears.map(
            lambda group: LinearGroup([under(linear, call) for linear in group.linears])
        )
        return twin

    def lora_terms(self, call: AdapterContext) -> LayerTerms:
        """What the call's adapters add in this layer."""
        pairs = [
            # the layer's number and the site name the dropout mask, here and in backward
            group.stacks(call, f"{self.index}.{site}", routed=True)
            for group, site in zip(self.linears, SITES, strict=True)
        ]
        return LayerTerms(
            LayerLinears(*(stacks for stacks, _ in pairs)),
            LayerLinears(*(terms for _, terms in pairs)),
        )

    def products(
        self, lora_terms: LayerTerms, gates: Iterable[Tensor | None]
    ) -> LayerLinears[LinearProducts]:
        """The layer's four products, with these gates: one per term of each, in order."""
        # consumed across all four products: gates come in one flat tuple
        rest = iter(gates)
        parts = zip(self.linears, lora_terms.stacks, strict=True)
        return LayerLinears(
            *(
                LinearProducts(
                    group.base_products(), stacks, [next(rest) for _ in stacks], slices=group.slices
                )
                for group, stacks in parts
            )
        )

    def trainable_base_tensors(self) -> list[Tensor]:
        """What of the base trains, in the order `backward` gives the gradients: linears, then
        norms.
        """
        # this order is also the order of `LayerBackward.base_gradients`; autograd matches by place
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
    ) -> tuple[Tensor, SavedActivations | None, list[Tensor]]:
        """x [T, width] -> [T, width], without a graph, what backward needs if there is to be one
        (``save``), and the router's logits. Raises ContractError under autocast where anything trains or
        an adapter is on: sums in the place of products, and backward, know the weights' dtype alone.
        """
        if torch.is_autocast_enabled(x.device.type) and (save or any(p.stacks for p in products)):
            raise ContractError(
                "torch.autocast is on, and Lorry's own decoder computes with adapters and gradients in the "
                "dtype of its weights; switch autocast off, and load the model in the dtype wanted "
                "(dtype=bfloat16)"
            )
        logits, normed = list[Tensor](), self.norms.attn.compute(x)
        self._route(state, "attn", normed, (products.qkv, products.attn_out), logits)
        heads = self._product("qkv", normed, state, products)
        del normed  # as soon as it has served: it is as large as the layer's input
        q, k, v = self.split_heads(heads)
        del heads
        # apply_positions may rotate in place where heads are not normed
        raw_q, raw_k = q, k
        q, k = self.apply_positions(q, k, state)
        if state.cache is not None and state.rows is not None:
            # keys are stored rotated: their position never changes; those of padding, of no row, are not
            own = slice(len(state.rows))
            state.cache.write(self.index, state.rows, state.positions[own], k[own], v[own])
        stats = AttentionStats()
        if state.decoding and state.cache is not None:
            # no stats: decoding never has a backward
            attn = state.cache.attend(self.index, q)
        elif state.continuing and state.cache is not None and state.rows is not None:
            own = slice(len(state.rows))
            # zeros of padding, which has no row
            attn = torch.zeros_like(q)
            attn[own] = state.cache.attend_rows(
                self.index, q[own], state.rows, state.positions[own]
            )
        else:
            attn, stats = attention.attention_forward(q, k, v, state.segments, save=save)
        (attended,) = self._product("attn_out", attn.flatten(1), state, products)
        # both are added to in place
        kept = attended.clone() if save and any(products.attn_out.scaled) else None
        parallel = self.geometry.parallel_residual
        if parallel:
            # GPT-NeoX: the MLP reads the layer's input, not attention's result
            residual, normed = attended.add_(x), self.norms.mlp.compute(x)
        else:
            residual, normed = self.norms.mlp.add_and_normalise(attended, x)
        gates = self._route(state, "mlp", normed, (products.mlp_in, products.mlp_out), logits)
        experts, gate, up = None, None, None
        if gates is not None and mixes_mlps(state.call.router):
            experts = ExpertMlps(self, normed, gates, state.call, save=save)
            y = experts.output
        else:
            inner = self._product("mlp_in", normed, state, products)
            # an ungated MLP has one inner product, which goes through the activation
            gate, up = inner if len(inner) > 1 else (inner[0], None)
            (y,) = self._product("mlp_out", apply_gate(self.activation, gate, up), state, products)
        saved = None
        if save:
            kept_y = y.clone() if any(products.mlp_out.scaled) else None
            if self.norms.q is not None:
                # backward of the head norms needs what went into them
                q, k = raw_q, raw_k
            saved = SavedActivations(
                x,
                q,
                k,
                v,
                attn,
                None if parallel or kept is not None else residual,
                gate,
                up,
                kept,
                kept_y,
                stats,
                experts,
            )
        # in place: y is this layer's own tensor and has no other reader
        return y.add_(residual), saved, logits

    def _route(
        self,
        state: ForwardContext,
        half: Half,
        normed: Tensor,
        products: Sequence[LinearProducts],
        logits: list[Tensor],
    ) -> Tensor | None:
        """Give the routed terms of a half their gates [T, adapters], and add the logits behind those
        of the other. Raises ContractError where the router has none for them.
        """
        router = state.call.router
        if router is None:
            return None
        if half in router.halves:
            if not isinstance(router, LinearRouter):
                logits.append(router.logits(self.index, half, normed))
                gates = router.gates(logits[-1])
                apply_router_gates(gates, *products)
                return gates
        elif any(stack.routed for p in products for stack in p.stacks):
            # without this check the term would count in full, as if its gate were 1
            raise ContractError(
                f"layer {self.index}: an expert has an adapter in the {half} half, whose input its "
                "router does not read"
            )
        return None

    def _product(
        self,
        role: LinearRole,
        x: Tensor,
        state: ForwardContext,
        products: LayerLinears[LinearProducts],
    ) -> list[Tensor]:
        """What the linears of a role make of x, whose gates a router of the linears makes first."""
        product, router = getattr(products, role), state.call.router
        if (
            # first: what is asked of a protocol takes microseconds
            router is not None
            and isinstance(router, LinearRouter)
            and any(stack.routed for stack in product.stacks)
        ):
            apply_router_gates(self.linear_gates(router, role, x), product)
        outputs: list[Tensor] = product.forward(x)
        return outputs

    def linear_gates(self, router: LinearRouter, role: LinearRole, x: Tensor) -> Tensor:
        """What a router of the linears makes for those of a role, of which x is what they read: of ranks
        that share the model a part, maybe, and the router compares whole inputs."""
        group: LinearGroup = getattr(self.linears, role)
        paths = [linear.path for linear in group.linears]
        return router.linear_gates(paths, gather_inputs(x, group.slices))

    def apply_positions(self, q: Tensor, k: Tensor, state: ForwardContext) -> tuple[Tensor, Tensor]:
        """q and k with their head norms and positions."""
        if self.norms.q is not None and self.norms.k is not None:
            # head norms come before rotation, as Qwen3 has it
            q, k = self.norms.q.compute(q), self.norms.k.compute(k)
        if state.cos is not None and state.sin is not None:
            q, k = apply_rotary(q, state.cos, state.sin), apply_rotary(k, state.cos, state.sin)
        return q, k

    def split_heads(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q [T,H,D], k and v [T,G,D] from the products, however the family stores them; contiguous."""
        g, t = self.geometry, outputs[0].shape[0]
        if self.fused_dim is None:
            q, k, v = outputs
            return q.view(t, g.heads, -1), k.view(t, g.kv_heads, -1), v.view(t, g.kv_heads, -1)
        shape = [t, g.heads, g.head_dim]
        # [T, 3, H, D]: rows q|k|v; [T, H, 3, D]: q, k, v interleaved by head
        shape.insert(self.fused_dim, 3)
        q, k, v = outputs[0].view(shape).unbind(self.fused_dim)
        # unbind gives strided views, which the kernels do not take
        return q.contiguous(), k.contiguous(), v.contiguous()

    def join_heads(self, dq: Tensor, dk: Tensor, dv: Tensor) -> list[Tensor]:
        """`split_heads` backwards."""
        if self.fused_dim is None:
            return [dq.flatten(1), dk.flatten(1), dv.flatten(1)]
        return [torch.stack([dq, dk, dv], self.fused_dim).flatten(1)]


def apply_router_gates(gates: Tensor, *products: LinearProducts) -> None:
    """Give the terms that a router gates their tokens of ``gates`` [T, columns]."""
    for product in products:
        product.gates = [
            gates[stack.tokens] if stack.routed else gate
            for stack, gate in zip(product.stacks, product.gates, strict=True)
        ]


def compute_inv_freq(rotary: RotaryConfig, device: torch.device) -> Tensor:
    """[dim/2] fp32 angular frequencies; `linear` divides them all, `llama3` only the slow ones with
    a smooth passage (the published Llama 3.1 rule, by wavelength against the original context)."""
    # exactly transformers' order of operations: another one differs in the last bit
    base = torch.arange(0, rotary.dim, 2, dtype=torch.int64, device=device).float() / rotary.dim
    inverse = 1.0 / (rotary.theta**base)
    if rotary.kind == "default":
        return inverse
    factor = rotary.scaling["factor"]
    if rotary.kind == "linear":
        return inverse / factor
    low, high = rotary.scaling["low_freq_factor"], rotary.scaling["high_freq_factor"]
    context = rotary.scaling["original_max_position_embeddings"]
    rotations = context * inverse / (2 * torch.pi)
    # 0 where a dimension turns rarely within the original context (scaled), 1 where often (kept)
    smooth = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inverse / factor + smooth * inverse
