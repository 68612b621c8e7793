"""Names that people bring from PEFT, TRL, LLaMA-Factory, axolotl and unsloth, and what Lorry makes
of them.

A rename maps to a setting of ours; a reading looks at the value, too; the names in
``IGNORED_ALIASES`` change nothing here whatever their value; those in ``UNSUPPORTED_ALIASES`` are
known but not built, and are let through only at a value that asks for what Lorry does anyway.
``HOMONYMS`` are names of ours that a peer uses for something else, told apart by the value.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from lorry.config.left_out import OFF_VALUES

# value -> our settings and their values, one or several; None: it changes nothing. ValueError: what
# is wrong with the value
AliasReader = Callable[[Any], tuple[str, Any] | list[tuple[str, Any]] | None]

ALIAS_RENAMES: dict[str, str] = {
    **dict.fromkeys(
        [
            "model_name_or_path",
            "base_model",
            "model_name",
            "model_path",
            "model_id",
            "base_model_name_or_path",
            "pretrained_model_name_or_path",
        ],
        "model.name",
    ),
    **dict.fromkeys(["torch_dtype", "model_dtype", "precision"], "model.dtype"),
    **dict.fromkeys(["adapter_name_or_path", "lora_model_dir", "adapter_path"], "model.adapter"),
    "model_revision": "model.revision",
    "chat_template": "model.chat_template_path",
    **dict.fromkeys(["lora_r", "lora_rank", "rank"], "lora.r"),
    # of PEFT's add_weighted_adapter
    "combination_type": "method",
    "svd_rank": "rank",
    # of mergekit-moe, shortened
    "gate": "gate_mode",
    # in scripts of PEFT users; distill.alpha is a name of our own and goes before an alias
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_target_parameters": "lora.target_parameters",
    "lora_exclude_modules": "lora.exclude_modules",
    "lora_layers_to_transform": "lora.layers_to_transform",
    **dict.fromkeys(
        ["rslora", "use_rs_lora", "lora_use_rslora", "peft_use_rslora"], "lora.use_rslora"
    ),
    **dict.fromkeys(["dora", "lora_use_dora", "peft_use_dora"], "lora.use_dora"),
    "peft_init_lora_weights": "lora.init_lora_weights",
    **dict.fromkeys(["lora_modules_to_save", "peft_modules_to_save"], "lora.modules_to_save"),
    "peft_trainable_token_indices": "lora.trainable_token_indices",
    "peft_ensure_weight_tying": "lora.ensure_weight_tying",
    **dict.fromkeys(["lora_layers_pattern", "peft_layers_pattern"], "lora.layers_pattern"),
    **dict.fromkeys(
        ["cutoff_len", "sequence_len", "max_seq_length", "max_seq_len", "seq_length"],
        "data.max_length",
    ),
    **dict.fromkeys(
        ["dataset", "dataset_name", "dataset_path", "data_path", "train_file", "train_data"],
        "data.path",
    ),
    **dict.fromkeys(["dataset_config", "dataset_config_name"], "data.name"),
    "dataset_train_split": "data.split",
    "dataset_test_split": "data.eval_split",
    "dataset_text_field": "data.text_field",
    **dict.fromkeys(["eval_dataset", "eval_file", "validation_file"], "data.eval"),
    **dict.fromkeys(["max_samples", "max_train_samples"], "data.n"),
    **dict.fromkeys(["sample_packing", "neat_packing"], "data.packing"),
    # both of TRL's switches leave the prompt out of the loss
    "assistant_only_loss": "data.completion_only_loss",
    **dict.fromkeys(["system_prompt", "default_system"], "data.system"),
    "lr": "train.learning_rate",
    **dict.fromkeys(["num_epochs", "epochs", "n_epochs"], "train.num_train_epochs"),
    **dict.fromkeys(
        ["micro_batch_size", "batch_size", "train_batch_size"], "train.per_device_train_batch_size"
    ),
    "eval_batch_size": "train.per_device_eval_batch_size",
    **dict.fromkeys(
        ["gradient_accumulation", "grad_accumulation", "grad_accum", "accumulation_steps"],
        "train.gradient_accumulation_steps",
    ),
    **dict.fromkeys(["lr_scheduler", "scheduler"], "train.lr_scheduler_type"),
    **dict.fromkeys(["grad_clip", "clip_grad", "gradient_clip_val"], "train.max_grad_norm"),
    "adam_b1": "train.adam_beta1",
    "adam_b2": "train.adam_beta2",
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
    "experts": "jobs",  # of `lorry moe`
    "subjects": "jobs",  # of `lorry unlearn`: what is forgotten apart, an adapter for each
}


def _switch_meaning(setting: str, meaning: Any) -> AliasReader:
    """A switch that stands for one value of ours; anything but true, false, null and auto goes on
    to be refused there.
    """
    return lambda on: (
        None if on in (False, None, "auto") else (setting, meaning if on is True else on)
    )


def _negated_switch(setting: str) -> AliasReader:
    return lambda on: (setting, not on if isinstance(on, bool) else on)


def _share_or_rows(size: Any) -> tuple[str, Any] | None:
    return ("data.test_size", size) if size else None


def _once_an_epoch(setting: str) -> AliasReader:
    """``evals_per_epoch: 4`` as once an epoch; the steps of a quarter of one are only known with
    the data.
    """
    return lambda times: (setting, "epoch") if times else None


def _pad_token_only(tokens: Any) -> None:
    """Batches are packed, so no pad token is needed; other special tokens would change what is
    learnt.
    """
    if tokens and (not isinstance(tokens, dict) or set(tokens) - {"pad_token"}):
        raise ValueError(
            "special tokens are those of the tokenizer's files; only pad_token may be given, and changes nothing"
        )


# the way rows are read, by axolotl's name for it
AXOLOTL_TYPES = {
    "alpaca": "alpaca",
    "chat_template": "auto",
    "sharegpt": "conversations",
    "completion": "text",
}


def _axolotl_datasets(sets: Any) -> list[tuple[str, Any]]:
    """``datasets: [{path: FILE_OR_ID, type: alpaca}]``. Raises ValueError for entries that ask for
    more than that.
    """
    if (
        not isinstance(sets, list)
        or not sets
        or not all(isinstance(entry, dict) and isinstance(entry.get("path"), str) for entry in sets)
    ):
        raise ValueError(
            "is a list of maps with a path each, such as [{path: rows.jsonl, type: alpaca}]"
        )
    odd = sorted(
        {str(key) for entry in sets for key in entry} - {"path", "type", "name", "split", "ds_type"}
    )
    if odd:
        raise ValueError(
            f"has {', '.join(odd)}, which has no counterpart in Lorry; give data= "
            "and data.format instead"
        )
    settings: list[tuple[str, Any]] = [
        ("data.path", sets[0]["path"] if len(sets) == 1 else [entry["path"] for entry in sets])
    ]
    for key, ours, words in (
        ("type", "data.format", AXOLOTL_TYPES),
        ("name", "data.name", None),
        ("split", "data.split", None),
    ):
        values = {entry.get(key) for entry in sets}
        if len(values) > 1 or (words is not None and not values <= {None, *words}):
            known = f" ({', '.join(words)})" if words is not None else ""
            raise ValueError(
                f"must have one and the same {key}{known} for all entries; give data= and {ours} instead"
            )
        if (value := values.pop()) is not None:
            settings.append((ours, words[value] if words is not None else value))
    return settings


def _bits(value: Any) -> tuple[str, Any] | None:
    """LLaMA-Factory's number of bits."""
    if value not in (None, 4, 8):
        raise ValueError("is 4 (model.quantize=nf4) or 8 (model.quantize=int8) here")
    return None if value is None else ("model.quantize", {4: "nf4", 8: "int8"}[value])


