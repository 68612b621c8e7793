"""Disk sync: a whole Hugging Face directory a version, which the engines read."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slime.utils.distributed_utils import get_gloo_group

from ..hf_checkpoint_saver import save_hf_model_to_path


class UpdateWeightFromDisk:
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

    def connect_rollout_engines(
        self, rollout_engines: Sequence[Any], rollout_engine_lock: Any, *given: Any, **more: Any
    ) -> None:
        self.rollout_engines = rollout_engines
        self.rollout_engine_lock = rollout_engine_lock

    @torch.no_grad()
    def update_weights(self) -> None:
        self.weight_version += 1
        version_dir = Path(self.args.update_weight_disk_dir) / f"weight_v{self.weight_version:06d}"
        driver = dist.get_rank() == 0
        for engine in self.rollout_engines if driver else ():
            engine.pause_generation.remote()
            engine.flush_cache.remote()
        dist.barrier(group=get_gloo_group())
        save_hf_model_to_path(
            self.args,
            version_dir,
            self.model,
            model_name=self.model_name,
            quantization_config=self.quantization_config,
        )
        dist.barrier(group=get_gloo_group())
        for engine in self.rollout_engines if driver else ():
            engine.update_weights_from_disk.remote(
                model_path=str(version_dir), weight_version=str(self.weight_version)
            )
            engine.continue_generation.remote()
        if driver and not self.args.update_weight_disk_keep_files:
            shutil.rmtree(version_dir)
        dist.barrier(group=get_gloo_group())
