"""FP8 checkpoints (DeepSeek's and Qwen's `*-FP8`): eight-bit floats with a scale for each tile of 128 x
128, each output or the whole matrix. Inputs are not rounded here, whatever the file says of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorry.adapters.quantization.grid import PackedGrid
from lorry.adapters.quantization.packed import Quantization
from lorry.errors import ModelError
from lorry.models.packed.parts import Shapes, fp32_scales, need_parts, need_shape

NOT_A_NUMBER = 0x7F  # of e4m3, which has no infinities


@dataclass(frozen=True)
class Float8:
    """`P.weight` e4m3 [O,I]; `P.weight_scale_inv`, with which it is multiplied, fp32 or e8m0 [ceil(O/128),
    ceil(I/128)], [O,1] or one number. ``block``: outputs and inputs of a tile."""

    block: tuple[int, int]
    quantization: ClassVar[Quantization] = Quantization("fp8")
    marker: ClassVar[str] = "weight_scale_inv"
    endings: ClassVar[Mapping[str, str]] = {
        ".weight": "weight",
        ".weight_scale_inv": "weight_scale_inv",
        # scales of inputs, where a file has fixed ones
        ".activation_scale": "activation_scale",
        ".input_scale": "activation_scale",
    }

    def check(self, where: str, shapes: Shapes, shape: tuple[int, int]) -> None:
        need_parts(where, shapes, ["weight", "weight_scale_inv"])
        need_shape(where, "weight", shapes["weight"], shape, shape)
        tile = self._tile(shapes["weight_scale_inv"], shape)
        if shapes["weight_scale_inv"] not in ((), (1,)):
            expected = (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
            need_shape(where, "weight_scale_inv", shapes["weight_scale_inv"], expected, shape)

    def read(self, where: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedGrid:
        weight, scales = parts["weight"], parts["weight_scale_inv"]
        if weight.dtype != torch.float8_e4m3fn:
            raise ModelError(
                f"{where}: its weight is {weight.dtype}; float8_e4m3fn can be read: use the unquantised checkpoint"
            )
        codes = weight.contiguous().view(torch.uint8)
        if bool(((codes & NOT_A_NUMBER) == NOT_A_NUMBER).any()):
            raise ModelError(
                f"{where}: its weight holds NaN; the checkpoint is damaged: get another copy"
            )
        tile = self._tile(tuple(scales.shape), shape)
        grid = scales.reshape(-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
        return PackedGrid(
            self.quantization,
            shape,
            codes,
            fp32_scales(where, "weight_scale_inv", grid),
            "e4m3",
            tile,
        )

    def _tile(self, scales: tuple[int, ...], shape: tuple[int, int]) -> tuple[int, int]:
        """The (outputs, inputs) that share one of so many scales."""
        if scales in ((), (1,), (1, 1)):
            return shape
        return (1, shape[1]) if scales == (shape[0], 1) else self.block
