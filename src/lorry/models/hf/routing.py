"""A router of the layers in a model of transformers, whose code cannot hand gates on: each half of a
layer, its attention or its MLP as a module, is given its gates when it is called.

What the half reads is what the router reads; its logits become gates, and the linears inside see a call
whose routed terms have these gates as tensors. S sequences, L padded length, n real tokens, D width, K
experts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorry.adapters.mix import AMBIENT_CONTEXT, AdapterContext, Half, LayerRouter, LinearRouter
from lorry.errors import ContractError
from lorry.models.hf.frames import PaddedFrame


class FramedRouter:
    """A `LayerRouter` for the tokens of one frame. ``made``: its logits by layer and half, [n, K] in
    the order in which the frame has its real tokens."""

    def __init__(self, router: LayerRouter, frame: PaddedFrame) -> None:
        self.router, self.frame = router, frame
        self.adapters, self.halves, self.level = router.adapters, router.halves, router.level
        self.made: dict[tuple[int, Half], Tensor] = {}

    def parameters(self, layer: int) -> list[Tensor]:
        """What `logits` of this layer reads."""
        return list(self.router.parameters(layer))

    def logits(self, layer: int, half: Half, x: Tensor) -> Tensor:
        """x [S,L,D], what the half reads -> [n,K] of the real tokens."""
        logits = self.router.logits(layer, half, self.frame.unpad(x))
        # those of the forward pass are a loss's: a layer that is run again in backward makes others
        self.made.setdefault((layer, half), logits)
        return logits

    def gates(self, logits: Tensor) -> Tensor:
        """[n,K] -> the gates of the whole frame [S L, K], 0 at its padding."""
        gates = self.router.gates(logits)
        whole = gates.new_zeros(len(self.frame.spans) * self.frame.length, gates.shape[-1])
        return whole.index_copy(0, self.frame.positions, gates)

    def gated_call(self, call: AdapterContext, layer: int, half: Half, x: Tensor) -> AdapterContext:
        """The call as the linears of a half see it."""
        gates = self.gates(self.logits(layer, half, x))
        return replace(call, mix=call.mix.with_token_gates(gates))


def frame_call(frame: PaddedFrame, call: AdapterContext) -> AdapterContext:
    """A packed call for a frame, its router too. Raises ContractError for a routed term with a gate
    tensor of its own."""
    framed, router = frame.adapter_context(call), call.router
    if router is None:
        return framed
    for term in call.mix.terms:
        if term.route is not None and isinstance(term.gate, Tensor):
            raise ContractError(
                f"the adapter {term.adapter!r} has gates of a layer router and a gate of its own; give the "
                "term a number"
            )
    if isinstance(router, LinearRouter):
        return framed  # each linear asks it for itself
    return replace(framed, mix=replace(framed.mix, router=FramedRouter(router, frame)))


def gate_half(
    forward: Callable[..., Any],
    layer: int,
    half: Half,
    use_call: Callable[[AdapterContext], AbstractContextManager[None]],
) -> Callable[..., Any]:
    """A half's forward under the gates that the call's router makes of its input; the forward itself
    without a router. ``use_call``: what lets the linears inside see a call.

    A `partial` of the bound method, and no closure: `copy.deepcopy` of the model copies what a
    partial holds, so that a copy's half is that copy's, and not the original's.
    """
    return partial(_run_gated, forward, layer, half, use_call)


def _run_gated(
    forward: Callable[..., Any],
    layer: int,
    half: Half,
    use_call: Callable[[AdapterContext], AbstractContextManager[None]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    call = AMBIENT_CONTEXT.get()
    router = None if call is None else call.router
    if call is None or not isinstance(router, FramedRouter) or half not in router.halves:
        return forward(*args, **kwargs)
    with use_call(router.gated_call(call, layer, half, half_input(args, kwargs))):
        return forward(*args, **kwargs)


def half_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a half is called with: its first argument, or the one of that name."""
    x = args[0] if args else kwargs["hidden_states"]
    assert isinstance(x, torch.Tensor)
    return x
