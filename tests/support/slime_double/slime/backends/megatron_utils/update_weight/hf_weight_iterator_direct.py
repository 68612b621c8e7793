"""Whole Hugging Face tensors of a model, bucket by bucket, from each rank's part of the weights."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from slime.utils.types import ParamInfo

from ..megatron_to_hf import convert_to_hf
from .common import all_gather_param, named_params_and_buffers

ATTRIBUTES = {"tensor_model_parallel": False, "partition_dim": -1, "partition_stride": 1}


class HfWeightIteratorDirect:
    def __init__(
        self, args: Namespace, model: Sequence[Any], model_name: str, quantization_config: Any
    ) -> None:
        self.args, self.model, self.model_name = args, model, model_name
        self.quantization_config = quantization_config
        # fixed here: what is added to the model later is never sent
        self.megatron_local_param_info_buckets = _buckets(args, model)

    def get_hf_weight_chunks(
        self, megatron_local_weights: Mapping[str, Tensor]
    ) -> Iterator[list[tuple[str, Tensor]]]:
        """(name, whole tensor) of a bucket, on every rank."""
        for infos in self.megatron_local_param_info_buckets:
            chunk: list[tuple[str, Tensor]] = []
            for info in infos:
                whole = _whole(info, megatron_local_weights)
                chunk += convert_to_hf(
                    self.args, self.model_name, info.name, whole, self.quantization_config
                )
            yield chunk


def _whole(info: ParamInfo, weights: Mapping[str, Tensor]) -> Tensor:
    group = parallel_state.get_pipeline_model_parallel_group()
    if dist.get_rank() == info.src_rank:
        value = weights[info.name].detach().clone()
    else:
        value = torch.empty(info.shape, dtype=info.dtype)
    if group.size() > 1:
        source = next(r for r in dist.get_process_group_ranks(group) if r == info.src_rank)
        dist.broadcast(value, source, group=group)
    parameter = torch.nn.Parameter(value, requires_grad=False)
    for name, attribute in info.attrs.items():
        setattr(parameter, name, attribute)
    return all_gather_param(info.name, parameter)


def _buckets(args: Namespace, model: Sequence[Any]) -> list[list[ParamInfo]]:
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    buckets: list[list[ParamInfo]] = [[]]
    filled = 0
    for info in _infos(args, model):
        size = info.size * ranks
        if buckets[-1] and filled + size > args.update_weight_buffer_size:
            buckets.append([])
            filled = 0
        buckets[-1].append(info)
        filled += size
    return buckets


def _infos(args: Namespace, model: Sequence[Any]) -> list[ParamInfo]:
    """Of every parameter of the whole model, the same list on every rank."""
    own = {
        name: ParamInfo(
            name,
            parameter.dtype,
            parameter.shape,
            {key: getattr(parameter, key, default) for key, default in ATTRIBUTES.items()},
            parameter.numel() * parameter.element_size(),
            dist.get_rank(),
        )
        for name, parameter in named_params_and_buffers(args, model)
    }
    group = parallel_state.get_pipeline_model_parallel_group()
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, own, group=group)
    every = {name: info for infos in reversed(gathered) for name, info in infos.items()}
    return [every[name] for name in sorted(every)]
