"""The decoder as generation runs it where the CPU kernels are: no graph, weights read as they lie in memory, memory row by row.

The layers are those of `models/decoder/block.py`; only what few rows need otherwise is here. Elsewhere the decoder itself generates.
T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorry.adapters.layers import Group
from lorry.adapters.mix import Call, Mix
from lorry.adapters.product import Frozen, Products, Stack
from lorry.families import LayerLinears
from lorry.kernels import decode as kernel
from lorry.models.decoder.cache import RowCache
from lorry.models.decoder.model import Decoder, Packed


class FewRows(Products):
    """The products of linears with one input: with few rows the weights are read once as they stand and never rearranged."""

    def __init__(self, layers: Sequence[Frozen], stacks: Sequence[Stack]) -> None:
        super().__init__(layers, stacks, [None] * len(stacks))
        self.dense = layers
        self.direct = [kernel.multiplies(stack.a) and all(kernel.multiplies(p.b) for p in stack.parts) for stack in stacks]

    @staticmethod
    def of(group: Group, stacks: Sequence[Stack]) -> Products:
        """FewRows where the kernel takes every weight, else the plain products."""
        layers = group.frozen()
        dense = [layer for layer in layers if isinstance(layer, Frozen) and not layer.transposed]
        if len(dense) == len(layers) and all(kernel.multiplies(layer.weight) for layer in dense):
            return FewRows(dense, stacks)
        return Products(layers, stacks, [None] * len(stacks))

    def forward(self, x: Tensor) -> list[Tensor]:
        """As `Products.forward`, without what backward would need."""
        if x.shape[0] > kernel.FEW:
            return super().forward(x)
        ys = [kernel.product(x, layer.weight, layer.bias) for layer in self.dense]
        for stack, direct in zip(self.stacks, self.direct, strict=True):
            tokens = _own_tokens(stack) if direct else stack.tokens
            part_x = x[tokens]
            h = kernel.product(part_x, stack.a, None) if direct else stack.clear(torch.mm(part_x, stack.a.t()))
            for part in stack.parts:
                if direct:
                    kernel.add_product(h, part.rows, part.b, part.scale, ys[part.layer][tokens])
                else:
                    stack.add(ys[part.layer], h[:, part.rows], part.b.t(), part.scale)
        return ys


def _own_tokens(stack: Stack) -> slice:
    """The rows a term is for, without those that are taken along for torch's sake."""
    if stack.inner is None:
        return stack.tokens
    return slice(stack.tokens.start + stack.inner.start, stack.tokens.start + stack.inner.stop)


class Runner:
    """A decoder with the face that `models.generate.Generative` asks for.

    What the adapters add is looked up when the mix changes, not at every token: adapters stay as they are while answers are made.
    """

    def __init__(self, model: Decoder) -> None:
        self.model, self.context, self.device = model, model.context, model.device
        self.mix: Mix | None = None
        self.layers: list[LayerLinears[Products]] = []

    @staticmethod
    def takes(model: nn.Module) -> bool:
        """Whether this is a decoder that the kernels serve."""
        return isinstance(model, Decoder) and kernel.takes(model.dtype, model.device)

    def new_cache(self, rows: int, room: int) -> RowCache:
        """As `Decoder.new_cache`."""
        g = self.model.geometry
        return RowCache(g.layers, rows, g.kv_heads, room, g.head_dim, self.model.dtype)

    @torch.no_grad()
    def cached(self, packed: Packed, rows: Tensor, cache: RowCache, call: Call, *, decoding: bool) -> Tensor:
        """As `Decoder.cached`: tokens [T] -> hidden [T,D]."""
        products = None if call.router is not None else self._work(call)  # gates differ from token to token
        return self.model.cached(packed, rows, cache, call, decoding=decoding, products=products)

    @torch.no_grad()
    def logits(self, hidden: Tensor, call: Call) -> Tensor:
        """[T,D] -> [T,V] in the base's dtype."""
        head = self.model.head
        (made,) = FewRows.of(head.group, head.group.stacks(call, head.path)[0]).forward(hidden)
        return made

    def _work(self, call: Call) -> list[LayerLinears[Products]]:
        """The products of every layer, adapters included."""
        if call.mix != self.mix:
            self.mix = call.mix
            self.layers = [
                LayerLinears(
                    *(FewRows.of(group, stacks) for group, stacks in zip(block.linears, block.work(call).stacks, strict=True))
                )
                for block in self.model.blocks
            ]
        return self.layers
