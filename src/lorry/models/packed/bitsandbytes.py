"""bitsandbytes' checkpoints, the `*-bnb-4bit` kind of the hubs and its 8-bit ones, in the formats that
Lorry packs itself: what is read is held byte for byte.

Layouts: `bitsandbytes.functional.QuantState.as_dict(packed=True)`, `Linear8bitLt`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorry.adapters.quantization.codes import LEVELS, dynamic_levels
from lorry.adapters.quantization.packed import (
    BLOCK,
    SCALE_BLOCK,
    Packed4Bit,
    PackedInt8,
    Quantization,
)
from lorry.errors import ModelError
from lorry.models.packed.parts import (
    Shapes,
    finite_scales,
    fp32_scales,
    need_parts,
    need_shape,
)

# a table of a file may be off by the rounding of another device
TABLE_TOLERANCE = 1e-6
MAX_STATE_BYTES = 10_000


@dataclass(frozen=True)
class BitsAndBytes4Bit:
    """`P.weight` uint8 [n/2, 1] (or the same bytes as another type), `P.weight.absmax` uint8 or fp32
    [n/64], with `nested_absmax` where that is uint8, tables of values, and a JSON of settings."""

    quantization: Quantization
    marker: ClassVar[str] = "state"
    endings: ClassVar[Mapping[str, str]] = {
        ".weight": "codes",
        ".weight.absmax": "absmax",
        ".weight.quant_map": "quant_map",
        ".weight.nested_absmax": "nested_absmax",
        ".weight.nested_quant_map": "nested_quant_map",
        **{f".weight.quant_state.bitsandbytes__{name}": "state" for name in LEVELS},
    }

    def check(self, where: str, shapes: Shapes, shape: tuple[int, int]) -> None:
        need_parts(where, shapes, ["codes", "absmax", "quant_map", "state"])
        blocks = -(-shape[0] * shape[1] // BLOCK)
        need_shape(where, "absmax", shapes["absmax"], (blocks,), shape)
        if (nested := shapes.get("nested_absmax")) is not None:
            need_parts(where, shapes, ["nested_quant_map"])
            need_shape(where, "nested_absmax", nested, (-(-blocks // SCALE_BLOCK),), shape)

    def read(self, where: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Packed4Bit:
        state = _read_state(where, parts["state"])
        kind, double = state.get("quant_type"), "nested_absmax" in parts
        expected = {
            "quant_type": self.quantization.name,
            "blocksize": BLOCK,
            "shape": list(shape),
            **({"nested_blocksize": SCALE_BLOCK} if double else {}),
        }
        for key, value in expected.items():
            if state.get(key) != value:
                raise ModelError(
                    f"{where}: {key}={state.get(key)!r} in its quant_state, and {value!r} is what can be read"
                )
        _check_table(where, "quant_map", parts["quant_map"], LEVELS[str(kind)])
        # bytes, whatever type they were stored as (bnb_4bit_quant_storage)
        codes = parts["codes"].contiguous().reshape(-1).view(torch.uint8)
        need_shape(where, "codes", tuple(codes.shape), (-(-shape[0] * shape[1] // 2),), shape)
        scales = parts["absmax"]
        if not double:
            return Packed4Bit(
                Quantization(self.quantization.name, double=False),
                shape,
                codes,
                fp32_scales(where, "absmax", scales),
            )
        if scales.dtype != torch.uint8:
            raise ModelError(f"{where}: its absmax are {scales.dtype}, with scales of their own")
        _check_table(where, "nested_quant_map", parts["nested_quant_map"], dynamic_levels())
        stored = state.get("nested_offset")
        # an int may be larger than any float
        if isinstance(stored, bool) or not isinstance(stored, (int, float)) or abs(stored) > 1e30:
            raise ModelError(
                f"{where}: nested_offset={str(stored)[:80]} in its quant_state; a number is expected"
            )
        offset = torch.tensor([stored], dtype=torch.float32)
        return Packed4Bit(
            Quantization(self.quantization.name),
            shape,
            codes,
            scales,
            fp32_scales(where, "nested_absmax", parts["nested_absmax"]),
            finite_scales(where, "nested_offset", offset).to(codes.device),
        )


@dataclass(frozen=True)
class BitsAndBytes8Bit:
    """`P.weight` int8 [O,I] and `P.SCB` fp32 [O], the largest absolute value of each output. Inputs are
    not rounded here, as its own products round them: these are nearer to the weights."""

    quantization: ClassVar[Quantization] = Quantization("int8")
    marker: ClassVar[str] = "SCB"
    endings: ClassVar[Mapping[str, str]] = {
        ".weight": "codes",
        ".SCB": "SCB",
        ".weight_format": "weight_format",
    }

    def check(self, where: str, shapes: Shapes, shape: tuple[int, int]) -> None:
        need_parts(where, shapes, ["codes", "SCB"])
        need_shape(where, "codes", shapes["codes"], shape, shape)
        need_shape(where, "SCB", shapes["SCB"], (shape[0],), shape)

    def read(self, where: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedInt8:
        layout = parts.get("weight_format")
        if layout is not None and bool(layout.float().any()):
            raise ModelError(
                f"{where}: its weight_format is {str(layout.tolist())[:80]}, a layout of old GPU kernels; 0, rows, "
                "can be read"
            )
        if parts["codes"].dtype != torch.int8:
            raise ModelError(f"{where}: its codes are {parts['codes'].dtype}, not int8")
        scales = fp32_scales(where, "SCB", parts["SCB"])
        return PackedInt8(self.quantization, shape, parts["codes"], scales)


def _read_state(where: str, stored: Tensor) -> dict[str, Any]:
    """The JSON that bitsandbytes keeps in a tensor of bytes."""
    try:
        if stored.dtype != torch.uint8 or stored.numel() > MAX_STATE_BYTES:
            raise ValueError(f"{stored.numel()} values of {stored.dtype}")
        state = json.loads(bytes(stored.flatten().tolist()).decode())
        if not isinstance(state, dict):
            raise ValueError("no object")
    # ValueError: also of JSON and of its encoding; the other of brackets without an end
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: its quant_state is no JSON of settings ({error})") from error
    return state


def _check_table(where: str, part: str, table: Tensor, ours: tuple[float, ...]) -> None:
    """Raise ModelError where the file's values are not those that its codes are opened with here."""
    expected = torch.tensor(ours, device=table.device)
    if table.shape != expected.shape or not torch.allclose(
        table.float(), expected, rtol=0, atol=TABLE_TOLERANCE
    ):
        raise ModelError(
            f"{where}: its {part} is another table than bitsandbytes has for this format"
        )
