"""Where the packed matrices of a decoder come from: packed while a whole checkpoint is read, or stored
packed; and how they get into its layers, one at a time.

Of a model that is cut over processes each rank reads every matrix whole, packs it, and keeps its part:
values that share a scale would otherwise be packed by another one than on one device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.peft.base_digest import sample_matrix
from lorry.adapters.quantization.linear import OpenBuffers, hold_packed, parameter_name
from lorry.adapters.quantization.packed import PackedDigest, PackedMatrix, Quantization, pack
from lorry.errors import ConfigError, ModelError
from lorry.models.decoder.head import PackedHead
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

    def empty(self, shape: tuple[int, int]) -> PackedMatrix:
        """What `read` will give, without memory. Raises ConfigError where nothing but the values tells."""

    def read(
        self, name: str, entry: TensorEntry, shape: tuple[int, int], device: torch.device
    ) -> PackedMatrix | None:
        """The matrix (O, I) of a weight; None where it stays whole. Raises ModelError."""

    @property
    def keeps_head(self) -> bool:
        """Whether `read` has the head's matrix of the very values that the model holds of it."""

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

    def empty(self, shape: tuple[int, int]) -> PackedMatrix:
        """Packed like any other."""
        return pack(torch.empty(shape, device="meta"), self.quantization)

    def read(
        self, name: str, entry: TensorEntry, shape: tuple[int, int], device: torch.device
    ) -> PackedMatrix:
        """Read whole, and packed."""
        # as the file has it: in whatever dtype it computes, it is the same base
        stored = FLOAT_DTYPES[entry.dtype]
        (weight,) = read_tensors({name: entry}, stored, device).values()
        return pack(weight.t() if self.transposed else weight, self.quantization)

    @property
    def keeps_head(self) -> bool:
        """Where nothing is rounded."""
        return self.quantization.keeps_values

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

    def empty(self, shape: tuple[int, int]) -> PackedMatrix:
        """Not known before it is read."""
        raise ConfigError(
            f"matrices that are stored packed ({self.quantization.name}) are not cut over processes"
        )

    def read(
        self, name: str, entry: TensorEntry, shape: tuple[int, int], device: torch.device
    ) -> PackedMatrix | None:
        """None for a weight that is stored whole."""
        if not entry.parts:
            return None
        # copies: views would keep all of the file's memory that was read
        parts = {part: read_stored(t).clone().to(device) for part, t in entry.parts.items()}
        return self.packed_as.read(f"{entry.file}: {entry.name}", parts, shape)

    @property
    def keeps_head(self) -> bool:
        """As the files have it."""
        return True

    def notes(self) -> list[str]:
        """That they stay packed."""
        return [f"its files hold matrices packed ({self.quantization.name}), which stay so"]


class MatrixReader:
    """Reads the packed matrices of ``model`` from ``matrices``, one at a time; ``wanted``: {weight: where it
    lies}; the model computes in ``dtype``. Raises ModelError where an entry cannot be a matrix of its layer.

    What was taken of every matrix while it was whole: ``samples``, for `base_digest`, and ``digest``.
    """

    def __init__(
        self,
        model: Decoder,
        wanted: Mapping[str, TensorEntry],
        matrices: MatrixSource,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.wanted, self.matrices, self.dtype = model, wanted, matrices, dtype
        self.samples, self.digest = dict[str, tuple[tuple[int, ...], Tensor]](), PackedDigest()
        self.layers = {
            f"{path}.weight": m
            for path, m in model.named_modules()
            if isinstance(m, BankLinear) and path != model.family.head
        }
        self.shapes = dict[str, tuple[int, int]]()
        for name, entry in sorted(wanted.items(), key=lambda item: item[0].removesuffix(".weight")):
            weight = model.get_parameter(name)
            if name in self.layers:
                self.shapes[name] = _whole_shape(self.layers[name])
            elif entry.parts and weight.dim() == 2:
                self.shapes[name] = (weight.shape[0], weight.shape[1])
            elif entry.parts:
                raise ModelError(f"{entry.file}: {entry.name} is stored packed, and is no matrix")
            # all before the first is read
            if entry.parts:
                matrices.check(entry, self.shapes[name])
        self._buffers = OpenBuffers()

    def head(self) -> PackedHead | None:
        """The head's matrix, which the model holds whole, for generation; None where packing rounds it."""
        family, matrices = self.model.family, self.matrices
        name = f"{family.head}.weight"
        name = name if name in self.wanted else f"{family.embed}.weight"
        entry = self.wanted.get(name)
        if entry is None or not matrices.keeps_head:
            return None
        weight = self.model.get_parameter(name)
        shape = (weight.shape[0], weight.shape[1])
        return PackedHead(lambda: matrices.read(name, entry, shape, torch.device("cpu")))

    def hold_empty(self) -> None:
        """Give each layer its part without memory, to be cut further before anything is read. Raises
        ConfigError where that cannot be."""
        for name, layer in self.layers.items():
            part = _local_part(layer, self.matrices.empty(self.shapes[name]))
            hold_packed(layer, part, self.dtype, self._buffers)

    def read(
        self, device: torch.device, keep: Callable[[str, Tensor], Tensor] | None = None
    ) -> tuple[set[str], dict[str, Tensor]]:
        """(weights that were read here, {parameter: tensor}): what layers hold packed, and the values of head
        and embeddings that are stored packed, where nothing packed can be held. ``keep(parameter, tensor)``:
        what this rank keeps of a parameter whose layer holds an empty one (`hold_empty`). Raises ModelError,
        and ConfigError for a matrix that cannot be cut."""
        names, state = set[str](), dict[str, Tensor]()
        for name, shape in self.shapes.items():
            layer = self.layers.get(name)
            matrix = self.matrices.read(name, self.wanted[name], shape, device)
            if matrix is None:
                continue
            names.add(name)
            if layer is None:
                state[name] = matrix.open(self.dtype)
                continue
            path = name.removesuffix(".weight")
            self.samples[path] = sample_matrix(matrix, transposed=layer.transposed)
            self.digest.add(path, matrix)
            part = _local_part(layer, matrix)
            if keep is None:
                hold_packed(layer, part, self.dtype, self._buffers)
            for field, tensor in part.tensors().items():
                parameter = f"{path}.{parameter_name(field)}"
                state[parameter] = tensor if keep is None else keep(parameter, tensor)
        return names, state


def _whole_shape(layer: BankLinear) -> tuple[int, int]:
    """(O, I) on one device of a layer that ranks may share."""
    cut = layer.slices
    rows, columns = (None, None) if cut is None else (cut.rows, cut.columns)
    return (
        layer.out_features if rows is None else rows.whole,
        layer.in_features if columns is None else columns.whole,
    )


def _local_part(layer: BankLinear, matrix: PackedMatrix) -> PackedMatrix:
    """What this rank holds of a whole matrix. Raises ConfigError where it cannot be cut there."""
    cut = layer.slices
    if cut is None:
        return matrix
    try:
        for dim, part in enumerate((cut.rows, cut.columns)):
            if part is not None:
                matrix = matrix.part(dim, part.ranges())
    except ConfigError as error:
        raise ConfigError(
            f"backend.tensor_parallel={cut.ranks.size}: {layer.path}: {error}"
        ) from error
    return matrix
