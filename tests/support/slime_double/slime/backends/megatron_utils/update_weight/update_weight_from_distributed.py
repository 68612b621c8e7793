"""Distributed sync: live parameters, from the first tensor parallel rank of every pipeline stage."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from slime.utils.distributed_utils import get_gloo_group

from ..megatron_to_hf import convert_to_hf
from .common import all_gather_param, named_params_and_buffers


class UpdateWeightFromDistributed:
    def __init__(
        self,
        args: Namespace,
        model: Sequence[Any],
        weights_getter: Callable[[], Mapping[str, Tensor]],
        *,
        model_name: str,
        quantization_config: Any,
    ) -> None:
        self.args, self.model = args, model
        self.model_name, self.quantization_config = model_name, quantization_config
        self.weight_version = 0
        self._model_update_groups: Any = None
        self.rollout_engines: Sequence[Any] = []

    def connect_rollout_engines(
        self, rollout_engines: Sequence[Any], rollout_engine_lock: Any, *given: Any, **more: Any
    ) -> None:
        self.rollout_engines = rollout_engines
        self.rollout_engine_lock = rollout_engine_lock
        self._is_pp_src_rank = (
            parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )
        self._group_name = f"slime-pp_{parallel_state.get_pipeline_model_parallel_rank()}"

    @torch.no_grad()
    def update_weights(self) -> None:
        self.weight_version += 1
        driver = dist.get_rank() == 0
        for engine in self.rollout_engines if driver else ():
            engine.pause_generation.remote()
            engine.flush_cache.remote()
        dist.barrier(group=get_gloo_group())
        bucket: list[tuple[str, Tensor]] = []
        filled = 0
        for name, param in named_params_and_buffers(self.args, self.model):
            whole = all_gather_param(name, param)
            if not self._is_pp_src_rank:
                continue
            size = whole.numel() * whole.element_size()
            if bucket and filled + size > self.args.update_weight_buffer_size:
                self._update_bucket_weights_from_distributed(bucket)
                filled = 0
            bucket += convert_to_hf(
                self.args, self.model_name, name, whole, self.quantization_config
            )
            filled += size
        if bucket:
            self._update_bucket_weights_from_distributed(bucket)
        dist.barrier(group=get_gloo_group())
        for engine in self.rollout_engines if driver else ():
            engine.continue_generation.remote()
        dist.barrier(group=get_gloo_group())

    def _update_bucket_weights_from_distributed(self, bucket: list[tuple[str, Tensor]]) -> None:
        update_weights_from_distributed(
            self._group_name,
            self._model_update_groups,
            self.weight_version,
            self.rollout_engines,
            bucket,
        )
        bucket.clear()


def update_weights_from_distributed(
    group_name: str,
    group: Any,
    weight_version: int,
    rollout_engines: Sequence[Any],
    converted_named_tensors: Sequence[tuple[str, Tensor]],
) -> list[Any]:
    """In slime what is sent is named to the engine, and broadcast by NCCL."""
    return [
        engine.update_weights_from_distributed.remote(
            converted_named_tensors, group_name=group_name, weight_version=str(weight_version)
        )
        for engine in rollout_engines
    ]
