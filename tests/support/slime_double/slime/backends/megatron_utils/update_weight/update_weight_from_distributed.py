"""Distributed sync: live parameters, from the first tensor parallel rank of every pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from ..megatron_to_hf import convert_to_hf
from .common import all_gather_param, named_params_and_buffers
from .updater import Updater


class UpdateWeightFromDistributed(Updater):
    _model_update_groups: Any = None

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
        with self.paused():
            self._send()

    def _send(self) -> None:
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
