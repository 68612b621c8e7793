"""The one low-rank product, forward and backward, without a detour: y = W x + b + sum_k g_k s_k B_k (A_k x).

T tokens, I in, O out, R rank. Compared with autograd over separate linears this keeps no copy of x per adapter, adds the
rank-R term straight into the base product, and hands fp32 gradients to the fp32 masters while computing in the base's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Plan:
    """What one term needs at one layer: rows, dropout mask and rate, scale, and the compute copies a [R,I], b [O,R].

    ``used`` is called when a gradient for the masters was made: they are about to change.
    """

    __slots__ = ("a", "b", "keep", "mask", "rows", "scale", "used")

    def __init__(
        self,
        rows: slice | None,
        scale: float,
        mask: Tensor | None,
        dropout: float,
        a: Tensor,
        b: Tensor,
        used: Callable[[], None],
    ) -> None:
        self.rows = rows if rows is not None else slice(None)
        self.scale = scale
        self.mask = mask
        self.keep = 1.0 / (1.0 - dropout)
        self.a = a
        self.b = b
        self.used = used

    def drop(self, x: Tensor) -> Tensor:
        """Inverted dropout on this term's rows of x (or of its gradient, which passes the same mask)."""
        part = x[self.rows]
        return part if self.mask is None else part * (self.mask[self.rows] * self.keep).to(part.dtype)


class LowRank(torch.autograd.Function):
    """`apply(x, weight, bias, transposed, plans, *masters_and_gates)`: per plan three tensors, A [R,I] fp32, B [O,R] fp32 and its
    gate [rows] or None. ``transposed``: weight is stored [I,O] (Conv1D). The weight and bias are frozen: they get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, plans: list[Plan], *tensors: Tensor | None
    ) -> Tensor:
        w = weight if transposed else weight.t()
        y = torch.mm(x, w) if bias is None else torch.addmm(bias, x, w)
        downs = []
        for i, plan in enumerate(plans):
            h = torch.mm(plan.drop(x), plan.a.t())
            downs.append(h)
            gate = tensors[3 * i + 2]
            scaled = h if gate is None else h * gate.to(h.dtype)[:, None]
            y[plan.rows].addmm_(scaled, plan.b.t(), alpha=plan.scale)
        ctx.transposed, ctx.plans = transposed, plans
        gates = [tensors[3 * i + 2] for i in range(len(plans))]
        ctx.save_for_backward(x, weight, *downs, *gates, *(p.a for p in plans), *(p.b for p in plans))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g, n = grads[0], len(ctx.plans)
        x, weight, *rest = ctx.saved_tensors
        downs, gates, a_s, b_s = (rest[i * n : (i + 1) * n] for i in range(4))
        needs_x = ctx.needs_input_grad[0]
        w = weight.t() if ctx.transposed else weight
        dx = torch.mm(g, w) if needs_x else None
        out: list[Tensor | None] = []
        for i, plan in enumerate(ctx.plans):
            h, gate, a, b = downs[i], gates[i], a_s[i], b_s[i]
            part = g[plan.rows]
            raw = torch.mm(part, b)  # [rows, R], dy B
            up = raw.mul(plan.scale) if gate is None else raw * (gate.to(raw.dtype) * plan.scale)[:, None]
            weighted = h if gate is None else h * gate.to(h.dtype)[:, None]
            needs_a, needs_b, needs_gate = ctx.needs_input_grad[5 + 3 * i : 8 + 3 * i]
            if needs_a or needs_b:
                plan.used()
            out.append(torch.mm(up.t(), plan.drop(x)).float() if needs_a else None)
            out.append(torch.mm(part.t(), weighted).float().mul_(plan.scale) if needs_b else None)
            out.append((h.float() * raw.float()).sum(1).mul_(plan.scale).to(gate.dtype) if needs_gate else None)
            if dx is not None:
                if plan.mask is None:
                    dx[plan.rows].addmm_(up, a)
                else:
                    dx[plan.rows] += torch.mm(up, a) * (plan.mask[plan.rows] * plan.keep).to(dx.dtype)
        return dx, None, None, None, None, *out
