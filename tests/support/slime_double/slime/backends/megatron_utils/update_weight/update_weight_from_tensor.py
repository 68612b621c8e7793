"""Colocated sync: from the backuper's copies of "actor" on the CPU, a bucket at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..megatron_to_hf import convert_to_hf  # noqa: F401 - bound here in slime too
from .hf_weight_iterator_direct import HfWeightIteratorDirect
from .updater import Updater


class UpdateWeightFromTensor(Updater):
    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._hf_weight_iterator = HfWeightIteratorDirect(
            args=self.args,
            model=self.model,
            model_name=self.model_name,
            quantization_config=self.quantization_config,
        )

    def connect_rollout_engines(
        self, rollout_engines: Sequence[Any], rollout_engine_lock: Any, *given: Any, **more: Any
    ) -> None:
        self.rollout_engines = rollout_engines

    @torch.no_grad()
    def update_weights(self) -> None:
        with self.paused():
            weights = self.weights_getter()
            for hf_named_tensors in self._hf_weight_iterator.get_hf_weight_chunks(weights):
                self._send_hf_params(hf_named_tensors)

    def _send_hf_params(self, hf_named_tensors: list[tuple[str, Tensor]]) -> None:
        """In slime by a handle of CUDA IPC."""
        if dist.get_rank() == 0:
            for engine in self.rollout_engines:
                engine.update_weights_from_tensor.remote(
                    hf_named_tensors, weight_version=str(self.weight_version)
                )