def _lora_bias(value: Any) -> tuple[str, Any] | None:
    """Scripts' `lora_bias` is a word and means PEFT's `bias`; PEFT's own `lora_bias` is a switch
    and another thing, a bias beside every lora_B.
    """
    if value is True:
        return "lora.lora_B_bias", True
    return None if value is False or value is None else ("lora.bias", value)


def _steered_layer(regex: Any) -> tuple[str, Any]:
    r"""open-unlearning's ``model\.layers\.7`` of RMU as the number of the layer."""
    match = re.fullmatch(r".*layers(?:\\?\.)(\d+)", str(regex))
    if match is None:
        raise ValueError("is understood as model\\.layers\\.N only; give layer=N")
    return "unlearn.layer", int(match[1])


ALIAS_READERS: dict[str, AliasReader] = {
    "retain_loss_type": lambda name: (
        "unlearn.retain_loss",
        "EMBED" if name == "EMBED_DIFF" else name,
    ),
    "module_regex": _steered_layer,
    "lora_bias": _lora_bias,
    "datasets": _axolotl_datasets,
    "use_cpu": _switch_meaning("model.device", "cpu"),
    "evals_per_epoch": _once_an_epoch("train.eval_strategy"),
    "saves_per_epoch": _once_an_epoch("train.save_strategy"),
    "special_tokens": _pad_token_only,
    "bf16": _switch_meaning("model.dtype", "bfloat16"),
    "fp16": _switch_meaning("model.dtype", "float16"),
    "train_on_inputs": _negated_switch("data.completion_only_loss"),
    "train_on_prompt": _negated_switch("data.completion_only_loss"),
    "train_on_responses_only": lambda on: ("data.completion_only_loss", on),
    "lora_target_linear": _switch_meaning("lora.target_modules", "all-linear"),
    # LLaMA-Factory's, names with commas
    "additional_target": lambda names: (
        "lora.modules_to_save",
        re.split(r"\s*,\s*", names) if isinstance(names, str) else names,
    ),
    "lora_target": lambda names: ("lora.target_modules", "all-linear" if names == "all" else names),
    # other tools take both under this name; a share is below 1, steps are whole
    "warmup": lambda much: (
        "train.warmup_ratio" if isinstance(much, float) and much < 1 else "train.warmup_steps",
        much,
    ),
    "use_gradient_checkpointing": lambda on: (
        "train.gradient_checkpointing",
        # unsloth's own variant recomputes the same; where it keeps activations changes no number
        on == "unsloth" or on,
    ),
    "load_in_4bit": _switch_meaning("model.quantize", "nf4"),
    "load_in_8bit": _switch_meaning("model.quantize", "int8"),
    "quantization_bit": _bits,
    "val_set_size": _share_or_rows,
    "val_size": _share_or_rows,
}

