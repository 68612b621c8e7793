"""Low-rank terms at linears that read the same input as `kernels/low_rank.h` reads them: all of a group's in
one call, whatever rows, ranks and adapters they are of.

What the kernel does not take (a matrix that lies in strides, as views of the masters may) goes through torch.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorry.adapters.layers.stacks import StackedAdapters
from lorry.kernels import decode as kernel


def supports_term(stack: StackedAdapters) -> bool:
    """Whether the kernel multiplies this term's matrices, without a mask of dropout between them."""
    return (
        stack.dropout is None
        and kernel.supports_product(stack.lora_A)
        and all(kernel.supports_product(part.lora_B) for part in stack.parts)
    )


def term_words(stack: StackedAdapters, gates: Tensor | None, kept: list[Tensor]) -> list[int]:
    """A term in words of 64 bits, for `supports_term`; gates [rows of the term, columns] in the dtype of the
    matrices, contiguous. What its addresses are of goes to ``kept``, which has to stay in memory."""

    def address(tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        # an alias, which keeps the memory whatever becomes of the tensor
        kept.append(tensor.detach())
        return tensor.data_ptr()

    tokens = stack.own_tokens
    words = [
        tokens.start or 0,
        -1 if tokens.stop is None else tokens.stop,
        stack.lora_A.shape[0],
        address(stack.lora_A),
        address(stack.rank_scales),
        address(gates),
        0 if gates is None else gates.shape[1],
        address(None if gates is None else stack.columns),
        len(stack.parts),
    ]
    for part in stack.parts:
        first, ranks = part.rows.start, part.rows.stop - part.rows.start
        words += [part.layer, first, ranks, address(part.lora_B), double_bits(part.scale)]
    return words


def double_bits(number: float) -> int:
    """Those of a double, as a whole number."""
    bits: int = struct.unpack("q", struct.pack("d", number))[0]
    return bits


class TermDescription(NamedTuple):
    """Terms for `kernels.decode.add_low_rank_terms`: ``words`` [n] int64, and what their addresses are of."""

    words: Tensor
    kept: list[Tensor]

    @staticmethod
    def of(
        stacks: Sequence[StackedAdapters],
        gates: Sequence[Tensor | None] | None = None,
        dtype: torch.dtype | None = None,
    ) -> TermDescription:
        """Of terms that `supports_term`; ``gates``: a tensor [rows of the term, columns] or None for each, taken
        in ``dtype``, that of what is multiplied."""
        words, kept = [len(stacks)], list[Tensor]()
        for stack, gate in zip(stacks, gates or [None] * len(stacks), strict=True):
            narrow = None if gate is None else gate.to(dtype).contiguous()
            words += term_words(stack, narrow, kept)
        return TermDescription(torch.tensor(words, dtype=torch.int64), kept)
