"""The MLP of a layer under a mixture at level `expert`: every token's own experts' whole MLPs, which
is what stock MoE classes compute.

    m = sum over a token's experts e of g_e MLP_e(n), each of MLP_e's matrices W + s_e B_e A_e

The base's products run once for each (token, expert) pair; an expert sees the tokens alone whose
gate is not 0. Its backward is autograd's, of a graph that begins at the normed input and ends at
the MLP's output: `ExpertMlps` holds it inside the layer's node. T tokens, D width, K experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorry.adapters.layers.linear import LinearGroup
from lorry.adapters.mix import AdapterContext, Mix, MixTerm
from lorry.errors import ContractError
from lorry.families import SITES, LayerLinears
from lorry.models.decoder.pointwise import (
    ActivationFunction,
    gated_activation,
    gated_activation_backward,
)

ROW_STEP = 64  # rows of a bfloat16 product on a CPU: as `adapters.layers.linear.align_rows`


@dataclass(frozen=True)
class MlpShare:
    """Tokens that have one MLP: ``rows`` [t] sorted, ``column`` of the gates that multiplies its
    output (None: 1), and the terms within it."""

    rows: Tensor
    column: int | None
    call: AdapterContext


def mlp_shares(call: AdapterContext, gates: Tensor) -> Iterator[MlpShare]:
    """Who has which MLP, given gates [T,K]. Tokens that no routed term is for have the base's, once;
    an expert without a term is the base's MLP too. Raises ContractError for a term with gates of
    its own, whose gradient would have to pass through here."""
    plain = [term for term in call.mix.terms if term.route is None]
    routed = [term for term in call.mix.terms if term.route is not None]
    if odd := [term.adapter for term in plain if isinstance(term.gate, Tensor)]:
        raise ContractError(
            f"the adapter {odd[0]!r} has a gate per token, beside a router at level=expert; "
            "give its term a number"
        )
    covered = torch.zeros(gates.shape[0], dtype=torch.bool, device=gates.device)
    for term in routed:
        covered[slice(None) if term.rows is None else term.rows] = True
    choice_mask = (gates.detach() != 0) & covered[:, None]
    for k in range(gates.shape[1]):
        own = tuple(
            MixTerm(term.adapter, term.rows, term.gate) for term in routed if term.route == k
        )
        yield from _share(choice_mask[:, k], k, call, (*plain, *own))
    yield from _share(~covered, None, call, tuple(plain))


def _share(
    mask: Tensor, column: int | None, call: AdapterContext, terms: tuple[MixTerm, ...]
) -> Iterator[MlpShare]:
    rows = mask.nonzero().squeeze(1)
    if rows.numel():
        narrowed = AdapterContext(Mix(terms), call.noise)
        yield MlpShare(rows, column, narrowed)


class MlpBlock(Protocol):
    """What of a layer its MLP needs: `block.DecoderBlock`."""

    index: int
    linears: LayerLinears[LinearGroup]

    @property
    def activation(self) -> ActivationFunction:
        """Of its gate."""


class ExpertMlps:
    """The MLPs of a layer in one pass: ``output`` [T,D], and, if it is to have a backward (``save``),
    the graph that made it. ``normed`` [T,D], ``gates`` [T,K]."""

    def __init__(
        self,
        block: MlpBlock,
        normed: Tensor,
        gates: Tensor,
        call: AdapterContext,
        *,
        save: bool,
    ) -> None:
        groups = (block.linears.mlp_in, block.linears.mlp_out)
        if save and any(group.trainable_base_tensors() for group in groups):
            raise ContractError(
                f"layer {block.index}: base weights do not train under a router at level=expert; "
                "train an adapter, or level=delta"
            )
        self.inputs = [normed.detach(), gates.detach()]
        if not save:
            with torch.no_grad():
                self.graph_output = self._run(block, call)
            return
        for leaf in self.inputs:
            leaf.requires_grad_()
        # the layer's node runs without a graph; this one is its own
        with torch.enable_grad():
            self.graph_output = self._run(block, call)

    @property
    def output(self) -> Tensor:
        """m [T,D], which may be overwritten."""
        return self.graph_output.detach()

    def _run(self, block: MlpBlock, call: AdapterContext) -> Tensor:
        normed, gates = self.inputs
        total = torch.zeros_like(normed)
        into, out_of = block.linears.mlp_in, block.linears.mlp_out
        for share in mlp_shares(call, gates):
            rows, count = share.rows, share.rows.numel()
            if normed.dtype == torch.bfloat16 and normed.device.type == "cpu":
                # oneDNN compiles a product for every number of rows: the last row again, up to few
                # numbers; what comes of it is cut off
                rows = torch.cat([rows, rows[-1:].expand(-count % ROW_STEP)])
            own = share.call.narrow(rows)
            inner = into.forward(normed.index_select(0, rows), own, f"{block.index}.{SITES.mlp_in}")
            gate, up = inner if len(inner) > 1 else (inner[0], None)
            h = ActivationProduct.apply(block.activation, gate, up)
            (y,) = out_of.forward(h, own, f"{block.index}.{SITES.mlp_out}")
            y = y[:count]
            if share.column is not None:
                weight = gates[:, share.column].index_select(0, share.rows)
                y = y * weight.to(y.dtype)[:, None]
            total = total.index_add(0, share.rows, y)
        return total

    def backward(
        self, dy: Tensor, masters: Sequence[Tensor | None], needs: Iterable[bool]
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        """(gradient of normed, of the gates, of the masters that need one) from dy [T,D]."""
        wanted = [m if need else None for m, need in zip(masters, needs, strict=True)]
        # by identity: a term of several sequences has its masters in the list more than once
        params = list({id(m): m for m in wanted if m is not None}.values())
        dnormed, dgates, *rest = torch.autograd.grad(
            self.graph_output, [*self.inputs, *params], dy, allow_unused=True
        )
        by_master = {id(m): g for m, g in zip(params, rest, strict=True)}
        grads = list[Tensor | None]()
        for master in wanted:
            # once: the gradient is the whole one already
            grads.append(None if master is None else by_master.pop(id(master), None))
        return dnormed, dgates, grads


class ActivationProduct(torch.autograd.Function):
    """`apply(activation, gate, up)` -> act(gate) * up, of which nothing but the two is kept."""

    @staticmethod
    def forward(ctx: Any, act: ActivationFunction, gate: Tensor, up: Tensor | None) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return gated_activation(act, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        # cloned: it may be overwritten, and is not ours
        inner, _ = gated_activation_backward(ctx.act, grads[0].clone(), gate, up)
        return None, inner[0], inner[1] if len(inner) > 1 else None
