"""A decoder layer behind autograd: one node per layer, whose backward is written out.

Gradients go to the layer's input, to the masters and gates of the adapters in the call, to the
parameters of a router of the layers, and, where the base itself trains (full fine-tuning), to its
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorry.adapters.layers.stacks import StackedAdapters
from lorry.adapters.mix import AnyRouter, Half, LinearRouter, mixes_mlps
from lorry.adapters.product import LinearProducts, TermParams
from lorry.adapters.tensor_parallel.ranks import TensorRanks
from lorry.families import LayerLinears
from lorry.models.decoder import attention
from lorry.models.decoder.block import (
    DecoderBlock,
    ForwardContext,
    LayerTerms,
    LinearRole,
    SavedActivations,
)
from lorry.models.decoder.experts import ExpertMlps
from lorry.models.decoder.pointwise import (
    DecoderNorm,
    apply_rotary,
    gated_activation,
    gated_activation_backward,
)


def apply_layer(block: DecoderBlock, x: Tensor, state: ForwardContext) -> Tensor:
    """x [T, width] -> [T, width], with a graph if anything in the layer or before it wants a
    gradient.
    """
    # found once: which terms want gradients decides whether there is a node at all
    work = block.lora_terms(state.call)
    y: Tensor
    if torch.is_grad_enabled():
        base = block.trainable_base_tensors()
        terms = [entry for part in work.terms for entry in TermParams.flat(part)]
        router = (
            [] if state.call.router is None else router_parameters(state.call.router, block.index)
        )
        if (
            x.requires_grad
            or base
            or router
            or any(t is not None and t.requires_grad for t in terms)
        ):
            y, *logits = LayerFunction.apply(
                x, LayerCall(block, state, work), *terms, *router, *base
            )
            state.router_logits += logits
            return y
    # nothing below wants a gradient: no node, nothing saved
    y, _, router_logits = block.forward(x, state, block.products(work, work.gates()))
    state.router_logits += router_logits
    return y


def own_rows(stream: Tensor, keepers: TensorRanks | None) -> Tensor:
    """This rank's tokens of the residual stream [T,D], which every rank has; all of them where nobody
    divides it. As `--distribute-saved-activations` of Megatron-LM has it."""
    if keepers is None:
        return stream
    rows = -(-stream.shape[0] // keepers.size)
    # a copy: a view would keep the whole; the last ranks may have fewer tokens, or none
    own = stream[keepers.rank * rows : (keepers.rank + 1) * rows]
    return F.pad(own, (0, 0, 0, rows - own.shape[0])).clone()


def all_rows(own: Tensor, keepers: TensorRanks | None, tokens: int) -> Tensor:
    """`own_rows` backwards: [tokens, D], the same bits."""
    return own if keepers is None else torch.cat(keepers.gather(own))[:tokens]


def router_parameters(router: AnyRouter, layer: int) -> list[Tensor]:
    """Those of the router's parameters that want gradients."""
    return [p for p in router.parameters(layer) if p.requires_grad]


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What `LayerFunction` computes: a block's layer, in this pass, with these terms."""

    block: DecoderBlock
    state: ForwardContext
    work: LayerTerms


