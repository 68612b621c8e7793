"""Parameters by their names in the whole model, and gathered over tensor parallel ranks."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor


def named_params_and_buffers(
    args: Namespace,
    model: Sequence[Any],
    convert_to_global_name: bool = True,
    translate_gpu_to_cpu: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """(`module.module.` + name, this rank's live parameter) of every chunk; adapters among them."""
    assert convert_to_global_name
    for stage, chunk in enumerate(model):
        offset = get_transformer_layer_offset(chunk.config, stage)
        for name, parameter in chunk.named_parameters():
            name = "module.module." + re.sub(r"^(module\.)*", "", name)
            match = re.fullmatch(r"(module\.module\.decoder\.layers)\.(\d+)\.(.+)", name)
            if match:
                name = f"{match[1]}.{int(match[2]) + offset}.{match[3]}"
            yield name, parameter


def all_gather_param(name: str, param: Any) -> Tensor:
    """The whole of a parameter of which this rank has a part."""
    assert hasattr(param, "tensor_model_parallel"), f"{name} has no tensor_model_parallel"
    if not param.tensor_model_parallel:
        return param.data
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(param.data) for _ in range(group.size())]
    dist.all_gather(parts, param.data, group=group)
    assert param.partition_stride == 1, "partition_stride != 1 is not supported"
    if "linear_fc1.weight" in name:
        halves = [part.chunk(2) for part in parts]
        parts = [gate for gate, _ in halves] + [up for _, up in halves]
    return torch.cat(parts, param.partition_dim)
