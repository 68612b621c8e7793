"""A GGUF file's matrices as it has packed them (`model.quantize=keep`), in place of the converted ones.

The converted directory (`models/gguf/embedded.py`) is the base: config, tokenizer, head, embedding and
norms come from there, and each packed matrix is compared with the converted one, which is bfloat16, before
it takes its place. Opened it is rounded to bfloat16 first, whatever is computed in: the same base, bit for
bit, in a third of the bytes or less.

Block layouts: ggml's `block_q4_0`, `block_q4_1`, `block_q8_0`; 32 values along the inputs, scales of 16 bits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy
import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from lorry.adapters.quantization.grid import PackedGrid, pack_nibbles
from lorry.adapters.quantization.packed import KEPT_GGUF, PackedMatrix
from lorry.errors import ConfigError, ModelError
from lorry.models.gguf.architecture import (
    ARCHITECTURES,
    GgufArchitecture,
    describe_architecture,
)
from lorry.models.gguf.header import check_gguf
from lorry.models.loading.tensor_files import TensorEntry, read_tensors
from lorry.models.packed.parts import finite_scales

Q4_0, Q4_1 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1
Q8_0 = GGMLQuantizationType.Q8_0
KEPT = frozenset({Q4_0, Q4_1, Q8_0})
GROUP = 32  # inputs that share a scale
Q4_0_ZERO = 8  # the code that stands for 0
SCALE_BYTES = 2


class PackedGguf:
    """The matrices of a GGUF file that are Q4_0, Q4_1 or Q8_0, for the model converted from it. Raises
    ConfigError for an architecture whose tensors are not known by name."""

    quantization = KEPT_GGUF
    keeps_head = True

    def __init__(self, file: Path, config: Mapping[str, object]) -> None:
        kind = config.get("model_type")
        if kind not in ARCHITECTURES:
            raise ConfigError(
                f"model.quantize=keep: {file} is of model_type {kind!r}, and the matrices of "
                f"{', '.join(ARCHITECTURES)} can be kept packed; leave quantize out, or choose nf4, fp4 or int8"
            )
        self.file, self.header = file, check_gguf(file)
        if not {stored.kind for stored in self.header.tensors.values()} & KEPT:
            raise ConfigError(
                f"model.quantize=keep: none of the matrices of {file} is {', '.join(sorted(kind.name for kind in KEPT))}; leave "
                "quantize out, or choose nf4, fp4 or int8"
            )
        self.architecture: GgufArchitecture = describe_architecture(config)
        # matrices that stay whole, by their format
        self.whole = Counter[str]()

    def notes(self) -> list[str]:
        """What stayed whole."""
        counts = ", ".join(f"{count} of {kind}" for kind, count in self.whole.items())
        kept = ", ".join(sorted(kind.name for kind in KEPT))
        return (
            [f"matrices that stay whole, since {kept} alone are kept: {counts}"] if counts else []
        )

    def join(self, entries: Mapping[str, TensorEntry]) -> Mapping[str, TensorEntry]:
        """The converted ones, as they are."""
        return entries

    def check(self, entry: TensorEntry, shape: tuple[int, int]) -> None:
        """Nothing has parts."""

    def empty(self, shape: tuple[int, int]) -> PackedMatrix:
        """Not known before it is read: matrices of one file have several formats."""
        raise ConfigError("the matrices of a GGUF file are not cut over processes")

    def read(
        self, name: str, entry: TensorEntry, shape: tuple[int, int], device: torch.device
    ) -> PackedMatrix | None:
        """None for another format, or where the file does not say what the converted matrix does."""
        place = self.architecture.place(name)
        stored = self.header.tensors.get(place)
        if stored is None or stored.kind not in KEPT or stored.shape != shape:
            self.whole[stored.kind.name if stored is not None else "no name in the file"] += 1
            return None
        packed_shape = gguf.quant_shape_to_byte_shape(stored.shape, stored.kind)
        bytes_ = numpy.fromfile(
            self.file, dtype=numpy.uint8, count=math.prod(packed_shape), offset=stored.begin
        )
        blocks = torch.from_numpy(bytes_).view(shape[0], shape[1] // GROUP, -1)
        # rows as Hugging Face has them, before anything is taken apart
        blocks = self.architecture.from_gguf(name, blocks)
        packed = _grid(f"{self.file}: {place}", blocks, stored.kind, shape)
        (converted,) = read_tensors({name: entry}, torch.bfloat16, torch.device("cpu")).values()
        if not torch.equal(packed.open(torch.bfloat16), converted):
            raise ModelError(
                f"{self.file}: {place}, opened, is not {name} of the model converted from it; leave quantize out"
            )
        return packed.to(device)


def _grid(
    where: str, blocks: Tensor, kind: GGMLQuantizationType, shape: tuple[int, int]
) -> PackedGrid:
    """From blocks uint8 [O, I/32, bytes of a block]."""
    scales = finite_scales(where, "scales", _halves(blocks, 0))
    zeros = minimums = None
    if kind == Q8_0:
        codes = blocks[:, :, SCALE_BYTES:].reshape(shape)
        code_kind = "signed"
    else:
        first = SCALE_BYTES * (2 if kind == Q4_1 else 1)
        # a block's first 16 values lie in low halves, the others in high ones
        low, high = blocks[:, :, first:] & 15, blocks[:, :, first:] >> 4
        codes = pack_nibbles(torch.cat((low, high), 2).view(shape))
        code_kind = "nibbles"
        if kind == Q4_1:
            minimums = finite_scales(where, "minimums", _halves(blocks, 1))
        else:
            zeros = torch.full_like(scales, Q4_0_ZERO, dtype=torch.uint8)
    return PackedGrid(
        KEPT_GGUF,
        shape,
        codes.contiguous(),
        scales,
        code_kind,  # type: ignore[arg-type]
        (1, GROUP),
        zeros=zeros,
        minimums=minimums,
        rounded=True,
    )


def _halves(blocks: Tensor, place: int) -> Tensor:
    """The fp16 number at a place of each block, [O, I/32]."""
    begin = SCALE_BYTES * place
    return blocks[:, :, begin : begin + SCALE_BYTES].contiguous().view(torch.float16)[:, :, 0]
