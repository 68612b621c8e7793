"""A decoder layer behind autograd: one node per layer, whose backward is written out.

Gradients go to the layer's input, to the masters and gates of the adapters in the call, and, where the base itself trains
(full fine-tuning), to its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorry.adapters.product import Products
from lorry.models.decoder import attention
from lorry.models.decoder.attention import Memo
from lorry.models.decoder.block import Block, Kept, Pass, Work
from lorry.models.decoder.pointwise import Norm, gate_backward, rotate


def run(block: Block, x: Tensor, state: Pass) -> Tensor:
    """x [T, width] -> [T, width], with a graph if anything in the layer or before it wants a gradient."""
    work = block.work(state.call)
    if torch.is_grad_enabled():
        base = [p for p in block.parameters() if p.requires_grad]
        if x.requires_grad or base or any(m is not None and m.requires_grad for m in work.masters):
            return Layer.apply(x, block, state, work, *work.masters, *base)
    return block.forward(x, state, work.products(block.groups, work.masters), None)


class Layer(torch.autograd.Function):
    """`apply(x, block, state, work, *masters, *trained base weights)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, state: Pass, work: Work, *tensors: Tensor | None) -> Tensor:
        ctx.block, ctx.state, ctx.base = block, state, len(tensors) - len(work.masters)
        masters = tensors[: len(work.masters)]
        products = work.products(block.groups, masters)
        ctx.gates = [m is not None and m.dim() == 1 for m in masters]
        gates = [m for m, is_gate in zip(masters, ctx.gates, strict=True) if is_gate]
        if state.recompute:
            y = block.forward(x, state, products, None)
            ctx.save_for_backward(x, *gates)
            return y
        kept = Kept()
        y = block.forward(x, state, products, kept)
        if kept.memo.lse is not None:
            kept.tensors["lse"] = kept.memo.lse
        ctx.work, ctx.graph, ctx.names = work, kept.memo.graph, list(kept.tensors)
        downs = [down for p in products for down in p.downs]
        ctx.save_for_backward(*kept.tensors.values(), *downs, *gates)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        block, state = ctx.block, ctx.state
        saved = list(ctx.saved_tensors)
        gates = iter(saved[len(saved) - sum(ctx.gates) :])
        masters = [next(gates) if is_gate else None for is_gate in ctx.gates]
        if state.recompute:
            work, kept = block.work(state.call), Kept()
            products = work.products(block.groups, masters)
            block.forward(saved[0], state, products, kept)
        else:
            kept = Kept(dict(zip(ctx.names, saved, strict=False)))
            kept.memo, ctx.graph = Memo(kept.tensors.get("lse"), ctx.graph), ()
            products, at = ctx.work.products(block.groups, masters), len(ctx.names)
            for p in products:
                p.downs = saved[at : at + len(p.stacks)]
                at += len(p.stacks)
        needs = ctx.needs_input_grad
        sweep = Sweep(block, state, products, kept, needs[4 : len(needs) - ctx.base])
        dx = sweep.run(grads[0].contiguous(), needs[0], bool(ctx.base))
        return dx, None, None, None, *(g for group in sweep.masters for g in group), *sweep.base


class Sweep:
    """One backward pass through a layer: ``masters`` (per product) and ``base`` hold the gradients afterwards."""

    def __init__(self, block: Block, state: Pass, products: Sequence[Products], kept: Kept, needs: Sequence[bool]) -> None:
        self.block, self.state, self.products, self.kept = block, state, products, kept
        self.needs, at = [], 0
        for p in products:
            count = sum(2 * len(s.parts) + 1 for s in p.stacks)
            self.needs.append(needs[at : at + count])
            at += count
        self.masters: list[list[Tensor | None]] = [[None] * len(needs) for needs in self.needs]
        self.weights: list[list[Tensor]] = [[] for _ in products]
        self.norms: dict[int, list[Tensor]] = {}
        self.base: list[Tensor] = []

    def run(self, dy: Tensor, needs_x: bool, train_base: bool) -> Tensor | None:
        """dy [T, width] -> the gradient of the layer's input, or None where nothing below wants one. What neither trains nor lies
        on the way to something that does costs no product."""
        block, kept, self.train_base = self.block, self.kept.tensors, train_base
        x = kept["x"]
        mid = kept.get("mid", x)
        below = needs_x or any(self._wanted(i) for i in (0, 1)) or any(self._trains(i) for i in range(len(block.norms)) if i != 1)
        dmid = self._mlp(dy, mid, below)
        dn = None
        if below:
            assert dmid is not None
            first = needs_x or self._trains(0)
            dn = self._attention(dy if block.geometry.parallel_residual else dmid, first)
        if train_base:
            self.base = self._base_gradients()
        return None if not needs_x or dn is None else block.norms[0].backward(dn, x, dmid)

    def _wanted(self, index: int) -> bool:
        """Whether a product's masters, or its own weights, want gradients."""
        return any(self.needs[index]) or (self.train_base and any(layer.trains for layer in self.products[index].layers))

    def _trains(self, index: int) -> bool:
        """Whether a norm's own weights want gradients."""
        norm = self.block.norms[index]
        return self.train_base and any(p.requires_grad for p in (norm.weight, norm.bias) if p is not None)

    def _mlp(self, dy: Tensor, mid: Tensor, below: bool) -> Tensor | None:
        """The gradient of the MLP's side of the residual stream, that stream's own included."""
        block, kept = self.block, self.kept.tensors
        dh = self.products[3].input_gradient([dy])
        assert dh is not None
        inner = [kept[f"inner{i}"] for i in range(len(self.products[2].layers))]
        dinner, h = gate_backward(block.activation, dh, inner[0], inner[1] if len(inner) > 1 else None)
        self._done(3, h, [dy])
        del h, dh
        dn = self.products[2].input_gradient(dinner, below or self._trains(1))
        self._done(2, mid, dinner, block.norms[1])
        if dn is None:
            return None
        self._norm(1, dn, mid)
        return block.norms[1].backward(dn, mid, dy) if below else None

    def _attention(self, dmid: Tensor, needs_x: bool) -> Tensor | None:
        """The gradient of the first norm's output."""
        block, kept, state = self.block, self.kept.tensors, self.state
        o = kept["o"]
        do = self.products[1].input_gradient([dmid])
        assert do is not None
        self._done(1, o.flatten(1), [dmid])
        q, k = kept["q"], kept["k"]
        if len(block.norms) > 2:
            q, k = block.placed(q, k, state)
        dq, dk, dv = attention.backward(q, k, kept["v"], o, self.kept.memo, state.segments, do.view(o.shape))
        if state.cos is not None and state.sin is not None:
            dq, dk = rotate(dq, state.cos, state.sin, back=True), rotate(dk, state.cos, state.sin, back=True)
        if len(block.norms) > 2:
            self._norm(2, dq, kept["q"])
            self._norm(3, dk, kept["k"])
            dq, dk = block.norms[2].backward(dq, kept["q"]), block.norms[3].backward(dk, kept["k"])
        dmade = block.join(dq, dk, dv)
        dn = self.products[0].input_gradient(dmade, needs_x)
        self._done(0, kept["x"], dmade, block.norms[0])
        if dn is not None:
            self._norm(0, dn, kept["x"])
        return dn

    def _done(self, index: int, x: Tensor, grads: Sequence[Tensor], norm: Norm | None = None) -> None:
        """Input (behind ``norm``: what went into that) and output gradients of a product are known: make those of its masters
        and, if they train, its weights."""
        if not self._wanted(index):
            self.masters[index] = [None] * len(self.needs[index])
            return
        x = x if norm is None else norm.compute(x)
        self.masters[index] = self.products[index].master_gradients(x, grads, self.needs[index])
        if self.train_base:
            self.weights[index] = [
                t for layer, g in zip(self.products[index].layers, grads, strict=True) for t in layer.own_gradients(x, g)
            ]

    def _norm(self, index: int, dy: Tensor, x: Tensor) -> None:
        if self._trains(index):
            norm = self.block.norms[index]
            made = zip((norm.weight, norm.bias), norm.own_gradients(dy, x), strict=True)
            self.norms[index] = [t for p, t in made if p is not None and t is not None and p.requires_grad]

    def _base_gradients(self) -> list[Tensor]:
        return [t for part in self.weights for t in part] + [t for i in sorted(self.norms) for t in self.norms[i]]
