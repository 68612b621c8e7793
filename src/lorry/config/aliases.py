"""Names that people bring from PEFT, TRL, LLaMA-Factory, axolotl and unsloth, and what Lorry makes of them.

A rename maps to a setting of ours; a reading looks at the value, too; the names in ``NOT_YET`` are known but not built, and
are let through only at a value that asks for what Lorry does anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Reading = Callable[[Any], tuple[str, Any] | None]  # value -> (our setting, its value), or None: it changes nothing

RENAMES: dict[str, str] = {
    **dict.fromkeys(
        ["model_name_or_path", "base_model", "model_name", "model_path", "model_id", "base_model_name_or_path",
         "pretrained_model_name_or_path"], "model.name",
    ),
    **dict.fromkeys(["torch_dtype", "model_dtype", "precision"], "model.dtype"),
    **dict.fromkeys(["adapter_name_or_path", "lora_model_dir", "adapter_path"], "model.adapter"),
    "model_revision": "model.revision",
    "chat_template": "model.chat_template_path",
    **dict.fromkeys(["lora_r", "lora_rank", "rank"], "lora.r"),
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_exclude_modules": "lora.exclude_modules",
    "lora_layers_to_transform": "lora.layers_to_transform",
    "lora_bias": "lora.bias",
    **dict.fromkeys(["rslora", "use_rs_lora", "lora_use_rslora", "peft_use_rslora"], "lora.use_rslora"),
    "peft_init_lora_weights": "lora.init_lora_weights",
    **dict.fromkeys(["cutoff_len", "sequence_len", "max_seq_length", "max_seq_len", "seq_length"], "data.max_length"),
    **dict.fromkeys(["dataset", "dataset_name", "dataset_path", "data_path", "train_file", "train_data"], "data.path"),
    **dict.fromkeys(["dataset_config", "dataset_config_name"], "data.name"),
    "dataset_train_split": "data.split",
    "dataset_test_split": "data.eval_split",
    "dataset_text_field": "data.text_field",
    **dict.fromkeys(["eval_dataset", "eval_file", "validation_file"], "data.eval"),
    **dict.fromkeys(["max_samples", "max_train_samples"], "data.n"),
    **dict.fromkeys(["sample_packing", "neat_packing"], "data.packing"),
    "assistant_only_loss": "data.completion_only_loss",
    **dict.fromkeys(["system_prompt", "default_system"], "data.system"),
    "lr": "train.learning_rate",
    **dict.fromkeys(["num_epochs", "epochs", "n_epochs"], "train.num_train_epochs"),
    **dict.fromkeys(["micro_batch_size", "batch_size", "train_batch_size"], "train.per_device_train_batch_size"),
    "eval_batch_size": "train.per_device_eval_batch_size",
    **dict.fromkeys(
        ["gradient_accumulation", "grad_accumulation", "grad_accum", "accumulation_steps"], "train.gradient_accumulation_steps"
    ),
    **dict.fromkeys(["lr_scheduler", "scheduler"], "train.lr_scheduler_type"),
    **dict.fromkeys(["grad_clip", "clip_grad", "gradient_clip_val"], "train.max_grad_norm"),
    **dict.fromkeys(["beta1", "adam_b1"], "train.adam_beta1"),
    **dict.fromkeys(["beta2", "adam_b2"], "train.adam_beta2"),
    **dict.fromkeys(["adam_eps", "optim_eps"], "train.adam_epsilon"),
    **dict.fromkeys(["random_state", "random_seed"], "train.seed"),
    **dict.fromkeys(["log_steps", "log_every"], "train.logging_steps"),
    "evaluation_strategy": "train.eval_strategy",
    "resume": "train.resume_from_checkpoint",
    "logger": "train.report_to",
    "loraplus_ratio": "train.loraplus_lr_ratio",
    **dict.fromkeys(["output", "out_dir", "save_dir", "output_path"], "output_dir"),
    **dict.fromkeys(["repo_name", "repo_id", "hub_repo"], "train.hub_model_id"),
    **dict.fromkeys(["teacher_model", "teacher_model_name_or_path"], "distill.teacher"),
    "num_threads": "backend.threads",
    "max_memory": "memory_budget",
}  # fmt: skip


def _if_on(setting: str, meaning: Any) -> Reading:
    """A switch that stands for one value of ours; anything but true, false, null and auto goes on to be refused there."""
    return lambda on: None if on in (False, None, "auto") else (setting, meaning if on is True else on)


def _opposite(setting: str) -> Reading:
    return lambda on: (setting, not on if isinstance(on, bool) else on)


def _share_or_rows(size: Any) -> tuple[str, Any] | None:
    return ("data.test_size", size) if size else None


READINGS: dict[str, Reading] = {
    "bf16": _if_on("model.dtype", "bfloat16"),
    "fp16": _if_on("model.dtype", "float16"),
    "train_on_inputs": _opposite("data.completion_only_loss"),
    "train_on_prompt": _opposite("data.completion_only_loss"),
    "train_on_responses_only": lambda on: ("data.completion_only_loss", on),
    "lora_target_linear": _if_on("lora.target_modules", "all-linear"),
    "lora_target": lambda names: ("lora.target_modules", "all-linear" if names == "all" else names),
    "warmup": lambda much: ("train.warmup_ratio" if isinstance(much, float) and much < 1 else "train.warmup_steps", much),
    "use_gradient_checkpointing": lambda on: ("train.gradient_checkpointing", on == "unsloth" or on),
    "val_set_size": _share_or_rows,
    "val_size": _share_or_rows,
}

OFF: tuple[Any, ...] = (False, None, "none", "no", [], {})
NOT_YET: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ["use_dora", "use_qalora", "modules_to_save", "target_parameters", "trainable_token_indices", "ensure_weight_tying",
         "layers_pattern", "layer_replication", "loftq_config", "eva_config", "corda_config", "lora_bias_trainable",
         "fan_in_fan_out", "megatron_config", "load_in_4bit", "load_in_8bit", "quantization_bit", "quantize", "processes",
         "tensor_parallel", "pipeline_parallel", "forget", "retain", "method", "fsdp", "fsdp_config", "deepspeed",
         "neftune_noise_alpha", "label_smoothing_factor", "auto_find_batch_size", "group_by_length", "use_liger_kernel",
         "torch_compile", "rewards", "reward_funcs", "attn_implementation", "flash_attention", "eos_token", "pad_token",
         "tokenizer", "evals_per_epoch", "saves_per_epoch", "logging_dir"], OFF,
    ),
    "variant": (*OFF, "lora"),
    "peft_type": (None, "LORA"),
    "task_type": (None, "CAUSAL_LM"),
    "lora_task_type": (None, "CAUSAL_LM"),
    "optim": (None, "adamw", "adamw_torch", "adamw_torch_fused"),
    "optimizer": (None, "adamw", "adamw_torch", "adamw_torch_fused"),
    "finetuning_type": ("lora",),
    "stage": ("sft",),
    "use_peft": (True,),
    "use_lora": (True,),
    "do_train": (True,),
    "inference_mode": OFF,
    "save_safetensors": (None, True),
    "save_model": (None, True),
    "eval_packing": OFF,
    "tf32": (None, False),
}  # fmt: skip

# settings of another verb than the one they are given to
ELSEWHERE: dict[str, str] = {"teacher": "lorry distill", "tasks": "lorry eval; in training they are called eval_tasks"}

NOT_YET_VALUES: dict[str, tuple[str, ...]] = {
    "backend.name": ("fsdp", "megatron"),
    "to": ("gguf", "hf-moe"),
    "lora.bias": ("all", "lora_only"),
    "lora.init_lora_weights": ("pissa", "olora", "eva", "corda", "loftq", "orthogonal"),
}
