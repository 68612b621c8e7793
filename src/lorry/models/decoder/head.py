"""The output head as generation multiplies a few rows with it where a file has its matrix in fewer bits than the
model holds it in: a token of one row takes the time of reading the weights, and of those of a small model that
is packed the head is the larger part.

The head itself stays as it is, tied or not, for embeddings, scores and training. V vocabulary, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.quantization.packed import PackedMatrix
from lorry.errors import ModelError
from lorry.kernels.packed import reads_faster_packed, supports_packed

log = logging.getLogger(__name__)


class PackedHead:
    """The head's matrix as a file has it. ``read``: reads it, None where the file has it in another format; it is
    asked when a head is first multiplied, since a run that generates nothing needs no second matrix."""

    def __init__(self, read: Callable[[], PackedMatrix | None]) -> None:
        self._read = read
        self._matrix: PackedMatrix | None = None
        self._known: tuple[object, ...] | None = None
        self._same = False

    def of(self, head: BankLinear, rows: int) -> PackedMatrix | None:
        """The matrix [V,D] for so many rows, where its values are those of the head as it is now, bit for bit: a
        merged, a resized or a trained head has others. None where they are not, or cannot be read, or where
        reading the head whole takes no longer."""
        weight = head.weight
        if not reads_faster_packed(rows) or head.product is not None or head.bias is not None:
            return None
        # what trains may be written where no version counts it
        if weight.requires_grad or head.transposed:
            return None
        stamp = (id(weight), weight.dtype, *head.base_stamp())
        if stamp != self._known:
            self._known, self._same = stamp, self._holds(weight.detach())
        return self._matrix if self._same else None

    def _holds(self, weight: Tensor) -> bool:
        """Whether what the file has opens to a weight."""
        if self._matrix is None:
            try:
                self._matrix = self._read()
            except (OSError, ModelError) as error:  # gone, or another one since
                log.warning("the output head is read whole in generation: %s", error)
        matrix = self._matrix
        return (
            matrix is not None
            and matrix.shape == tuple(weight.shape)
            and supports_packed(matrix.codes, weight.dtype)
            and torch.equal(matrix.open(weight.dtype), weight)
        )