_ROWS = "Lorry reads and tokenises rows its own way, with the same tokens"
_KERNELS = "kernels are chosen by what this machine has (lorry doctor)"
_PROCESS = "ranks are the launcher's to say, and adapters' gradients are summed whole"
_TYPE = "the model's and tokenizer's own files decide it"
_OUTPUT = "an output directory is never overwritten: an earlier run moves to previous/N"
_REPORT = "it is in the run's report"
_WATCH = "a loss that is not finite always stops the run"
IGNORED_ALIASES: dict[str, str] = {
    **dict.fromkeys(
        [
            "overwrite_cache",
            "preprocessing_num_workers",
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_prefetch_factor",
            "dataloader_drop_last",
            "dataloader_persistent_workers",
            "dataset_num_proc",
            "dataset_processes",
            "dataset_prepared_path",
            "dataset_keep_in_memory",
            "remove_unused_columns",
            "shuffle_merged_datasets",
            "skip_prepare_dataset",
        ],
        _ROWS,
    ),
    **dict.fromkeys(
        [
            "pad_to_sequence_len",
            "pad_to_multiple_of",
            "padding_free",
            "eval_sample_packing",
            "sample_packing_eff_est",
        ],
        "sequences are packed without padding and never attend to each other",
    ),
    **dict.fromkeys(
        [
            "attn_implementation",
            "flash_attention",
            "xformers_attention",
            "flash_attn",
            "sdp_attention",
            "gradient_checkpointing_kwargs",
            "torch_empty_cache_steps",
            "torch_compile_backend",
            "torch_compile_mode",
            "use_unsloth",
        ],
        _KERNELS,
    ),
    **dict.fromkeys(
        [
            "ddp_timeout",
            "ddp_find_unused_parameters",
            "ddp_bucket_cap_mb",
            "ddp_broadcast_buffers",
            "local_rank",
            "world_size",
        ],
        _PROCESS,
    ),
    **dict.fromkeys(
        [
            "model_type",
            "tokenizer_type",
            "tokenizer_use_fast",
            "tokenizer_legacy",
            "is_llama_derived_model",
        ],
        _TYPE,
    ),
    **dict.fromkeys(["overwrite_output_dir"], _OUTPUT),
    **dict.fromkeys(
        [
            "plot_loss",
            "eval_table_size",
            "eval_max_new_tokens",
            "logging_first_step",
            "logging_strategy",
            "log_level",
            "disable_tqdm",
            "include_num_input_tokens_seen",
            "include_tokens_per_second",
            "wandb_watch",
            "wandb_log_model",
            "debug",
            "strict",
        ],
        _REPORT,
    ),
    "device_map": "a model is on one device, set by device",
    "do_eval": "eval_strategy decides when to evaluate",
    "bf16_full_eval": "evaluation uses the dtype of training",
    "overwrite": "a suite computes only the metrics that its files lack",
    **dict.fromkeys(
        ["save_only_model", "save_on_each_node"],
        "a checkpoint always holds everything that resuming needs",
    ),
    **dict.fromkeys(
        ["loss_watchdog_threshold", "loss_watchdog_patience", "logging_nan_inf_filter"], _WATCH
    ),
}

