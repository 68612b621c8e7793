"""Where the packed matrices of a decoder come from: packed while a whole checkpoint is read, or stored
packed; and how they get into its layers, one at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lorry.adapters.layers import BankLinear
from lorry.adapters.quantization.linear import OpenBuffers, hold_packed
from lorry.adapters.quantization.packed import PackedMatrix, Quantization, pack
from lorry.errors import ModelError
from lorry.models.decoder.model import Decoder
from lorry.models.loading.tensor_files import (
    FLOAT_DTYPES,
    TensorEntry,
    read_stored,
    read_tensors,
)
from lorry.models.packed.parts import PackedFormat


class MatrixSource(Protocol):
    """Where the packed matrices of a decoder come from."""

    @property
    def quantization(self) -> Quantization:
        """As adapters record it."""

    def join(self, entries: Mapping[str, TensorEntry]) -> Mapping[str, TensorEntry]:
        """A checkpoint's tensors, those of each packed matrix as one."""

    def check(self, entry: TensorEntry, shape: tuple[int, int]) -> None:
        """Raise ModelError unless an entry with parts can be a matrix (O, I); no weight is read."""

    def read(
        self, name: str, entry: TensorEntry, shape: tuple[int, int], device: torch.device
    ) -> PackedMatrix | None:
        """The matrix (O, I) of a weight; None where it stays whole. Raises ModelError."""

    def notes(self) -> list[str]:
        """What to tell of what was read."""


@dataclass(frozen=True)
class PackedWhileRead:
    """Matrices of a whole checkpoint, packed one at a time. ``transposed``: whether they lie [I,O]."""

    quantization: Quantization
    transposed: bool

    def join(self, entries: Mapping[str, TensorEntry]) -> Mapping[str, TensorEntry]:
        """As they are."""
        return entries

    def check(self, entry: TensorEntry, shape: tuple[int, int]) -> None:
        """Nothing has parts."""

    def read(
        self, name: str, entry: TensorEntry, shape: tuple[int, int], device: torch.device
    ) -> PackedMatrix:
        """Read whole, and packed."""
        # as the file has it: in whatever dtype it computes, it is the same base
        stored = FLOAT_DTYPES[entry.dtype]
        (weight,) = read_tensors({name: entry}, stored, device).values()
        return pack(weight.t() if self.transposed else weight, self.quantization)

    def notes(self) -> list[str]:
        """None."""
        return []


@dataclass(frozen=True)
class PackedCheckpoint:
    """Matrices that a directory stores packed, as they are."""

    packed_as: PackedFormat

    @property
    def quantization(self) -> Quantization:
        """The format's."""
        return self.packed_as.quantization

    def join(self, entries: Mapping[str, TensorEntry]) -> Mapping[str, TensorEntry]:
        """One entry, `P.weight`, for each packed matrix, with its parts in it."""
        found: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
        endings = self.packed_as.endings
        for name, entry in entries.items():
            ending = max((e for e in endings if name.endswith(e)), key=len, default=None)
            if ending is not None:
                found[name.removesuffix(ending)][endings[ending]] = entry
        joined = dict(entries)
        for path, parts in found.items():
            if self.packed_as.marker not in parts:
                continue  # a whole weight, whose name ends alike
            for entry in parts.values():
                del joined[entry.name]
            name = f"{path}.weight"
            marker = parts[self.packed_as.marker]
            joined[name] = replace(marker, name=name, dtype="packed", parts=parts)
        return joined

    def check(self, entry: TensorEntry, shape: tuple[int, int]) -> None:
        """By the headers of its parts."""
        shapes = {part: tensor.shape for part, tensor in entry.parts.items()}
        self.packed_as.check(f"{entry.file}: {entry.name}", shapes, shape)

    def read(
        self, name: str, entry: TensorEntry, shape: tuple[int, int], device: torch.device
    ) -> PackedMatrix | None:
        """None for a weight that is stored whole."""
        if not entry.parts:
            return None
        # copies: views would keep all of the file's memory that was read
        parts = {part: read_stored(t).clone().to(device) for part, t in entry.parts.items()}
        return self.packed_as.read(f"{entry.file}: {entry.name}", parts, shape)

    def notes(self) -> list[str]:
        """That they stay packed."""
        return [f"its files hold matrices packed ({self.quantization.name}), which stay so"]


def read_matrices(
    model: Decoder,
    wanted: Mapping[str, TensorEntry],
    matrices: MatrixSource,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[set[str], dict[str, Tensor]]:
    """(weights whose layers hold them packed now, {weight: its values} of those that are stored packed
    where nothing packed can be held: head and embeddings), read one at a time. Raises ModelError."""
    packed, opened, buffers = set[str](), dict[str, Tensor](), OpenBuffers()
    layers = {
        path: m
        for path, m in model.named_modules()
        if isinstance(m, BankLinear) and path != model.family.head
    }
    shapes = dict[str, tuple[int, int]]()
    for name, entry in wanted.items():
        layer = layers.get(name.removesuffix(".weight"))
        weight = model.get_parameter(name)
        if layer is not None and name.endswith(".weight"):
            shapes[name] = (layer.out_features, layer.in_features)
        elif entry.parts and weight.dim() == 2:
            shapes[name] = (weight.shape[0], weight.shape[1])
        elif entry.parts:
            raise ModelError(f"{entry.file}: {entry.name} is stored packed, and is no matrix")
        # all before the first is read
        if entry.parts:
            matrices.check(entry, shapes[name])
    for name, shape in shapes.items():
        layer = layers.get(name.removesuffix(".weight"))
        matrix = matrices.read(name, wanted[name], shape, device)
        if matrix is not None and layer is not None:
            hold_packed(layer, matrix, dtype, buffers)
            packed.add(name)
        elif matrix is not None:
            opened[name] = matrix.open(dtype)
    return packed, opened