class LayerFunction(torch.autograd.Function):
    """`apply(x, call, *parameters of the terms, *router's that train, *base weights that train)`:
    products in order, `TermParams.flat` of each. Gives the layer's output and the router's logits,
    half by half, so that a loss of them reaches the router and what it reads."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, call: LayerCall, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        block, state, stacks = call.block, call.state, call.work.stacks
        ctx.block, ctx.state = block, state
        rest = iter(tensors)
        terms = LayerLinears(*(TermParams.unflat(part, rest) for part in stacks))
        gates = [term.gate for part in terms for term in part]
        products = block.products(call.work, gates)
        # no zeros for logits that no loss reads
        ctx.set_materialize_grads(False)
        y, saved, logits = block.forward(x, state, products, save=not state.recompute)
        gates = [gate for p in products for gate in p.gates]  # a router's too
        if saved is None:
            ctx.save_for_backward(own_rows(x, state.keepers), *gates)
            return y, *logits
        for name in block.kept_stream:
            if (part := getattr(saved, name)) is not None:
                setattr(saved, name, own_rows(part, state.keepers))
        # the attention's own graph is no tensor that save_for_backward could take
        ctx.work, ctx.graph, ctx.experts = call.work, saved.stats.graph, saved.experts
        # none where whole MLPs ran in place of a product
        down_outputs_by_product = list[Tensor | None]()
        for p in products:
            down_outputs_by_product += p.down_outputs or [None] * len(p.stacks)
        ctx.save_for_backward(*saved.tensors(), *down_outputs_by_product, *gates)
        return y, *logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        block, state, tensors = ctx.block, ctx.state, iter(ctx.saved_tensors)
        needs_x, _, *needs_tensors = ctx.needs_input_grad
        state.weights.reach(block.index)
        if state.recompute:
            work = block.lora_terms(state.call)
            x = all_rows(next(tensors), state.keepers, state.positions.numel())
            products = block.products(work, tensors)
            _, saved, _ = block.forward(x, state, products, save=True)
            assert saved is not None
        else:
            work = ctx.work
            # dropped from ctx at once, so that it is freed as soon as attention's backward is
            # through
            saved = SavedActivations.of(tensors, ctx.graph, ctx.experts)
            tokens = state.positions.numel()
            for name in block.kept_stream:
                if (part := getattr(saved, name)) is not None:
                    setattr(saved, name, all_rows(part, state.keepers, tokens))
            ctx.graph, ctx.experts = (), None
            down_outputs_by_product = [[next(tensors) for _ in part] for part in work.stacks]
            products = block.products(work, tensors)
            for p, down_outputs in zip(products, down_outputs_by_product, strict=True):
                p.down_outputs = down_outputs
        flags = iter(needs_tensors)
        needs = LayerLinears(*(TermParams.unflat(stacks, flags) for stacks in work.stacks))
        router = (
            None
            if state.call.router is None
            else RouterBackward(state.call.router, block, grads[1:])
        )
        # flags: terms, then the router's, then the base's, as `apply` was called
        base = [*flags] if router is None else [*flags][len(router.params) :]
        layer_backward = LayerBackward(
            block, state, products, saved, work.terms, needs, router, train_base=any(base)
        )
        # an expanded gradient (of a sum) has stride 0, which the kernels do not take
        dy = grads[0]
        if dy is None:
            # the last layer, where a loss reads its logits and nothing its output
            dy = saved.x.new_zeros(saved.x.shape)
        dx = layer_backward.run(dy.contiguous(), needs_x)
        router_grads = [] if router is None else router.grads
        return (
            dx,
            None,
            *layer_backward.term_gradients(),
            *router_grads,
            *layer_backward.base_gradients(),
        )


class LinearsBackward:
    """The backward of one of a layer's products. ``terms`` and ``base`` hold the gradients
    afterwards; ``needs_gradient``: whether anything wants one."""

    def __init__(
        self,
        products: LinearProducts,
        masters: Sequence[TermParams[Tensor | None]],
        needs: Sequence[TermParams[bool]],
        train_base: bool,
    ) -> None:
        self.products, self.masters, self.needs = products, masters, needs
        self.routed = any(stack.routed for stack in products.stacks)
        # a router's gates are no input of the node: their gradients go on to the router
        if self.routed:
            pairs = zip(products.stacks, needs, strict=True)
            self.needs = [n._replace(gate=True) if stack.routed else n for stack, n in pairs]
        self.trains_base = train_base and any(layer.requires_grad for layer in products.layers)
        self.needs_gradient = self.trains_base or self.routed or any(TermParams.flat(needs))
        self.terms: Sequence[TermParams[Tensor | None]] = TermParams.none(products.stacks)
        self.base: list[Tensor] = []

    def input_grad(
        self,
        grads: Sequence[Tensor],
        needed: bool = True,
        outputs: Callable[[], Sequence[Tensor | None]] | None = None,
    ) -> Tensor | None:
        """The gradient of the input from those of the outputs; to be called before `weight_grads`.
        ``outputs``: makes these again where a term's gradient needs them."""
        scaled = outputs is not None and any(self.products.scaled)
        return self.products.input_gradient(
            grads, needed, outputs() if scaled and outputs is not None else ()
        )

    def weight_grads(
        self, x: Tensor, grads: Sequence[Tensor], norm: DecoderNorm | None = None
    ) -> None:
        """Make the gradients of the masters and, if they train, the weights. x: the input (behind
        ``norm``: what went into that); grads: those of the outputs."""
        if not self.needs_gradient:
            return
        trains_a = any(part.A for term in self.needs for part in term.parts)
        if norm is not None and (
            trains_a or self.trains_base or self.products.inner_grads is not None
        ):
            # the norm again instead of a saved tensor of the input's size; of B's alone nothing reads it
            x = norm.compute(x)
        self.terms = self.products.master_gradients(x, grads, self.needs)
        if self.trains_base:
            self.base = [
                t
                for layer, g in zip(self.products.layers, grads, strict=True)
                for t in layer.parameter_gradients(x, g)
            ]

    def pop_router_gradients(self) -> list[tuple[StackedAdapters, Tensor]]:
        """The gradients of the gates that came from a router; they are none of the terms' own then."""
        pairs = list(zip(self.products.stacks, self.terms, strict=True))
        self.terms = [t._replace(gate=None) if stack.routed else t for stack, t in pairs]
        return [(stack, t.gate) for stack, t in pairs if stack.routed and t.gate is not None]