# our own names that a peer uses for something else: whether the value is theirs, and what becomes
# of it
HOMONYMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "adapter": (
        lambda value: value == "lora",
        "names the method; an adapter in a directory of that name is ./lora",
    ),
    "template": (
        lambda value: (
            isinstance(value, str) and not value.strip().lstrip("-").isdigit() and value != "null"
        ),
        "names a template of another tool; prompts are rendered by the tokenizer's own chat template",
    ),
}

UNSUPPORTED_ALIASES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        [
            "use_qalora",
            "layer_replication",
            "kasa_config",
            "velora_config",
            "monteclora_config",
            "use_bdlora",
            "arrow_config",
            "loftq_config",
            "eva_config",
            "corda_config",
            "lora_bias_trainable",
            "fan_in_fan_out",
            "megatron_config",
            "pipeline_parallel",
            "offload",
            "fsdp",
            "fsdp_config",
            "deepspeed",
            "neftune_noise_alpha",
            "label_smoothing_factor",
            "auto_find_batch_size",
            "group_by_length",
            "use_liger_kernel",
            "torch_compile",
            "rewards",
            "reward_funcs",
            "eos_token",
            "pad_token",
            "tokenizer",
            "logging_dir",
            "lora_fan_in_fan_out",
            "wandb_project",
            "wandb_entity",
            "wandb_name",
            "wandb_run_id",
            "resize_token_embeddings_to_32x",
            "unfreeze_layers",
            "s2_attention",
            "noisy_embedding_alpha",
            "curriculum_sampling",
            "reward_model",
            "mlflow_tracking_uri",
            "comet_project_name",
        ],
        OFF_VALUES,
    ),
    "peft_type": (None, "LORA"),
    "task_type": (None, "CAUSAL_LM"),
    "lora_task_type": (None, "CAUSAL_LM"),
    # narrow or paged moments save memory on a whole model's; an adapter's are kept in float32
    **dict.fromkeys(
        ["optim", "optimizer"],
        (
            None,
            "adamw",
            "adamw_torch",
            "adamw_torch_fused",
            "adamw_hf",
            "adamw_8bit",
            "adamw_bnb_8bit",
            "adamw_torch_8bit",
            "paged_adamw_8bit",
            "paged_adamw_32bit",
            "paged_adamw",
        ),
    ),
    "finetuning_type": ("lora",),
    "stage": ("sft",),
    "use_peft": (True,),
    "use_lora": (True,),
    "do_train": (True,),
    "inference_mode": OFF_VALUES,
    "save_safetensors": (None, True),
    "save_model": (None, True),
    "eval_packing": OFF_VALUES,
    "tf32": (None, False),
}

# settings of another verb than the one they are given to
_SPLIT_OWNERS = "experiments (experiment=unlearn/tofu/lora); by itself: forget=tofu:forget10 retain=tofu:retain90"
# not of `lorry sweep` either: that verb makes a grid of its numbers itself
_UNLEARN = (
    "lorry unlearn, where several values are jobs of one pass: lorry unlearn model=M forget=FILE "
    "retain=FILE method=NPO beta=0.1,0.5"
)
_UNLEARN_SETTINGS = (
    "forget",
    "retain",
    "method",
    "trainer",
    "gamma",
    "delta",
    "retain_loss",
    "retain_loss_eps",
    "steering_coeff",
    "alternates",
    "idk",
    "stop_below",
    "early_stop",
    "peer_masks",
    "adaptive",
    "layer",
    "dual_step_size",
    "dual_update_upon",
    "dual_warmup_epochs",
    "ignore_first_n_answer_tokens",
    "gradient",
    "sam_rho",
    "anchor",
    "reference",
)
# of some of these, what there is in their place
NEAREST_SETTINGS: dict[str, str] = {
    "pipeline_parallel": "tensor_parallel=N (backend=ddp, fsdp or megatron) or backend=fsdp",
    **dict.fromkeys(["fsdp", "fsdp_config", "deepspeed"], "backend=fsdp processes=N"),
    "megatron_config": "backend=megatron",
    **dict.fromkeys(["logging_dir", "mlflow_tracking_uri", "comet_project_name"], "report_to"),
    **dict.fromkeys(["rewards", "reward_funcs", "reward_model"], "examples/rollout/grpo.py"),
}
OTHER_VERB_SETTINGS: dict[str, str] = {
    "teacher": "lorry distill",
    **dict.fromkeys(_UNLEARN_SETTINGS, _UNLEARN),
    "beta": f"lorry distill, and of {_UNLEARN}",
    **dict.fromkeys(["forget_split", "retain_split", "data_split", "data_sub_set"], _SPLIT_OWNERS),
    "tasks": "lorry eval; in training they are called eval_tasks",
}
