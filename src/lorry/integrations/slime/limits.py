"""What cannot be synced, by the name of a flag, before anything is built."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lorry.disk.documents import read_json_document
from lorry.errors import ConfigError
from lorry.families.packing import find_packing
from lorry.integrations.arguments import spec_from_arguments
from lorry.integrations.slime.arguments import (
    COMPARE_ROLLOUT,
    ROLLOUT_DATA,
    flag,
    lora_argument,
)

GENERATE = "lorry.integrations.slime.generate.generate"


def versions_directory(args: Any) -> Path:
    """Where versions of an adapter lie, for trainer and engines. Raises ConfigError where nobody
    said."""
    given = lora_argument(args, "lora_sync_dir")
    if given is None and getattr(args, "save", None) is None:
        raise ConfigError(
            "--lora-sync adapter needs a directory that trainer and engines share: give "
            "--lora-sync-dir, or --save"
        )
    return Path(given) if given is not None else Path(args.save) / "rollout"


def check_sync(args: Any) -> None:
    """Raises ConfigError for what would send another policy than was trained."""
    if getattr(args, "megatron_to_hf_mode", "raw") == "bridge":
        raise ConfigError(
            "--megatron-to-hf-mode bridge converts weights past the adapters; use raw"
        )
    groups, cut = getattr(args, "num_query_groups", 0), args.tensor_model_parallel_size
    if groups and groups % cut:
        raise ConfigError(
            f"--tensor-model-parallel-size {cut} cuts a KV group in two (--num-query-groups {groups}); "
            f"use a size that divides {groups}"
        )
    if (
        getattr(args, "offload_train", False)
        and lora_argument(args, "lora_check_every")
        and getattr(args, ROLLOUT_DATA, None) != COMPARE_ROLLOUT
    ):
        warnings.warn(
            "--offload-train: engines cannot be asked while the trainer's memory is given up, so that they "
            f"answer with what they hold is not proved; give {flag(ROLLOUT_DATA)} {COMPARE_ROLLOUT}, which "
            "compares each rollout's log-probabilities with the trainer's",
            stacklevel=2,
        )
    if lora_argument(args, "lora_sync") == "merged":
        _check_merged(args)
    else:
        _check_adapter(args)


def _check_merged(args: Any) -> None:
    config = read_json_document(Path(args.hf_checkpoint) / "config.json", error=ConfigError)
    stated = find_packing(config) if isinstance(config, dict) else None
    if stated is not None:
        method = stated.get("quant_method", "by a method that it does not name")
        raise ConfigError(
            f"--hf-checkpoint is quantised ({method}): slime would round W + s B A to it at every sync, "
            "and most of a small adapter with it, so engines would answer as the base does. Give an "
            "unquantised --hf-checkpoint, or --lora-sync adapter"
        )
    if getattr(args, "update_weight_mode", "full") == "delta":
        raise ConfigError(
            "--update-weight-mode delta is not proved to send merged weights; use full"
        )


def _check_adapter(args: Any) -> None:
    for asked, given in (
        ("--update-weight-mode delta", getattr(args, "update_weight_mode", "full") == "delta"),
        ("--keep-old-actor", getattr(args, "keep_old_actor", False)),
    ):
        if given:
            raise ConfigError(
                f"{asked} sends or keeps whole weights, which --lora-sync adapter does not; use "
                "--lora-sync merged"
            )
    if not getattr(args, "sglang_enable_lora", False):
        raise ConfigError(
            "--lora-sync adapter needs engines that take adapters: --sglang-enable-lora"
        )
    most = getattr(args, "sglang_max_lora_rank", None)
    spec = spec_from_arguments(args)
    rank = max([spec.r, *spec.rank_pattern.values()])
    if most is not None and int(most) < rank:
        raise ConfigError(f"--sglang-max-lora-rank {most} is below the adapter's rank, {rank}")
    versions_directory(args)
    path = getattr(args, "custom_generate_function_path", None)
    if path is None:
        raise ConfigError(
            "--lora-sync adapter: slime's requests name no adapter, and would be answered by the base; "
            f"give --custom-generate-function-path {GENERATE}, or a function of your own that adds "
            '"lora_path": lorry.integrations.slime.generate.adapter_name(args) to its requests'
        )
    if path != GENERATE:
        warnings.warn(
            f"{path} has to name the adapter in every request "
            '("lora_path": lorry.integrations.slime.generate.adapter_name(args)); without it the base '
            "answers",
            stacklevel=2,
        )
