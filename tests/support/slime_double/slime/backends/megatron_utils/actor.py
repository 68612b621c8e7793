"""A training process in slime's order: init hook, model, backup, reference, updater; per rollout the
reference's scores, its own, training, backup. Without Ray: its methods are called.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig

from slime.utils.distributed_utils import get_gloo_group, init_gloo_group
from slime.utils.misc import load_function
from slime.utils.tensor_backper import TensorBackuper

from .checkpoint import load_checkpoint
from .hf_checkpoint_saver import save_hf_model_to_path
from .initialize import init
from .model import forward_only, initialize_model_and_optimizer, save, train
from .update_weight.common import named_params_and_buffers
from .update_weight.update_weight_from_disk import UpdateWeightFromDisk
from .update_weight.update_weight_from_distributed import UpdateWeightFromDistributed
from .update_weight.update_weight_from_tensor import UpdateWeightFromTensor


class MegatronTrainRayActor:
    def init(
        self, args: Namespace, role: str, with_ref: bool = False, with_opd_teacher: bool = False
    ) -> int:
        self.args, self.role = args, role
        init_gloo_group()
        init(args)
        self.hf_config = AutoConfig.from_pretrained(args.hf_checkpoint)
        self.model, self.optimizer, self.opt_param_scheduler, loaded = (
            initialize_model_and_optimizer(args, role)
        )
        if role == "critic":
            return loaded + 1
        self.weights_backuper = TensorBackuper.create(
            source_getter=lambda: named_params_and_buffers(
                self.args, self.model, convert_to_global_name=True
            ),
            single_tag=None,
        )
        self._active_model_tag = "actor"
        self.weights_backuper.backup("actor")
        if with_ref:
            self.load_other_checkpoint("ref", args.ref_load)
        if with_opd_teacher:
            self.load_other_checkpoint("teacher", args.opd_teacher_load)
        if args.keep_old_actor:
            self.load_other_checkpoint("old_actor", args.load)
            self.weights_backuper.backup("rollout_actor")
        assert args.update_weight_mode == "full", "the double has no delta sync"
        if args.update_weight_transport == "disk":
            updater: Any = UpdateWeightFromDisk
        elif args.colocate:
            updater = UpdateWeightFromTensor
        else:
            updater = UpdateWeightFromDistributed
        self.weight_updater = updater(
            self.args,
            self.model,
            weights_getter=lambda: self.weights_backuper.get("actor"),
            model_name=args.model_name or type(self.hf_config).__name__.lower(),
            quantization_config=getattr(self.hf_config, "quantization_config", None),
        )
        self._switch_model("actor")
        return loaded + 1

    def _switch_model(self, target_tag: str) -> None:
        if target_tag not in self.weights_backuper.backup_tags:
            raise ValueError(f"unknown model tag: {target_tag}")
        self.weights_backuper.restore(target_tag)
        self._active_model_tag = target_tag

    def compute_log_prob(self, rows: Tensor, store_prefix: str = "") -> dict[str, Tensor]:
        return forward_only(self.args, self.model, rows, store_prefix=store_prefix)

    def train(self, rollout_id: int, rollout_data: dict[str, Tensor]) -> list[float]:
        """``rollout_data``: tokens [rows, length], advantages [rows, length - 1]; the scores are
        added to it. The losses of the steps."""
        rows = rollout_data["tokens"]
        for tag in ("ref", "teacher"):
            if tag in self.weights_backuper.backup_tags:
                self._switch_model(tag)
                rollout_data.update(self.compute_log_prob(rows, store_prefix=f"{tag}_"))
        self._switch_model("old_actor" if self.args.keep_old_actor else "actor")
        rollout_data.update(self.compute_log_prob(rows))
        if self._active_model_tag != "actor":
            self._switch_model("actor")
        if self.args.rollout_data_postprocess_path:
            load_function(self.args.rollout_data_postprocess_path)(
                self.args, rollout_id, rollout_data
            )
        losses = train(
            rollout_id, self.model, self.optimizer, self.opt_param_scheduler, rollout_data
        )
        self.weights_backuper.backup("actor")
        every = self.args.ref_update_interval
        if every and (rollout_id + 1) % every == 0 and "ref" in self.weights_backuper.backup_tags:
            self.weights_backuper.backup("ref")
        return losses

    def save_model(self, rollout_id: int) -> None:
        save(rollout_id, self.model, self.optimizer, self.opt_param_scheduler)
        if self.args.save_hf is not None and self.role == "actor":
            path = Path(self.args.save_hf.format(rollout_id=rollout_id))
            save_hf_model_to_path(self.args, path, self.model)

    def connect(self, rollout_engines: list[Any], rollout_engine_lock: Any = None) -> None:
        """In slime a part of `update_weights`, which asks the rollout manager for new engines."""
        self.weight_updater.connect_rollout_engines(rollout_engines, rollout_engine_lock)
        dist.barrier(group=get_gloo_group())

    def update_weights(self) -> None:
        if self.args.debug_train_only:
            return
        self.weight_updater.update_weights()

    def load_other_checkpoint(self, model_tag: str, path: str) -> None:
        """Load another checkpoint over the model, and keep it under its tag. What it lacks stays."""
        before = self.args.load, self.args.finetune
        self.args.load, self.args.finetune = path, True
        load_checkpoint(self.model, None, None, checkpointing_context={})
        self.args.load, self.args.finetune = before
        self.weights_backuper.backup(model_tag)
        self._active_model_tag = model_tag
