"""Disk sync: a whole Hugging Face directory a version, which the engines read."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from slime.utils.distributed_utils import get_gloo_group

from ..hf_checkpoint_saver import save_hf_model_to_path
from .updater import Updater


class UpdateWeightFromDisk(Updater):
    def connect_rollout_engines(
        self, rollout_engines: Sequence[Any], rollout_engine_lock: Any, *given: Any, **more: Any
    ) -> None:
        self.rollout_engines = rollout_engines
        self.rollout_engine_lock = rollout_engine_lock

    @torch.no_grad()
    def update_weights(self) -> None:
        with self.paused() as engines:
            version_dir = (
                Path(self.args.update_weight_disk_dir) / f"weight_v{self.weight_version:06d}"
            )
            save_hf_model_to_path(
                self.args,
                version_dir,
                self.model,
                model_name=self.model_name,
                quantization_config=self.quantization_config,
            )
            dist.barrier(group=get_gloo_group())
            for engine in engines:
                engine.update_weights_from_disk.remote(
                    model_path=str(version_dir), weight_version=str(self.weight_version)
                )
        if dist.get_rank() == 0 and not self.args.update_weight_disk_keep_files:
            shutil.rmtree(version_dir)
