"""A GGUF file, streamed: one tensor in memory at a time, read again before it gets its name.

    plan = plan_tensors(architecture, shapes, "q8_0", add_note)  # shapes: {Hugging Face name: shape}
    write_gguf(file, architecture, plan, tensors, add_keys)      # tensors: (name, tensor) one by one
    check_rounding(file, architecture, plan, tensors)            # ContractError if it reads otherwise

Norms, biases and routers stay F32, as llama.cpp's own tools keep them. Where rows do not divide into
the blocks of 32 of Q8_0 and Q4_0 a tensor is stored in F16 and named in a note. In q4_0 the matrix
that makes the logits is Q8_0: its errors reach every token's probability directly (llama.cpp keeps
it at more bits, too). Rounding is checked against the bound of the format, block by block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray
from torch import Tensor

from lorry.errors import ContractError, ModelError
from lorry.models.gguf.architecture import GgufArchitecture
from lorry.models.gguf.header import GgufHeader, check_gguf
from lorry.notes import NoteCallback

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
BF16, Q8_0 = GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0
Q4_0 = GGMLQuantizationType.Q4_0
# llama.cpp's `--outtype` -> (element type of the matrices, `general.file_type`)
OUTTYPES = {
    "f32": (F32, LlamaFileType.ALL_F32),
    "f16": (F16, LlamaFileType.MOSTLY_F16),
    "bf16": (BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
# Largest value of a type that is stored by way of an F16: itself, or the scale of its block, which is
# the largest of the block over 127 in Q8_0 and over 8 in Q4_0.
LARGEST_F16 = 65504.0
LARGEST = {F16: LARGEST_F16, Q8_0: 127 * LARGEST_F16, Q4_0: 8 * LARGEST_F16}
# Largest rounding error: (share of the largest value in the block that a scale serves, plus so much
# where the scale itself, an F16, is below the normal numbers). Q8_0: half a step of 127 a side.
# Q4_0: a whole step of 8, at the end that the four bits have not. Both: the scale's own 11 bits.
# BF16 has fp32's exponents, and below the normal numbers steps of 2^-133.
ROUNDING = {
    F32: (0.0, 0.0),
    F16: (2**-11, 2**-25),
    BF16: (2**-8, 2**-134),
    Q8_0: (1 / 254 + 2**-11, 127 * 2**-25),
    Q4_0: (1 / 8 + 2**-11, 8 * 2**-25),
}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file: its name there, its shape as torch has it, its element type, and the
    model's tensors that it is made of (several: experts, stacked in their order).
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    sources: tuple[str, ...]


def plan_tensors(
    architecture: GgufArchitecture,
    shapes: Mapping[str, tuple[int, ...]],
    outtype: str,
    add_note: NoteCallback,
) -> list[PlannedTensor]:
    """What the file will hold, in the order in which it is whole when the model's tensors come in
    the order of ``shapes``. Raises ModelError for a tensor that the architecture has not.
    """
    sources: dict[str, list[str]] = {}
    for name in shapes:
        place = architecture.place(name)
        # moved behind the others: a stack is whole with its last expert
        sources[place] = [*sources.pop(place, []), name]
    wanted = OUTTYPES[outtype][0]
    head = "output.weight" if "output.weight" in sources else "token_embd.weight"
    planned, narrow = [], list[str]()
    for place, names in sources.items():
        shape = shapes[names[0]]
        kind = Q8_0 if wanted == Q4_0 and place == head else wanted
        if len(shape) == 1 or place.endswith(
            ("_norm.weight", "_gate_inp.weight", "_gate_inp_shexp.weight")
        ):
            kind = F32
        if shape[-1] % GGML_QUANT_SIZES[kind][0]:
            narrow.append(place)
            kind = F16
        whole = (len(names), *shape) if architecture.is_stack(place) else shape
        # ten comes before two in the order of names
        ordered = sorted(names, key=architecture.expert_of)
        planned.append(PlannedTensor(place, whole, kind, tuple(ordered)))
    if narrow:
        add_note(
            f"{len(narrow)} tensors are stored in f16, since their rows are not a "
            f"multiple of 32 ({', '.join(narrow[:3])})"
        )
    return planned


def encode_tensor(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> NDArray[numpy.generic]:
    """The bytes of ``tensor`` in the file. Raises ModelError for a value that the type cannot hold."""
    values = tensor.float().contiguous().numpy()
    if not numpy.isfinite(values).all():
        raise ModelError(f"{name} holds NaN or infinity; nothing was written")
    if float(numpy.abs(values).max(initial=0.0)) > (largest := LARGEST.get(kind, math.inf)):
        raise ModelError(
            f"{name} holds a value above {largest:.8g}, the largest that {kind.name} stores; "
            "use outtype=bf16 or f32"
        )
    encoded: NDArray[numpy.generic] = gguf.quantize(values, kind)
    return encoded


def write_gguf(
    file: Path,
    architecture: GgufArchitecture,
    plan: Sequence[PlannedTensor],
    tensors: Iterable[tuple[str, Tensor]],
    add_keys: Callable[[GGUFWriter], None],
) -> None:
    """Write ``file``. ``tensors``: the model's, under the names and in the order that ``plan`` was
    made from; ``add_keys``: writes the metadata.
    """
    writer = GGUFWriter(str(file), architecture.name)
    add_keys(writer)
    extra = architecture.extra_tensors()
    for name, values in extra.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes, F32)
    for tensor in plan:
        bytes_in_row = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind)
        # the writer takes a quantised tensor's shape in bytes, any other's in elements
        packed = tensor.kind not in (F32, F16)
        dtype = numpy.dtype(numpy.uint8 if packed else {F32: "<f4", F16: "<f2"}[tensor.kind])
        shape = bytes_in_row if packed else tensor.shape
        size = math.prod(bytes_in_row)
        writer.add_tensor_info(tensor.name, shape, dtype, size, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in extra.values():
        writer.write_tensor_data(values)
    for tensor, value in _assemble(architecture, plan, tensors):
        writer.write_tensor_data(encode_tensor(tensor.name, value, tensor.kind))
    writer.close()


def _assemble(
    architecture: GgufArchitecture,
    plan: Sequence[PlannedTensor],
    tensors: Iterable[tuple[str, Tensor]],
) -> Iterator[tuple[PlannedTensor, Tensor]]:
    """(each tensor of the plan, its value as llama.cpp has it), as soon as all of it came."""
    waiting: dict[str, Tensor] = {}
    left = list(reversed(plan))
    for name, tensor in tensors:
        waiting[name] = architecture.to_gguf(name, tensor.detach().cpu())
        # the writer must get them in the order of the plan, whatever came
        while left and all(source in waiting for source in left[-1].sources):
            planned = left.pop()
            parts = [waiting.pop(source) for source in planned.sources]
            value = torch.stack(parts) if len(planned.shape) > parts[0].dim() else parts[0]
            assert tuple(value.shape) == planned.shape, (planned.name, value.shape)
            yield planned, value
    assert not left, left[-1]
    assert not waiting, list(waiting)[:3]


def read_gguf_tensor(file: Path, header: GgufHeader, name: str) -> Tensor:
    """A tensor of the file in fp32, dequantised by the gguf package, its rows as llama.cpp has
    them.
    """
    stored = header.tensors[name]
    shape = gguf.quant_shape_to_byte_shape(stored.shape, stored.kind)
    packed = numpy.fromfile(file, dtype=numpy.uint8, count=math.prod(shape), offset=stored.begin)
    return torch.from_numpy(gguf.dequantize(packed.reshape(shape), stored.kind)).reshape(
        stored.shape
    )


def read_model_tensors(
    file: Path, architecture: GgufArchitecture, plan: Sequence[PlannedTensor]
) -> Iterator[tuple[str, Tensor]]:
    """(name in the model, fp32 values as the model has them) of all that the file holds."""
    header = check_gguf(file)
    for planned in plan:
        value = read_gguf_tensor(file, header, planned.name)
        parts = value.unbind() if architecture.is_stack(planned.name) else [value]
        for name, part in zip(planned.sources, parts, strict=True):
            yield name, architecture.from_gguf(name, part)


def check_rounding(
    file: Path,
    architecture: GgufArchitecture,
    plan: Sequence[PlannedTensor],
    tensors: Iterable[tuple[str, Tensor]],
) -> tuple[float, float]:
    """(largest error of a value as a share of the largest in its block, the bound on it for that
    tensor) of what a reader finds in ``file``, against the model's ``tensors``.

    Raises ContractError where it is more than rounding to the tensor's type can be.
    """
    header = check_gguf(file)
    worst, its_bound = 0.0, 0.0
    for planned, exact in _assemble(architecture, plan, tensors):
        stored = header.tensors.get(planned.name)
        if stored is None or stored.shape != planned.shape or stored.kind != planned.kind:
            raise ContractError(f"{planned.name} is missing in the file written; it was removed")
        share, below_normal = ROUNDING[planned.kind]
        stored_values = read_gguf_tensor(file, header, planned.name)
        block = GGML_QUANT_SIZES[planned.kind][0]
        errors = (stored_values - exact.float()).abs().reshape(-1, block).amax(dim=1)
        largest = exact.float().abs().reshape(-1, block).amax(dim=1)
        # one part in 10^5: the scale is rounded in fp32 on the way
        bound = largest * (share * (1 + 1e-5)) + below_normal
        # this way round: NaN fails
        if not bool((errors <= bound).all()):
            raise ContractError(
                f"{planned.name}: the values read back differ by "
                f"{float((errors - bound).max()):.2e} more than rounding to "
                f"{planned.kind.name} can explain; the file was removed"
            )
        seen = float(((errors - below_normal) / largest.clamp_min(1e-30)).max())
        if seen > worst:
            worst, its_bound = seen, share
    extra = set(header.tensors) - {p.name for p in plan} - set(architecture.extra_tensors())
    if extra:
        raise ContractError(f"{min(extra)} is an unexpected tensor; the file was removed")
    return worst, its_bound
