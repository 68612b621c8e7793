"""What a format of packed checkpoints tells its readers, and checks that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorry.adapters.quantization.packed import PackedMatrix, Quantization
from lorry.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]


class PackedFormat(Protocol):
    """How a checkpoint stores its matrices. ``endings``: {end of a tensor's name: what part of the packed
    matrix it is}; ``marker``: the part that no whole weight has beside it."""

    @property
    def quantization(self) -> Quantization:
        """As adapters record it."""

    @property
    def endings(self) -> Mapping[str, str]: ...

    @property
    def marker(self) -> str: ...

    def check(self, where: str, shapes: Shapes, shape: tuple[int, int]) -> None:
        """Raise ModelError, opening with ``where``, unless these parts can be a matrix of ``shape`` (O, I)."""

    def read(self, where: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedMatrix:
        """The matrix (O, I) of parts that passed `check`. Raises ModelError."""


def need_parts(where: str, shapes: Shapes, needed: Sequence[str]) -> None:
    """Raise ModelError naming a part that is not there."""
    if missing := next((part for part in needed if part not in shapes), None):
        raise ModelError(f"{where}: its {missing} are missing; the checkpoint is incomplete")


def need_shape(
    where: str, part: str, got: tuple[int, ...], expected: tuple[int, ...], shape: tuple[int, int]
) -> None:
    """Raise ModelError unless a part has the shape it must have in a matrix (O, I)."""
    if got != expected:
        raise ModelError(
            f"{where}: its {part} have shape {list(got)}, and a matrix of {list(shape)} (out, in), which "
            f"config.json needs, has {list(expected)}; they belong to different models"
        )


def fp32_scales(where: str, part: str, scales: Tensor) -> Tensor:
    """`finite_scales` in fp32, whatever floats they are stored as. Raises ModelError."""
    return finite_scales(where, part, scales.float() if scales.is_floating_point() else scales)


def finite_scales(where: str, part: str, scales: Tensor) -> Tensor:
    """Scales as `PackedGrid` holds them: fp16 as int16 bits, any other format as fp32. Raises ModelError
    for NaN or infinity, and for numbers that are no floats."""
    if not scales.is_floating_point():
        raise ModelError(
            f"{where}: its {part} are {scales.dtype}, and floats are expected; get another copy"
        )
    values = scales.float()
    if not bool(values.isfinite().all()):
        raise ModelError(
            f"{where}: its {part} hold NaN or infinity; the checkpoint is damaged: get another copy"
        )
    if scales.dtype == torch.float16:
        return scales.contiguous().view(torch.int16)
    return values.contiguous()
