"""The decoder as generation runs it where the CPU kernels are: no graph, weights read as they lie
in memory, memory row by row.

The layers are those of `models/decoder/block.py`; only what few rows need otherwise is here.
Elsewhere the decoder itself generates. T tokens, D width, V vocabulary; a step's rows are its
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import compress

import torch
from torch import Tensor, nn

from lorry.adapters.layers.frozen_linear import DenseLinear
from lorry.adapters.layers.linear import LinearGroup
from lorry.adapters.layers.stacks import StackedAdapters
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.product import LinearProducts
from lorry.adapters.quantization.packed import PackedMatrix
from lorry.adapters.tensor_parallel.slices import gather_outputs
from lorry.adapters.variants.own_weights import under, with_own_rows
from lorry.families import LayerLinears
from lorry.kernels import decode as kernel
from lorry.kernels import matmul
from lorry.kernels.packed import packed_product
from lorry.models.causal_lm import PackedInput
from lorry.models.decoder.cache import RowKVCache
from lorry.models.decoder.low_rank import TermDescription, supports_term
from lorry.models.decoder.model import Decoder
from lorry.models.decoder.step import StepDescription


class SmallBatchProducts(LinearProducts):
    """The products of linears with one input: with few rows the weights are read once as they stand
    and never rearranged, and the terms of all rows are one call of the kernel. ``packed``: the matrix of the
    one linear, of the same values, which is read in its place.
    """

    packed: PackedMatrix | None = None

    @staticmethod
    def of(group: LinearGroup, stacks: Sequence[StackedAdapters]) -> SmallBatchProducts:
        """These products of a group, under the mix of ``stacks``."""
        return SmallBatchProducts(
            group.base_products(), stacks, [None] * len(stacks), slices=group.slices
        )

    @cached_property
    def dense(self) -> Sequence[DenseLinear] | None:
        """The linears, where the kernel takes every weight: a group whose linears went different ways would
        read its input twice."""
        dense = [
            layer
            for layer in self.layers
            if isinstance(layer, DenseLinear) and not layer.transposed
        ]
        alike = len(dense) == len(self.layers)
        return (
            dense
            if alike and all(kernel.supports_product(layer.weight) for layer in dense)
            else None
        )

    @cached_property
    def descriptions(self) -> dict[tuple[bool, ...], TermDescription]:
        """Terms without gates for the kernel, by which of all of them they are; they stay as they are."""
        return {}

    def forward(self, x: Tensor) -> list[Tensor]:
        """As `LinearProducts.forward`, without what backward would need."""
        # of a prompt with many rows the products, not reading the weights, take the time
        most = kernel.most_few_rows(x.dtype)
        if self.packed is not None:
            (layer,) = self.layers
            ys = [packed_product(self.packed.source(), layer.shape[0], x, None)]
        elif x.shape[0] <= most and self.dense is not None:
            ys = [kernel.linear_product(x, layer.weight, layer.bias) for layer in self.dense]
        else:
            ys = [layer.forward(x) for layer in self.layers]
        self._add_terms(x, ys, most)
        return self._finish(ys)

    def _add_terms(self, x: Tensor, ys: list[Tensor], most: int) -> None:
        """Add what every term makes of its rows of x: those that the kernel takes, of at most so many rows each,
        in one call of it (eight prompts of 17 tokens with an adapter each took two thirds of the time, on
        Zen 5 in bfloat16), the rest through torch."""
        together = tuple(
            supports_term(stack) and len(range(*stack.own_tokens.indices(x.shape[0]))) <= most
            for stack in self.stacks
        )
        for stack, gate, direct in zip(self.stacks, self.gates, together, strict=True):
            if not direct:
                h = stack.zero_other_rows(matmul.mm(x[stack.tokens], stack.lora_A.t()))
                h = stack.weigh(h, gate)
                for part in stack.parts:
                    stack.add_product(ys[part.layer], h[:, part.rows], part.lora_B.t(), part.scale)
        stacks = list(compress(self.stacks, together))
        if not stacks:
            return
        gates = list(compress(self.gates, together))
        if any(gate is not None for gate in gates):
            terms = TermDescription.of(stacks, gates, x.dtype)
        elif (known := self.descriptions.get(together)) is not None:
            terms = known
        else:
            terms = self.descriptions[together] = TermDescription.of(stacks)
        kernel.add_low_rank_terms(terms.words, x, ys)


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
        products = SmallBatchProducts.of(head.group, head.group.stacks(call, head.path)[0])
        if (file_head := self.model.packed_head) is not None:
            products.packed = file_head.of(head, len(hidden))
        (values,) = products.forward(hidden)
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
