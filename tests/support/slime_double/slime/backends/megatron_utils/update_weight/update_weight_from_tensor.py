"""Colocated sync: from the backuper's copies of "actor" on the CPU, a bucket at a time."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slime.utils.distributed_utils import get_gloo_group

from ..megatron_to_hf import convert_to_hf  # noqa: F401 - bound here in slime too
from .hf_weight_iterator_direct import HfWeightIteratorDirect


class UpdateWeightFromTensor:
    def __init__(
        self,
        args: Namespace,
        model: Sequence[Any],
        weights_getter: Callable[[], Mapping[str, Tensor]],
        *,
        model_name: str,
        quantization_config: Any,
    ) -> None:
        self.args, self.model, self.weights_getter = args, model, weights_getter
        self.model_name, self.quantization_config = model_name, quantization_config
        self.weight_version = 0
        self.rollout_engines: Sequence[Any] = []
        self._hf_weight_iterator = HfWeightIteratorDirect(
            args=args, model=model, model_name=model_name, quantization_config=quantization_config
        )

    def connect_rollout_engines(
        self, rollout_engines: Sequence[Any], rollout_engine_lock: Any, *given: Any, **more: Any
    ) -> None:
        self.rollout_engines = rollout_engines

    @torch.no_grad()
    def update_weights(self) -> None:
        self.weight_version += 1
        sender = dist.get_rank() == 0
        for engine in self.rollout_engines if sender else ():
            engine.pause_generation.remote()
            engine.flush_cache.remote()
        dist.barrier(group=get_gloo_group())
        weights = self.weights_getter()
        for hf_named_tensors in self._hf_weight_iterator.get_hf_weight_chunks(weights):
            self._send_hf_params(hf_named_tensors)
        dist.barrier(group=get_gloo_group())
        for engine in self.rollout_engines if sender else ():
            engine.continue_generation.remote()

    def _send_hf_params(self, hf_named_tensors: list[tuple[str, Tensor]]) -> None:
        """In slime by a handle of CUDA IPC."""
        if dist.get_rank() == 0:
            for engine in self.rollout_engines:
                engine.update_weights_from_tensor.remote(
                    hf_named_tensors, weight_version=str(self.weight_version)
                )
