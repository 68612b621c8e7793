"""slime's command line: Megatron's flags and its own in one parser, which drops what it does not know
without a word; then the YAML of `--custom-config-path`, every key of which becomes an attribute.

A few flags of the hundreds, those that the training actor reads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

AddArguments = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]
NUMBERS: dict[str, Any] = {
    # Megatron's
    "num-layers": None,
    "hidden-size": None,
    "ffn-hidden-size": None,
    "num-attention-heads": None,
    "num-query-groups": None,
    "kv-channels": None,
    "vocab-size": None,
    "make-vocab-size-divisible-by": 128,
    "rotary-base": 10000,
    "seq-length": 4096,
    "micro-batch-size": 1,
    "global-batch-size": 1,
    "tensor-model-parallel-size": 1,
    "pipeline-model-parallel-size": 1,
    "seed": 1234,
    "num-experts": None,
    "mtp-num-layers": None,
    "recompute-num-layers": None,
    # slime's
    "num-rollout": None,
    "rollout-batch-size": 1,
    "rollout-num-gpus-per-engine": 1,
    "actor-num-nodes": 1,
    "actor-num-gpus-per-node": 1,
    "ref-update-interval": None,
    "save-interval": None,
    "update-weight-buffer-size": 512 * 1024**2,
    "update-weights-interval": 1,
}
FLOATS: dict[str, Any] = {
    "norm-epsilon": 1e-5,
    "attention-dropout": 0.1,
    "hidden-dropout": 0.1,
    "lr": None,
    "clip-grad": 1.0,
    "weight-decay": 0.01,
    "kl-coef": 0.0,
    "kl-loss-coef": 0.0,
    "rollout-temperature": 1.0,
}
SWITCHES = (
    "group-query-attention",
    "swiglu",
    "add-qkv-bias",
    "qk-layernorm",
    "untie-embeddings-and-output-weights",
    "sequence-parallel",
    "multi-latent-attention",
    "use-cpu-initialization",
    "use-kl-loss",
    "use-opd",
    "colocate",
    "keep-old-actor",
    "offload-train",
    "debug-train-only",
    "finetune",
    "no-load-optim",
    "no-load-rng",
    "update-weight-disk-keep-files",
)
TEXTS: dict[str, Any] = {
    "normalization": "LayerNorm",
    "position-embedding-type": "learned_absolute",
    "transformer-impl": "transformer_engine",
    "optimizer": "adam",
    "recompute-granularity": None,
    "recompute-method": None,
    "load": None,
    "save": None,
    "hf-checkpoint": None,
    "ref-load": None,
    "save-hf": None,
    "model-name": None,
    "opd-type": None,
    "opd-teacher-load": None,
    "advantage-estimator": "grpo",
    "update-weight-mode": "full",
    "update-weight-transport": "nccl",
    "update-weight-disk-dir": None,
    "custom-config-path": None,
    "custom-model-provider-path": None,
    "custom-megatron-init-path": None,
    "custom-megatron-before-log-prob-hook-path": None,
    "custom-megatron-before-train-step-hook-path": None,
    "rollout-data-postprocess-path": None,
}
# of the driver's loop, which the double has no more of
RAN: list[argparse.Namespace] = []


def parse_args(add_custom_arguments: AddArguments | None = None) -> argparse.Namespace:
    """The namespace of `sys.argv`. Unknown flags parse to nothing."""
    parser = argparse.ArgumentParser(description="slime (a double)", allow_abbrev=False)
    if add_custom_arguments is not None:
        parser = add_custom_arguments(parser)
    for name, default in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in FLOATS.items():
        parser.add_argument(f"--{name}", type=float, default=default)
    for name, default in TEXTS.items():
        parser.add_argument(f"--{name}", default=default)
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--disable-bias-linear", action="store_false", dest="add_bias_linear")
    parser.add_argument("--spec", nargs="*", default=None)
    parser.add_argument("--only-train-params-name-list", nargs="*", default=None)
    parser.add_argument("--freeze-params-name-list", nargs="*", default=None)
    args, _ = parser.parse_known_args()
    return _validate(args)


def _validate(args: argparse.Namespace) -> argparse.Namespace:
    args.bf16, args.fp16 = True, False
    args.fp8 = None
    args.use_distributed_optimizer = True
    args.max_position_embeddings = args.seq_length
    if not args.group_query_attention:
        args.num_query_groups = args.num_attention_heads
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    args.padded_vocab_size = -(-args.vocab_size // multiple) * multiple
    args.use_critic = args.advantage_estimator == "ppo"
    _resolve_load(args)
    if args.custom_config_path:
        given = yaml.safe_load(Path(args.custom_config_path).read_text()) or {}
        for name, value in given.items():
            setattr(args, name, value)
    if args.only_train_params_name_list and args.freeze_params_name_list:
        raise ValueError("only one of --only-train-params-name-list and --freeze-params-name-list")
    return args


def _resolve_load(args: argparse.Namespace) -> None:
    """Where there is no checkpoint of Megatron's to go on from, weights alone are loaded: from a Hugging
    Face directory, or else from the reference."""
    load = Path(args.load) if args.load else None
    if load is not None and (load / "latest_checkpointed_iteration.txt").exists():
        return
    args.finetune = args.no_load_optim = args.no_load_rng = True
    if load is None or not (load / "config.json").exists():
        args.load = args.ref_load
