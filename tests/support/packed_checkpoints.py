"""Checkpoints as bitsandbytes, AutoGPTQ, AutoAWQ and DeepSeek's tools write them, of random codes, and the
whole checkpoint of the same values: both by the published layouts, a number at a time, in NumPy.

    write_packed("gptq", plain, tmp_path / "packed", tmp_path / "whole")
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

Matrix = NDArray[np.float64]
# what a format stores of a matrix, by the end of its tensors' names, and the values (O, I) that it means
Packed = tuple[dict[str, Tensor], Matrix]

GROUP = 32
NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634
0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""


def _ints(words: Any) -> Tensor:
    return torch.from_numpy(np.asarray(words, dtype=np.uint32).view(np.int32).copy())


def gptq(
    draw: np.random.Generator,
    shape: tuple[int, int],
    *,
    bits: int = 4,
    act_order: bool = False,
    off: int = 1,
) -> Packed:
    """w = scale[group] (code - zero[group]); zeros stored less ``off``, in so many bits."""
    outputs, inputs = shape
    groups, many, most = -(-inputs // GROUP), 32 // bits, 2**bits
    codes = draw.integers(0, most, (inputs, outputs))
    zeros = draw.integers(0, most, (groups, outputs))
    zeros[0, 0] = 0  # less one is the largest
    scales = (draw.random((groups, outputs)) * 0.4 / most + 0.01 / bits).astype(np.float16)
    order = np.arange(inputs) // GROUP
    if act_order:
        draw.shuffle(order)
    qweight = np.zeros((inputs // many, outputs), dtype=np.uint64)
    for i in range(inputs):
        qweight[i // many] |= codes[i].astype(np.uint64) << np.uint64(bits * (i % many))
    qzeros = np.zeros((groups, outputs // many), dtype=np.uint64)
    for o in range(outputs):
        stored = (zeros[:, o] - off) % most
        qzeros[:, o // many] |= stored.astype(np.uint64) << np.uint64(bits * (o % many))
    weight = scales.astype(np.float64)[order] * (codes - zeros[order])
    tensors = {
        ".qweight": _ints(qweight),
        ".qzeros": _ints(qzeros),
        ".scales": torch.from_numpy(scales),
        ".g_idx": torch.from_numpy(order.astype(np.int32)),
    }
    return tensors, weight.T


def awq(draw: np.random.Generator, shape: tuple[int, int]) -> Packed:
    """The same along the outputs, eight at a time in the order of AWQ's kernels."""
    outputs, inputs = shape
    order, groups = (0, 2, 4, 6, 1, 3, 5, 7), -(-inputs // GROUP)
    codes = draw.integers(0, 16, (inputs, outputs))
    zeros = draw.integers(0, 16, (groups, outputs))
    scales = (draw.random((groups, outputs)) * 0.03 + 0.002).astype(np.float16)

    def packed(values: Any) -> Tensor:
        words = np.zeros((len(values), outputs // 8), dtype=np.uint64)
        for word in range(outputs // 8):
            for place, output in enumerate(order):
                words[:, word] |= values[:, 8 * word + output].astype(np.uint64) << np.uint64(
                    4 * place
                )
        return _ints(words)

    group = np.arange(inputs) // GROUP
    weight = scales.astype(np.float64)[group] * (codes - zeros[group])
    return {
        ".qweight": packed(codes),
        ".qzeros": packed(zeros),
        ".scales": torch.from_numpy(scales),
    }, weight.T


def fp8(
    draw: np.random.Generator,
    shape: tuple[int, int],
    *,
    block: tuple[int, int] | None = (128, 128),
) -> Packed:
    """Sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, and 0x7f is no number."""
    codes = draw.integers(0, 256, shape).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 3
    exponent, mantissa = (codes >> 3 & 15).astype(int), (codes & 7) / 8
    size = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    values = np.where(codes & 0x80, -size, size)
    tile = block or shape
    grid = tuple(math.ceil(n / m) for n, m in zip(shape, tile, strict=True))
    scales = (draw.random(grid) * 0.001 + 0.0005).astype(np.float32)
    rows, columns = (np.arange(n) // m for n, m in zip(shape, tile, strict=True))
    weight = values * scales.astype(np.float64)[rows][:, columns]
    stored = torch.from_numpy(scales) if block else torch.tensor(float(scales[0, 0]))
    return {
        ".weight": torch.from_numpy(codes).view(torch.float8_e4m3fn),
        ".weight_scale_inv": stored,
    }, weight


def nf4(draw: np.random.Generator, shape: tuple[int, int], *, double: bool = True) -> Packed:
    """Two codes a byte, the first high; blocks of 64 of the flattened matrix, whose scales are codes of a
    table with a scale for each 256, and an offset."""
    levels = np.array([float(v) for v in NF4.split()], dtype=np.float32)
    count = shape[0] * shape[1]
    blocks, codes = -(-count // 64), draw.integers(0, 16, count + count % 2)
    codes[count:] = 0
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16"}
    state["shape"] = list(shape)
    tensors = {
        ".weight": torch.from_numpy((codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None]),
        ".weight.quant_map": torch.from_numpy(levels),
    }
    if double:
        # of another tool's file, as they lie there: any table would do
        table = _dynamic_map()
        nested = (draw.random(-(-blocks // 256)) * 0.1 + 0.05).astype(np.float32)
        chosen, offset = draw.integers(128, 256, blocks), np.float32(0.07)
        absmax = table[chosen] * nested[np.arange(blocks) // 256] + offset
        tensors |= {
            ".weight.absmax": torch.from_numpy(chosen.astype(np.uint8)),
            ".weight.nested_absmax": torch.from_numpy(nested),
            ".weight.nested_quant_map": torch.from_numpy(table),
        }
        state |= {"nested_blocksize": 256, "nested_dtype": "float32"}
        state["nested_offset"] = float(offset)
    else:
        absmax = (draw.random(blocks) * 0.2 + 0.05).astype(np.float32)
        tensors[".weight.absmax"] = torch.from_numpy(absmax)
    tensors[".weight.quant_state.bitsandbytes__nf4"] = torch.tensor(
        list(json.dumps(state).encode()), dtype=torch.uint8
    )
    values = (levels[codes[:count]] * absmax[np.arange(count) // 64]).astype(np.float64)
    return tensors, values.reshape(shape)


def int8(draw: np.random.Generator, shape: tuple[int, int]) -> Packed:
    """w = code largest / 127, the largest of each output."""
    codes = draw.integers(-127, 128, shape).astype(np.int8)
    largest = (draw.random(shape[0]) * 0.2 + 0.05).astype(np.float16).astype(np.float32)
    return {
        ".weight": torch.from_numpy(codes),
        ".SCB": torch.from_numpy(largest),
        ".weight_format": torch.tensor(0, dtype=torch.uint8),
    }, codes * largest.astype(np.float64)[:, None] / 127


def _dynamic_map() -> NDArray[np.float32]:
    """Seven decades, signed: twice as many evenly spread fractions in each as in the one below."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += [*middles, *-middles]
    return np.sort(np.array(values, dtype=np.float32))


Writer = Callable[[np.random.Generator, tuple[int, int]], Packed]
FORMATS: Mapping[str, tuple[dict[str, Any], Writer]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}, gptq),
    "gptq-order": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True},
        lambda draw, shape: gptq(draw, shape, act_order=True),
    ),
    "gptq-8": (
        {"quant_method": "gptq", "bits": 8, "group_size": GROUP},
        lambda draw, shape: gptq(draw, shape, bits=8),
    ),
    "gptq-8-order": (
        {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "desc_act": True},
        lambda draw, shape: gptq(draw, shape, bits=8, act_order=True),
    ),
    "gptq-v2": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
        lambda draw, shape: gptq(draw, shape, off=0),
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
        awq,
    ),
    "fp8": (
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [16, 32],
        },
        lambda draw, shape: fp8(draw, shape, block=(16, 32)),
    ),
    "fp8-128": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, fp8),
    "fp8-one": ({"quant_method": "fp8"}, lambda draw, shape: fp8(draw, shape, block=None)),
    "nf4": (
        {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        },
        nf4,
    ),
    "nf4-single": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        lambda draw, shape: nf4(draw, shape, double=False),
    ),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, int8),
}


def write_packed(
    name: str,
    source: Path,
    packed: Path,
    whole: Path,
    linears: Mapping[str, tuple[int, int]],
    *,
    transposed: bool = False,
) -> None:
    """Two copies of a checkpoint whose ``linears`` {path: (O, I)} have new values: stored in a format, and
    whole in fp32 (``transposed``: as [I,O])."""
    stated, write = FORMATS[name]
    shutil.copytree(source, packed)
    shutil.copytree(source, whole)
    draw = np.random.default_rng(7)
    tensors = load_file(source / "model.safetensors")
    values = dict(tensors)
    for path, shape in linears.items():
        parts, weight = write(draw, shape)
        del tensors[f"{path}.weight"]
        tensors |= {f"{path}{ending}": part for ending, part in parts.items()}
        true = torch.from_numpy(weight.T if transposed else weight)
        values[f"{path}.weight"] = true.float().contiguous()
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    save_file(values, whole / "model.safetensors", {"format": "pt"})
    state = json.loads((packed / "config.json").read_text())
    state["quantization_config"] = stated
    (packed / "config.json").write_text(json.dumps(state))
