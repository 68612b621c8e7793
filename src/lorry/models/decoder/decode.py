"""The decoder as generation runs it where the CPU kernels are: no graph, weights read as they lie
in memory, memory row by row.

The layers are those of `models/decoder/block.py`; only what few rows need otherwise is here.
Elsewhere the decoder itself generates. T tokens, D width, V vocabulary; a step's rows are its
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from lorry.adapters.layers.linear import LinearGroup
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.product import DenseLinear, LinearProducts, StackedAdapters
from lorry.adapters.tensor_parallel.slices import LayerSlices, gather_outputs
from lorry.adapters.variants.own_weights import under, with_own_rows
from lorry.families import LayerLinears
from lorry.kernels import decode as kernel
from lorry.kernels import matmul
from lorry.models.causal_lm import PackedInput
from lorry.models.decoder.cache import RowKVCache
from lorry.models.decoder.model import Decoder
from lorry.models.decoder.step import StepDescription


class SmallBatchProducts(LinearProducts):
    """The products of linears with one input: with few rows the weights are read once as they stand
    and never rearranged.
    """

    def __init__(
        self,
        layers: Sequence[DenseLinear],
        stacks: Sequence[StackedAdapters],
        slices: LayerSlices | None,
    ) -> None:
        super().__init__(layers, stacks, [None] * len(stacks), slices=slices)
        self.dense = layers

    @cached_property
    def direct(self) -> list[bool]:
        """Per term: whether the kernel multiplies it too (not what lies in strides, as views of the masters
        may); the others go through torch, in the same sum."""
        return [
            kernel.supports_product(stack.lora_A)
            and all(kernel.supports_product(p.lora_B) for p in stack.parts)
            for stack in self.stacks
        ]

    @staticmethod
    def of(group: LinearGroup, stacks: Sequence[StackedAdapters]) -> LinearProducts:
        """These products where the kernel takes every weight, else the plain ones: a group whose
        linears went different ways would read its input twice."""
        layers = group.base_products()
        dense = [
            layer for layer in layers if isinstance(layer, DenseLinear) and not layer.transposed
        ]
        if len(dense) == len(layers) and all(
            kernel.supports_product(layer.weight) for layer in dense
        ):
            return SmallBatchProducts(dense, stacks, group.slices)
        return LinearProducts(layers, stacks, [None] * len(stacks), slices=group.slices)

    def forward(self, x: Tensor) -> list[Tensor]:
        """As `LinearProducts.forward`, without what backward would need."""
        # a prompt: with many rows the products, not reading the weights, take the time
        if x.shape[0] > kernel.most_few_rows(x.dtype):
            return super().forward(x)
        ys = [kernel.linear_product(x, layer.weight, layer.bias) for layer in self.dense]
        for stack, direct, gate in zip(self.stacks, self.direct, self.gates, strict=True):
            tokens = stack.own_tokens if direct else stack.tokens
            part_x = x[tokens]
            # [rows of the term, sum of ranks]: x A^T of all linears of the group at once
            h = (
                kernel.linear_product(part_x, stack.lora_A, None)
                if direct
                else stack.zero_other_rows(matmul.mm(part_x, stack.lora_A.t()))
            )
            h = stack.weigh(h, gate)
            for part in stack.parts:
                if direct:
                    kernel.add_linear_product(
                        h, part.rows, part.lora_B, part.scale, ys[part.layer][tokens]
                    )
                else:
                    stack.add_product(ys[part.layer], h[:, part.rows], part.lora_B.t(), part.scale)
        return self._finish(ys)


def _has_token_gates(call: AdapterContext) -> bool:
    """Whether a term has gates made of these very tokens, which products of constants know nothing of."""
    return any(isinstance(term.gate, Tensor) for term in call.mix.terms)


class DecodeRunner:
    """A decoder with the face that `models.causal_lm.CausalLM` asks for.

    What the adapters add is looked up when prompts are read and when the mix changes, not at every
    token, which would cost hundreds of look-ups in Python: adapters stay as they are while answers
    are made, and a change since the last is seen at the next prompt.
    """

    def __init__(self, model: Decoder) -> None:
        self.model, self.context, self.device = model, model.context, model.device
        # the mix that `layers` was looked up for, and the products of every layer under it
        self.mix: Mix | None = None
        self.layers: list[LayerLinears[LinearProducts]] = []
        # all of it for one call of the kernels, where they have everything that is in it
        self.step: StepDescription | None = None

    @staticmethod
    def takes(model: nn.Module) -> bool:
        """Whether this is a decoder that the kernels serve; they read weights by address, which have to
        stay where they are."""
        return (
            isinstance(model, Decoder)
            and not model.layer_weights.sharded
            and kernel.supports_decode(model.dtype, model.device)
        )

    def new_cache(self, rows: int, room: int) -> RowKVCache:
        """As `Decoder.new_cache`."""
        g = self.model.geometry
        heads = self.model.local_geometry.kv_heads
        return RowKVCache(g.layers, rows, heads, room, g.head_dim, self.model.dtype)

    @torch.no_grad()
    def forward_cached(
        self,
        packed: PackedInput,
        rows: Tensor,
        cache: RowKVCache,
        call: AdapterContext,
        *,
        decoding: bool,
    ) -> Tensor:
        """As `Decoder.forward_cached`: tokens [T] -> hidden [T,D]."""
        if _has_token_gates(call):
            # of a prompt that invokes an adapter; the answer's are constants
            self.mix = None
            return self.model.forward_cached(packed, rows, cache, call, decoding=decoding)
        # a router's gates differ from token to token: the layers put each pass's into the products
        products = self._work(call, anew=not decoding)
        step = self.step if decoding and call.router is None else None
        at_once = step.run if step is not None and step.takes(len(rows)) else None
        return self.model.forward_cached(
            packed, rows, cache, call, decoding=decoding, products=products, step=at_once
        )

    @torch.no_grad()
    def logits(self, hidden: Tensor, call: AdapterContext) -> Tensor:
        """[T,D] -> [T,V] in the base's dtype."""
        if _has_token_gates(call):
            return self.model.logits(hidden, call)
        head = under(self.model.head, call)
        (values,) = SmallBatchProducts.of(
            head.group, head.group.stacks(call, head.path)[0]
        ).forward(hidden)
        return gather_outputs(with_own_rows(head, hidden, values), head.slices)

    def _work(self, call: AdapterContext, *, anew: bool) -> list[LayerLinears[LinearProducts]]:
        """The products of every layer, adapters included; ``anew``: whatever was looked up."""
        if anew or self.mix is None or call.mix != self.mix:
            self.mix = call.mix
            blocks = [block.under(call) for block in self.model.blocks]
            self.layers = [
                LayerLinears(
                    *(
                        SmallBatchProducts.of(group, stacks)
                        for group, stacks in zip(
                            block.linears, block.lora_terms(call).stacks, strict=True
                        )
                    )
                )
                for block in blocks
            ]
            self.step = StepDescription.of(blocks, self.layers)
        return self.layers
