"""The one low-rank product, forward and backward, without a detour: y = W x + b + sum_k g_k s_k B_k
(A_k x).

Linears that read the same input are one piece of work: their A's are stacked, so x A^T, dA and the
low-rank part of dx are one matrix product each, however many projections there are. So are the
experts of a mixture: K terms for the same tokens are one stack, whose B's lie side by side in each
linear, and a gate multiplies its expert's ranks between the two. The rank-R
terms are added straight into the base products, nothing is copied per adapter, and the masters get
fp32 gradients while everything is computed in the base's dtype.

T tokens, I in, O out, R rank, S the sum of the ranks of a stack.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorry.adapters.layers.frozen_linear import FrozenLinear
from lorry.adapters.layers.stacks import StackedAdapters
from lorry.adapters.tensor_parallel.slices import LayerSlices
from lorry.adapters.variants.magnitude import MatrixProduct
from lorry.kernels import adapter_products, matmul

# Whatever stands for a parameter: the tensor itself, a bool (wants a gradient), or a gradient.
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class PartParams(NamedTuple, Generic[T_co]):
    """One thing for each parameter of one linear in a term: lora_A [R,I] and lora_B [O,R]."""

    A: T_co
    B: T_co


class TermParams(NamedTuple, Generic[T_co]):
    """One thing for each parameter of a term at linears that read the same input: the parameter
    itself, whether it wants a gradient, or that gradient. ``parts``: as in the term's
    `StackedAdapters`, pair by pair; ``gate``: of the gates per token (None in place of a tensor where
    the term has none, or they are the router's); ``vectors``: of the slots that have one.

    autograd takes and gives flat tuples of tensors. Their order is known to `flat` and `unflat`
    alone, so that a variant with one parameter more changes this class and nothing it passes
    through.
    """

    parts: tuple[PartParams[T_co], ...]
    gate: T_co
    vectors: tuple[T_co, ...] = ()

    @staticmethod
    def flat(terms: Iterable[TermParams[T]]) -> list[T]:
        """What the terms hold, in autograd's order."""
        return [
            entry
            for term in terms
            for entry in (*(e for part in term.parts for e in part), term.gate, *term.vectors)
        ]

    @staticmethod
    def unflat(stacks: Sequence[StackedAdapters], flat: Iterator[T]) -> list[TermParams[T]]:
        """`flat` backwards: take from an iterator as much as the terms of these stacks hold."""
        return [
            TermParams(
                tuple(PartParams(next(flat), next(flat)) for _ in range(stack.num_slots)),
                next(flat),
                tuple(next(flat) for _ in stack.vectors),
            )
            for stack in stacks
        ]

    @staticmethod
    def none(stacks: Sequence[StackedAdapters]) -> list[TermParams[Tensor | None]]:
        """No gradient for anything."""
        return TermParams[Tensor | None].unflat(stacks, repeat(None))


@dataclass(slots=True)
class LinearProducts:
    """The work of linears with one input in one pass. ``gates``: per stack [tokens, C] or None.

    Call `forward`; then, in backward, `input_gradient` and `master_gradients`. ``down_outputs`` (per stack
    [tokens, S], what A made of x) is what forward leaves for backward, besides x itself. ``slices``: how
    the linears, all of them alike, are cut over ranks: then a sum over ranks ends `forward` (rows of x
    are cut) or `input_gradient` (rows of the ys are), and the terms' shares of both ride in it; or, with
    `LayerSlices.sums_ranks`, each stack's [tokens, S] is summed and nothing else.
    """

    layers: Sequence[FrozenLinear]
    stacks: Sequence[StackedAdapters]
    gates: Sequence[Tensor | None]
    down_outputs: list[Tensor] = field(default_factory=list)
    slices: LayerSlices | None = None
    up_grads: list[Tensor] = field(default_factory=list)
    raw_up_grads: list[Tensor] = field(default_factory=list)
    # of a DoRA: the gradients of W x + s B A x, and of the magnitudes, stack by stack
    inner_grads: list[Tensor] | None = None
    vector_grads: list[list[Tensor]] = field(default_factory=list)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [T,I] -> y [T,O] per linear."""
        ys = [layer.forward(x) for layer in self.layers]
        self.down_outputs = []
        for stack, gate in zip(self.stacks, self.gates, strict=True):
            own = self._in_one_call(stack, gate, ys, x)
            if own is not None:
                parts, outputs, (rows,) = own
                self.down_outputs.append(
                    adapter_products.add_adapter_terms(rows, stack.lora_A, parts, outputs)
                )
                continue
            # one product for every linear of the group: columns of h are the ranks of all its
            # adapters, stacked
            h = matmul.mm(stack.dropout_input(x), stack.lora_A.t())
            self._add_up("output", stack.zero_other_rows(h), of_terms=True)
            self.down_outputs.append(h)
            # gated at rank width (S columns), not at output width (O): the same result for fewer
            # multiplications
            weighted = stack.weigh(h, gate)
            for part in stack.parts:
                stack.add_product(
                    ys[part.layer], weighted[:, part.rows], part.lora_B.t(), part.scale
                )
        return self._finish(ys)

    def _in_one_call(
        self, stack: StackedAdapters, gate: Tensor | None, ys: Sequence[Tensor], *others: Tensor
    ) -> tuple[list[adapter_products.AdapterPart], list[Tensor], list[Tensor]] | None:
        """What `adapter_products` takes of a stack, where it does: its parts, of the outputs (or their
        gradients) ``ys`` those of the parts, and of these and ``others`` the stack's rows."""
        if ys[0].dtype != torch.bfloat16 or self.slices is not None:
            return None
        if (parts := stack.plain_parts(gate)) is None:
            return None
        rows, own = list(others), [ys[part.layer] for part in stack.parts]
        if stack.tokens != slice(None):
            rows, own = ([t[stack.tokens] for t in some] for some in (rows, own))
        matrices = (stack.lora_A, *(part.lora_B for part in parts))
        if not adapter_products.supports_adapter(own[0], *own[1:], *rows, *matrices):
            return None
        return parts, own, rows

    @property
    def scaled(self) -> list[bool]:
        """Of each linear, whether a DoRA term is there: its backward needs the output."""
        on = {part.layer for stack in self.stacks if stack.scaled for part in stack.parts}
        return [i in on for i in range(len(self.layers))]

    def _finish(self, ys: list[Tensor]) -> list[Tensor]:
        """Every y [T,O], with the magnitudes of its terms; where a rank has made its columns' part of it
        alone, the sum over ranks."""
        for stack, gate in zip(self.stacks, self.gates, strict=True):
            if stack.scaled:
                for part in stack.parts:
                    assert part.output_scale is not None
                    part.output_scale.scale_output(stack.own_rows(ys[part.layer]))
            elif stack.vectors and self._adds_biases:
                for bias in stack.copies.biases:
                    rows = stack.own_rows(ys[bias.layer])
                    if gate is None or bias.column is None:
                        rows += bias.values
                    else:
                        rows.addr_(gate[:, bias.column].to(rows.dtype), bias.values)
        for y in ys:
            self._add_up("output", y)
        return ys

    @property
    def _adds_biases(self) -> bool:
        """Whether this process adds them: of a sum over ranks one alone."""
        cut = self.slices
        return cut is None or cut.columns is None or cut.ranks.rank == 0

    def _bias_gradients(
        self, stack: StackedAdapters, grads: Sequence[Tensor], gate: Tensor | None
    ) -> list[Tensor]:
        """fp32 at least, of the biases of a stack, from those of the ys."""
        gradients = []
        for bias in stack.copies.biases:
            g = stack.own_rows(grads[bias.layer])
            wide = torch.promote_types(g.dtype, torch.float32)
            if gate is None or bias.column is None:
                total = g.sum(0, dtype=wide)
            else:
                total = torch.mv(g.t(), gate[:, bias.column].to(g.dtype)).to(wide)
            gradients.append(total * bias.scale)
        return gradients

    def _add_up(
        self, what: Literal["output", "input gradient"], part: Tensor, *, of_terms: bool = False
    ) -> None:
        """Sum over ranks, in place, what each has made a part of: an output of its columns, or an input
        gradient of its rows. ``of_terms``: what of it is as wide as a stack's ranks, where sums are
        those."""
        cut = self.slices
        if cut is None or (cut.columns if what == "output" else cut.rows) is None:
            return
        if cut.sums_ranks == of_terms:
            cut.ranks.add_up(part)

    def input_gradient(
        self,
        grads: Sequence[Tensor],
        needed: bool = True,
        outputs: Sequence[Tensor | None] = (),
    ) -> Tensor | None:
        """The gradient of x [T,I] from those of the ys, or None; keeps what `master_gradients`
        needs. ``outputs``: the ys, of those that are ``scaled``.
        """
        for stack in self.stacks:
            stack.copies.refuse_written()
        dx = None
        if any(stack.scaled for stack in self.stacks):
            grads = self._through_magnitudes(grads, outputs)
        for layer, g in zip(self.layers, grads, strict=True):
            dx = layer.backward(g, dx) if needed else None
        self.up_grads, self.raw_up_grads = [], []
        for stack, gate in zip(self.stacks, self.gates, strict=True):
            own = self._in_one_call(stack, gate, grads, *(() if dx is None else (dx,)))
            if own is not None:
                parts, own_grads, into = own
                up = adapter_products.input_gradient(
                    stack.lora_A, parts, own_grads, into[0] if into else None
                )
                self.raw_up_grads.append(up)
                self.up_grads.append(up)
                continue
            # [tokens, S] = scale * dy B, filled linear by linear; every column belongs to exactly
            # one of them
            up = grads[0].new_empty(grads[0][stack.tokens].shape[0], stack.lora_A.shape[0])
            for part in stack.parts:
                up[:, part.rows] = matmul.mm(grads[part.layer][stack.tokens], part.lora_B).mul_(
                    part.scale
                )
            self._add_up("input gradient", up, of_terms=True)
            # before the gate: the gate's own gradient needs what it multiplied
            self.raw_up_grads.append(stack.zero_other_rows(up))
            self.up_grads.append(stack.weigh(up, gate))
            if dx is None:
                continue
            if stack.dropout is None:
                stack.add_product(dx, self.up_grads[-1], stack.lora_A)
            else:
                # dropout sits between x and A, so the same mask must act on what A sends back
                # before it is added; addmm_ cannot do that in place
                more = stack.zero_other_rows(
                    stack.dropout.apply(matmul.mm(self.up_grads[-1], stack.lora_A), stack.tokens)
                )
                dx[stack.tokens] += more
        if dx is not None:
            self._add_up("input gradient", dx)
        return dx

    def _through_magnitudes(
        self, grads: Sequence[Tensor], outputs: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """The gradients of what the magnitudes scale, from those of the ys; and those of the magnitudes."""
        inner: list[Tensor | None] = [None] * len(grads)
        self.vector_grads = []
        for stack in self.stacks:
            self.vector_grads.append([])
            for part in stack.parts if stack.scaled else ():
                g, y, scale = grads[part.layer].contiguous(), outputs[part.layer], part.output_scale
                assert y is not None
                assert scale is not None
                into = inner[part.layer]
                if into is None:
                    everything = stack.own_rows(g).shape == g.shape
                    inner[part.layer] = into = torch.empty_like(g) if everything else g.clone()
                own = (stack.own_rows(t) for t in (g, y.view(g.shape), into))
                self.vector_grads[-1].append(scale.backward(*own))
        self.inner_grads = [
            g if into is None else into for g, into in zip(grads, inner, strict=True)
        ]
        return self.inner_grads

    def _dead_row_gradients(self, x: Tensor, grads: Sequence[Tensor]) -> None:
        """Of magnitudes that are 0: their outputs say nothing of what they scale, which is made again."""
        for k, (stack, h) in enumerate(zip(self.stacks, self.down_outputs, strict=True)):
            for j, part in enumerate(stack.parts if stack.scaled else ()):
                scale, layer = part.output_scale, self.layers[part.layer]
                assert scale is not None
                if scale.dead is None:
                    continue
                assert isinstance(layer, MatrixProduct)
                rows = stack.own_rows(grads[part.layer])[:, scale.dead].to(scale.norm.dtype)
                u = stack.own_rows(x) @ layer.matrix()[scale.dead].t()
                low = h if stack.term_rows is None else h[stack.term_rows]
                u = u + part.scale * (low[:, part.rows] @ part.lora_B[scale.dead].t())
                if self.slices is not None and self.slices.columns is not None:
                    self.slices.ranks.add_up(u)
                self.vector_grads[k][j][scale.dead] = (rows * u).sum(0) / scale.norm[scale.dead]

    def master_gradients(
        self, x: Tensor, grads: Sequence[Tensor], needs: Sequence[TermParams[bool]]
    ) -> list[TermParams[Tensor | None]]:
        """fp32 gradients of each term's masters, and of its gate in the gate's dtype; x as in
        forward.
        """
        if self.inner_grads is not None:
            self._dead_row_gradients(x, grads)
            grads = self.inner_grads
        out: list[TermParams[Tensor | None]] = []
        for k, (stack, gate, h, up, raw, need) in enumerate(
            zip(
                self.stacks,
                self.gates,
                self.down_outputs,
                self.up_grads,
                self.raw_up_grads,
                needs,
                strict=True,
            )
        ):
            # a gradient for a master means that an optimizer will write it: the compute copies are
            # stale from here on, even where no version counter will move
            if any(part.A or part.B for part in need.parts) or any(need.vectors):
                stack.mark_stale()
            own = self._in_one_call(stack, gate, grads, x) if h.is_contiguous() else None
            if own is not None:
                plain, own_grads, (rows,) = own
                da, dbs = adapter_products.master_gradients(
                    rows,
                    h,
                    up,
                    plain,
                    own_grads,
                    (any(part.A for part in need.parts), [part.B for part in need.parts]),
                )
                gradients = [
                    PartParams(da[part.rows] if da is not None and wanted.A else None, db_)
                    for part, wanted, db_ in zip(stack.parts, need.parts, dbs, strict=True)
                ]
                out.append(
                    TermParams(
                        tuple(gradients), None, self._vector_gradients(k, stack, gate, grads, need)
                    )
                )
                continue
            da = (
                # zeros in both factors: a row of another term may hold inf or NaN, and 0 * inf is
                # NaN
                matmul.mm(stack.trained_ranks(up).t(), stack.masked_input(x)).float()
                if any(part.A for part in need.parts)
                else None
            )
            shares = stack.slot_shares()
            db: list[Tensor | None] = [None] * len(stack.parts)
            train = {s.part for s, wanted in zip(shares, need.parts, strict=True) if wanted.B}
            weighted = stack.weigh(h, gate) if train else h
            for i in train:
                # one product for all the adapters of a linear
                g = grads[stack.parts[i].layer][stack.tokens]
                # a clone: the slice is a view of the caller's gradient
                g = g if stack.term_rows is None else stack.zero_other_rows(g.clone())
                db[i] = matmul.mm(g.t(), weighted[:, stack.parts[i].gradient_rows]).float()
            parts: list[PartParams[Tensor | None]] = []
            for share, wanted in zip(shares, need.parts, strict=True):
                own = db[share.part]
                parts.append(
                    PartParams(
                        da[share.rows] if da is not None and wanted.A else None,
                        own[:, share.columns].mul_(share.scale)
                        if own is not None and wanted.B
                        else None,
                    )
                )
            dgate = stack.gate_gradient(h, raw, gate) if gate is not None and need.gate else None
            if dgate is not None and stack.vectors and self._adds_biases:
                for bias in stack.copies.biases:
                    through = stack.own_rows(grads[bias.layer]) @ bias.values
                    dgate[:, bias.column] += through.to(dgate.dtype)
            # of a cut linear: a sum over its rows, or with a partial sum of A x, either way a part
            if dgate is not None and self.slices is not None and not self.slices.sums_ranks:
                self.slices.ranks.add_up(dgate)
            vectors = self._vector_gradients(k, stack, gate, grads, need)
            out.append(TermParams(tuple(parts), dgate, vectors))
        return out

    def _vector_gradients(
        self,
        k: int,
        stack: StackedAdapters,
        gate: Tensor | None,
        grads: Sequence[Tensor],
        need: TermParams[bool],
    ) -> tuple[Tensor | None, ...]:
        """fp32 gradients of the magnitudes or biases of stack k, of those that are needed."""
        if not any(need.vectors):
            return (None,) * len(need.vectors)
        own = self.vector_grads[k] if stack.scaled else self._bias_gradients(stack, grads, gate)
        return tuple(own[j].float() if wanted else None for j, wanted in enumerate(need.vectors))


@dataclass(frozen=True, slots=True)
class Linears:
    """What `LowRankFunction` computes: linears that read the same input, and the terms of the call
    there.
    """

    layers: Sequence[FrozenLinear]
    stacks: Sequence[StackedAdapters]
    slices: LayerSlices | None = None


class LowRankFunction(torch.autograd.Function):
    """`apply(x [T,I], linears, *TermParams.flat(terms), *base)` -> y [T,O] per linear, with
    gradients for all tensors. base: those weights and biases of the layers that train.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, linears: Linears, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        terms = TermParams.unflat(linears.stacks, iter(tensors))
        gates = [term.gate for term in terms]
        work = LinearProducts(linears.layers, linears.stacks, gates, slices=linears.slices)
        ys = work.forward(x)
        ctx.linears = linears
        # the ys are saved where a magnitude scales them: no other gradient of a linear needs its output
        ctx.scaled = [i for i, scaled in enumerate(work.scaled) if scaled]
        outputs = [ys[i] for i in ctx.scaled]
        # nor is x, where B's alone train: their gradients are made of what the A's made of it
        flags = iter(ctx.needs_input_grad[2:])
        wanted = TermParams.unflat(linears.stacks, flags)
        reads_x = any(part.A for term in wanted for part in term.parts) or any(flags) or outputs
        kept = x if reads_x else None
        ctx.save_for_backward(kept, *outputs, *work.down_outputs, *work.gates)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        linears: Linears = ctx.linears
        layers, stacks = linears.layers, linears.stacks
        # in `apply`'s order: x, linears (no tensor), the terms' tensors, the base's
        needs_x, _, *needs_tensors = ctx.needs_input_grad
        needs = iter(needs_tensors)
        # unflat consumes the terms' share of the iterator; what is left belongs to the base, hence
        # the order
        terms, needs_base = TermParams.unflat(stacks, needs), any(needs)
        saved = iter(ctx.saved_tensors)
        x, outputs = next(saved), list[Tensor | None]([None] * len(layers))
        for i in ctx.scaled:
            outputs[i] = next(saved)
        down_outputs = [next(saved) for _ in stacks]
        work = LinearProducts(layers, stacks, list(saved), down_outputs, linears.slices)
        dx = work.input_gradient(grads, needs_x, outputs)
        masters = TermParams.flat(work.master_gradients(x, grads, terms))
        base = (
            [
                t
                for layer, g in zip(layers, grads, strict=True)
                for t in layer.parameter_gradients(x, g)
            ]
            if needs_base
            else []
        )
        return dx, None, *masters, *base
