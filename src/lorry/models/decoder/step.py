"""The layers of a decoder as `kernels/layers.cpp` reads them: one step of generation in one call.

A step of a row or a few takes the time of reading the weights once; a norm or a product called from
Python takes as long again as a small one computes. What a description cannot hold (a router, a DoRA,
an adapter with biases, a matrix of another layout) runs layer by layer in `models/decoder/block.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorry.adapters.layers.frozen_linear import DenseLinear, FrozenLinear
from lorry.adapters.layers.stacks import StackedAdapters
from lorry.adapters.product import LinearProducts
from lorry.adapters.quantization.linear import QuantizedLinear
from lorry.families import LayerLinears
from lorry.kernels import decode as kernel
from lorry.kernels.packed import supports_packed
from lorry.models.decoder.block import DecoderBlock, ForwardContext
from lorry.models.decoder.cache import RowKVCache
from lorry.models.decoder.low_rank import double_bits, term_words
from lorry.models.decoder.pointwise import DecoderNorm

# numbers of kernels/layers.cpp
LAYOUTS = {"dense": 0, "flat": 1, "rows": 2, "grid": 3, "halves": 4}
ACTIVATION_KINDS = {
    "silu": 0,
    "swish": 0,
    "gelu": 1,
    "gelu_new": 2,
    "gelu_pytorch_tanh": 2,
    "gelu_fast": 2,
    "relu": 3,
}


class _UndescribedError(Exception):
    """Something that a description cannot hold."""


class StepDescription:
    """All layers under one mix, in words of 64 bits."""

    def __init__(
        self, blocks: Sequence[DecoderBlock], products: Sequence[LayerLinears[LinearProducts]]
    ) -> None:
        self.words: list[int] = []
        # what the addresses are of, which has to stay in memory
        self.kept: list[Tensor] = []
        self.packed = False
        self.dtype = blocks[0].norms.attn.weight.dtype
        geometry = blocks[0].geometry
        activation, fused = ACTIVATION_KINDS.get(geometry.activation), blocks[0].fused_dim
        # q, k and v of one product lie head by head, or not at all
        if activation is None or fused not in (None, 2):
            raise _UndescribedError
        self.words += [
            len(blocks),
            geometry.width,
            geometry.heads,
            geometry.kv_heads,
            geometry.head_dim,
            0 if geometry.rotary is None else len(range(0, geometry.rotary.dim, 2)),
            int(fused is not None),
            activation,
            int(geometry.parallel_residual),
        ]
        for block, work in zip(blocks, products, strict=True):
            for norm in (block.norms.attn, block.norms.mlp, block.norms.q, block.norms.k):
                self._add_norm(norm)
            for product in work:
                self._add_product(product)
        self.description = torch.tensor(self.words, dtype=torch.int64)

    @staticmethod
    def of(
        blocks: Sequence[DecoderBlock], products: Sequence[LayerLinears[LinearProducts]]
    ) -> StepDescription | None:
        """The description, or None where there can be none."""
        try:
            return StepDescription(blocks, products)
        except _UndescribedError:
            return None

    def takes(self, rows: int) -> bool:
        """Whether so many rows are worth it."""
        return rows <= kernel.most_few_rows(self.dtype, packed=self.packed)

    def run(self, x: Tensor, state: ForwardContext) -> Tensor:
        """x [T,D] of the newest tokens -> what the last layer makes of them, over x; their keys and
        values are stored."""
        cache = state.cache
        assert isinstance(cache, RowKVCache)
        assert state.rows is not None
        x = x.contiguous()
        kernel.decode_layers(
            self.description,
            x,
            state.cos,
            state.sin,
            cache.table,
            state.rows,
            state.positions,
            cache.lengths,
        )
        return x

    def _add_norm(self, norm: DecoderNorm | None) -> None:
        if norm is None:
            self.words += [0, 0, 0]
            return
        self.words += [
            self._address(norm.weight, self.dtype),
            self._address(norm.bias, self.dtype),
            double_bits(norm.eps),
        ]

    def _add_product(self, product: LinearProducts) -> None:
        if product.slices is not None:
            raise _UndescribedError
        self.words.append(len(product.layers))
        for layer in product.layers:
            self._add_linear(layer)
        self.words.append(len(product.stacks))
        for stack, gate in zip(product.stacks, product.gates, strict=True):
            self._add_term(stack, gate)

    def _add_linear(self, layer: FrozenLinear) -> None:
        if isinstance(layer, DenseLinear) and not layer.transposed:
            bias, layout = layer.bias, "dense"
            arguments: tuple[Tensor | int | None, ...] = (layer.weight,)
        elif isinstance(layer, QuantizedLinear) and layer.dtype == self.dtype:
            packed = layer.packed
            if not supports_packed(packed.codes, self.dtype):
                raise _UndescribedError
            source = packed.source()
            bias, layout, arguments = layer.layer.bias, source.layout, source.arguments
            self.packed = True
        else:
            raise _UndescribedError
        self.words += [LAYOUTS[layout], *layer.shape, self._address(bias, self.dtype)]
        for argument in arguments:
            if isinstance(argument, int):
                self.words.append(argument)
            else:
                self.words.append(
                    self._address(argument, self.dtype if layout == "dense" else None)
                )

    def _add_term(self, stack: StackedAdapters, gate: Tensor | None) -> None:
        if (
            gate is not None
            or stack.routed
            or stack.scaled
            or stack.vectors
            or stack.dropout is not None
        ):
            raise _UndescribedError
        matrices = (stack.lora_A, stack.rank_scales, *(part.lora_B for part in stack.parts))
        for matrix in matrices:
            self._check(matrix, self.dtype)
        self.words += term_words(stack, None, self.kept)

    def _address(self, tensor: Tensor | None, dtype: torch.dtype | None) -> int:
        """Of its memory, 0 for None; ``dtype``: what it has to be of."""
        if tensor is None:
            return 0
        self._check(tensor, dtype)
        # an alias, which keeps the memory whatever becomes of the tensor
        self.kept.append(tensor.detach())
        return tensor.data_ptr()

    def _check(self, tensor: Tensor | None, dtype: torch.dtype | None) -> None:
        """Raise _UndescribedError for one that no kernel reads at its address as ``dtype``."""
        odd = tensor is not None and dtype is not None and tensor.dtype != dtype
        if tensor is not None and (odd or not tensor.is_contiguous()):
            raise _UndescribedError