class RouterBackward:
    """The backward of a layer's router. ``logit_grads``: those of its logits, a half each, or None
    where no loss reads them; ``params`` are what of it trains, ``grads`` their gradients. What a
    router made is made again: nothing is kept of it.
    """

    def __init__(
        self, router: AnyRouter, block: DecoderBlock, logit_grads: Sequence[Tensor | None]
    ) -> None:
        self.router, self.block = router, block
        halves = () if isinstance(router, LinearRouter) else router.halves
        self.logit_grads = dict(zip(halves, logit_grads, strict=True))
        self.params = router_parameters(router, block.index)
        self.grads: list[Tensor | None] = [None] * len(self.params)

    def through_half(
        self,
        half: Half,
        normed: Tensor,
        linears: Sequence[LinearsBackward],
        needs_x: bool,
        dgates: Tensor | None = None,
    ) -> Tensor | None:
        """The gradient of ``normed`` through the gates that the terms of a half's linears took
        (``dgates`` [T,K]: that of gates which whole MLPs took), and the logits; None if nothing
        comes that way. Its parameters' are added to ``grads``."""
        router, dlogits = self.router, self.logit_grads.get(half)
        if isinstance(router, LinearRouter):
            return None
        routed = [pair for linear in linears for pair in linear.pop_router_gradients()]
        # detached: the small graph ends here, what is below is written out
        inputs = [normed.detach().requires_grad_()] if needs_x else []
        if (not routed and dgates is None and dlogits is None) or not (inputs or self.params):
            return None
        with torch.enable_grad():
            logits = router.logits(self.block.index, half, inputs[0] if inputs else normed)
            gates = router.gates(logits)
        if routed:
            dgates = gate_gradient(gates, routed)
        seeds = [] if dgates is None else [(gates, dgates)]
        return self._take([*seeds, *([] if dlogits is None else [(logits, dlogits)])], inputs)

    def through_linears(
        self, role: LinearRole, x: Tensor, linears: LinearsBackward, needs_x: bool
    ) -> Tensor | None:
        """`through_half`, of a router of the linears, for those of a role and what they read, x."""
        router = self.router
        if not isinstance(router, LinearRouter) or not linears.routed:
            return None
        routed = linears.pop_router_gradients()
        inputs = [x.detach().requires_grad_()] if needs_x else []
        if not routed or not (inputs or self.params):
            return None
        with torch.enable_grad():
            gates = self.block.linear_gates(router, role, inputs[0] if inputs else x)
        return self._take([(gates, gate_gradient(gates, routed))], inputs)

    def _take(
        self, seeds: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor]
    ) -> Tensor | None:
        """Add to ``grads`` what comes from these (output, its gradient), and give the input's."""
        seeds = [(output, grad) for output, grad in seeds if output.requires_grad]
        if not seeds:
            return None
        grads = list(
            torch.autograd.grad(
                [output for output, _ in seeds],
                [*self.params, *inputs],
                [grad for _, grad in seeds],
                allow_unused=True,
            )
        )
        # the input stands last in the list above
        dx = grads.pop() if inputs else None
        for i, grad in enumerate(grads):
            total = self.grads[i]
            self.grads[i] = total if grad is None else grad if total is None else total + grad
        return dx


def gate_gradient(gates: Tensor, routed: Sequence[tuple[StackedAdapters, Tensor]]) -> Tensor:
    """The gradient of a router's gates [T, columns] from those of the terms that took them."""
    total = torch.zeros_like(gates)
    for stack, grad in routed:
        # added: several linears take the same gate
        total[stack.tokens] += grad
    return total


class NormBackward:
    """The backward of one of a layer's norms. ``base`` holds the gradients of its weights
    afterwards, if they train.
    """

    def __init__(self, norm: DecoderNorm, train_base: bool) -> None:
        self.norm = norm
        self.requires_grad = train_base and any(
            p.requires_grad for p in (norm.weight, norm.bias) if p is not None
        )
        self.base: list[Tensor] = []

    def weight_grads(self, dy: Tensor, x: Tensor) -> None:
        """Make the gradients of weight and bias, of those that train."""
        if self.requires_grad:
            gradients = zip(
                (self.norm.weight, self.norm.bias),
                self.norm.parameter_gradients(dy, x),
                strict=True,
            )
            self.base = [
                t for p, t in gradients if p is not None and t is not None and p.requires_grad
            ]


class LayerBackward:
    """One backward pass through a layer: `term_gradients` and `base_gradients` afterwards."""

    def __init__(
        self,
        block: DecoderBlock,
        state: ForwardContext,
        products: LayerLinears[LinearProducts],
        saved: SavedActivations,
        masters: LayerLinears[Sequence[TermParams[Tensor | None]]],
        needs: LayerLinears[Sequence[TermParams[bool]]],
        router: RouterBackward | None,
        *,
        train_base: bool,
    ) -> None:
        self.block, self.state, self.saved, self.router = block, state, saved, router
        parts = zip(products, masters, needs, strict=True)
        self.linears = LayerLinears(*(LinearsBackward(*part, train_base) for part in parts))
        self.norms = block.norms.map(lambda norm: NormBackward(norm, train_base))
        self.mixes_mlps = mixes_mlps(state.call.router)

    def run(self, dy: Tensor, needs_x: bool) -> Tensor | None:
        """dy [T, width] -> the gradient of the layer's input, or None where nothing below wants
        one. What neither trains nor lies on the way to something that does costs no product."""
        norms, linears, saved = self.block.norms, self.linears, self.saved
        below = (
            needs_x
            or linears.qkv.needs_gradient
            or linears.attn_out.needs_gradient
            or self._attention_norms_train()
        )
        # the MLP first: backward goes from the layer's end to its start
        dresidual = self._mlp(dy, below)
        dn = None
        if below:
            assert dresidual is not None
            # parallel: attention's output is added to the layer's own output
            into_attention = dy if self.block.geometry.parallel_residual else dresidual
            dn = self._attention(into_attention, needs_x or self.norms.attn.requires_grad)
        return None if not needs_x or dn is None else norms.attn.backward(dn, saved.x, dresidual)

    def term_gradients(self) -> list[Tensor | None]:
        """Of the terms' parameters, in the order `LayerFunction` takes them."""
        return [entry for linears in self.linears for entry in TermParams.flat(linears.terms)]

    def base_gradients(self) -> list[Tensor]:
        """Of the base weights that train, in the order of `DecoderBlock.trainable_base_tensors`."""
        parts: list[LinearsBackward | NormBackward] = [*self.linears, *self.norms.present()]
        return [t for part in parts for t in part.base]

    def _attention_norms_train(self) -> bool:
        """Whether a norm whose gradient comes through attention wants one."""
        norms = self.norms
        return norms.attn.requires_grad or any(
            norm.requires_grad for norm in (norms.q, norms.k) if norm is not None
        )

    def _mlp(self, dy: Tensor, below: bool) -> Tensor | None:
        """The gradient of the MLP's side of the residual stream, that stream's own included."""
        norm, linears, saved = self.norms.mlp, self.linears, self.saved
        residual = saved.mlp_stream(self.block.geometry.parallel_residual)
        if self.mixes_mlps:
            return self._expert_mlps(dy, residual, below)
        assert saved.gate is not None
        dh = linears.mlp_out.input_grad([dy], outputs=lambda: [saved.mlp_output])
        assert dh is not None
        activation = self.block.activation
        if self._routes("mlp_out"):
            # these gates were made of h: their gradient has to be in dh before it goes on
            h = gated_activation(activation, saved.gate, saved.up)
            linears.mlp_out.weight_grads(h, [dy])
            dh = self._through_linear_gates("mlp_out", h, dh)
            assert dh is not None
            dinner, h = gated_activation_backward(activation, dh, saved.gate, saved.up)
        else:
            # h comes along from the gate's backward, needed below for mlp_out's weights
            dinner, h = gated_activation_backward(activation, dh, saved.gate, saved.up)
            linears.mlp_out.weight_grads(h, [dy])
        # both are as wide as the MLP: the peak of the layer's memory is here
        del h, dh
        inner = [saved.gate] if saved.up is None else [saved.gate, saved.up]
        dn = linears.mlp_in.input_grad(dinner, below or norm.requires_grad, lambda: inner)
        linears.mlp_in.weight_grads(residual, dinner, norm.norm)
        if self._routes("mlp_in"):
            dn = self._through_linear_gates("mlp_in", norm.norm.compute(residual), dn)
        dn = self._through_router("mlp", residual, norm.norm, dn, (linears.mlp_in, linears.mlp_out))
        if dn is None:
            return None
        norm.weight_grads(dn, residual)
        # dy rides along: the residual stream passes it unchanged
        return norm.norm.backward(dn, residual, dy) if below else None

    def _expert_mlps(self, dy: Tensor, residual: Tensor, below: bool) -> Tensor | None:
        """`_mlp` where whole MLPs are mixed."""
        norm, linears, state = self.norms.mlp, self.linears, self.state
        router, experts = self.router, self.saved.experts
        assert router is not None
        normed = norm.norm.compute(residual)
        if experts is None:
            # a second backward through the same node: its graph went with the first
            assert not isinstance(router.router, LinearRouter)
            gates = router.router.gates(router.router.logits(self.block.index, "mlp", normed))
            experts = ExpertMlps(self.block, normed, gates, state.call, save=True)
        parts = (linears.mlp_in, linears.mlp_out)
        masters = [entry for part in parts for entry in TermParams.flat(part.masters)]
        flags = [flag for part in parts for flag in TermParams.flat(part.needs)]
        dn, dgates, grads = experts.backward(dy, masters, flags)
        rest = iter(grads)
        for part in parts:
            part.terms = TermParams.unflat(part.products.stacks, rest)
        needs_dn = below or norm.requires_grad
        more = router.through_half("mlp", normed, (), needs_dn, dgates)
        dn = dn if more is None else dn + more
        norm.weight_grads(dn, residual)
        return norm.norm.backward(dn, residual, dy) if below else None

    def _attention(self, dy: Tensor, needs_x: bool) -> Tensor | None:
        """The gradient of the first norm's output, from that of what attention adds to the residual
        stream.
        """
        block, norms, linears, saved, state = (
            self.block,
            self.norms,
            self.linears,
            self.saved,
            self.state,
        )
        dattn = linears.attn_out.input_grad([dy], outputs=lambda: [saved.attended])
        assert dattn is not None
        linears.attn_out.weight_grads(saved.attn.flatten(1), [dy])
        if self._routes("attn_out"):
            dattn = self._through_linear_gates("attn_out", saved.attn.flatten(1), dattn)
            assert dattn is not None
        q, k = saved.q, saved.k
        if norms.q is not None:
            # saved before norm and rotation where heads are normed: done again
            q, k = block.apply_positions(q, k, state)
        dattn = dattn.view(saved.attn.shape)
        dq, dk, dv = attention.attention_backward(
            q, k, saved.v, saved.attn, saved.stats, state.segments, dattn
        )
        if state.cos is not None and state.sin is not None:
            dq, dk = (
                # a rotation's transpose is the rotation back
                apply_rotary(dq, state.cos, state.sin, inverse=True),
                apply_rotary(dk, state.cos, state.sin, inverse=True),
            )
        if norms.q is not None and norms.k is not None:
            norms.q.weight_grads(dq, saved.q)
            norms.k.weight_grads(dk, saved.k)
            dq, dk = norms.q.norm.backward(dq, saved.q), norms.k.norm.backward(dk, saved.k)
        # into the layout of the family's product(s)
        dheads = block.join_heads(dq, dk, dv)
        dn = linears.qkv.input_grad(dheads, needs_x, self._heads)
        linears.qkv.weight_grads(saved.x, dheads, norms.attn.norm)
        if self._routes("qkv"):
            dn = self._through_linear_gates("qkv", norms.attn.norm.compute(saved.x), dn)
        dn = self._through_router(
            "attn", saved.x, norms.attn.norm, dn, (linears.qkv, linears.attn_out)
        )
        if dn is not None:
            norms.attn.weight_grads(dn, saved.x)
        return dn

    def _heads(self) -> list[Tensor]:
        """What the family's product(s) made of x: q and k as they were before they were rotated."""
        saved, state = self.saved, self.state
        q, k = saved.q, saved.k
        if self.norms.q is None and state.cos is not None and state.sin is not None:
            # copies: it turns them in place
            q = apply_rotary(q.clone(), state.cos, state.sin, inverse=True)
            k = apply_rotary(k.clone(), state.cos, state.sin, inverse=True)
        return self.block.join_heads(q, k, saved.v)

    def _through_router(
        self,
        half: Half,
        x: Tensor,
        norm: DecoderNorm,
        dn: Tensor | None,
        linears: Sequence[LinearsBackward],
    ) -> Tensor | None:
        """dn, the gradient of ``norm``'s output for x, with what comes to it through the router."""
        if self.router is None or half not in self.router.logit_grads:
            return dn
        through_gates = self.router.through_half(half, norm.compute(x), linears, dn is not None)
        return dn if dn is None or through_gates is None else dn + through_gates

    def _routes(self, role: LinearRole) -> bool:
        """Whether a router of the linears made the gates of a role's terms."""
        return (
            self.router is not None
            and isinstance(self.router.router, LinearRouter)
            and getattr(self.linears, role).routed
        )

    def _through_linear_gates(
        self, role: LinearRole, x: Tensor, dx: Tensor | None
    ) -> Tensor | None:
        """dx, the gradient of what a role's linears read, x, with what comes through their gates."""
        assert self.router is not None
        linears = getattr(self.linears, role)
        through_gates = self.router.through_linears(role, x, linears, dx is not None)
        return dx if dx is None or through_gates is None else dx + through_gates.to(dx.dtype)
