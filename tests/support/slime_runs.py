"""slime for tests: where it is found, its command line for a tiny model, and one of its training
processes on the CPU. megatron-core has to be installed.

    add_paths()                                   # the double, or LORRY_SLIME=DIR and LORRY_MEGATRON=DIR
    args = parse(*flags(model), "--use-lora", ...)
    with training_process():
        actor = start_actor(args)
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.support.slime_checkout import mock_absent_packages, slime_on_cpu

DOUBLE = Path(__file__).parent / "slime_double"
REAL = {name: os.environ.get(name) for name in ("LORRY_SLIME", "LORRY_MEGATRON")}
IS_REAL = bool(REAL["LORRY_SLIME"])
PLUGIN = "lorry.integrations.slime"
PROVIDER = ("--custom-model-provider-path", f"{PLUGIN}.model_provider")
INSTALL = ("--custom-megatron-init-path", f"{PLUGIN}.install")
HOOKS = (
    *("--custom-megatron-before-log-prob-hook-path", f"{PLUGIN}.before_log_prob"),
    *("--custom-megatron-before-train-step-hook-path", f"{PLUGIN}.before_train_step"),
)


def slime_paths() -> list[str]:
    """What has to lie on sys.path. The double's `megatron/training` joins megatron-core's wheel, as
    `megatron` is a namespace package."""
    if IS_REAL:
        return [place for place in REAL.values() if place]
    # its engines answer at once, which the real ray, where it is installed, would not take
    return [str(DOUBLE), str(DOUBLE / "without_ray")]


def add_paths() -> None:
    """Make `slime`, `train` and `megatron.training` importable in this process."""
    if IS_REAL:
        mock_absent_packages()
    sys.path[:0] = [place for place in slime_paths() if place not in sys.path]


def layer_spec(args: Namespace, config: Any, vp_stage: int | None) -> Any:
    """Layers with their norms inside, as Transformer Engine has them, whose names alone slime's
    converters know: the target of `--spec`."""
    from tests.support.megatron_gradients import block_spec, read_config

    return block_spec(read_config(args.hf_checkpoint), config, True, vp_stage)


def flags(model: Path, tp: int = 1, pp: int = 1) -> list[str]:
    """slime's flags for a Hugging Face directory."""
    from tests.support.megatron_gradients import read_config

    hf = read_config(model)
    words: dict[str, Any] = {
        "num-layers": hf["num_hidden_layers"],
        "hidden-size": hf["hidden_size"],
        "ffn-hidden-size": hf["intermediate_size"],
        "num-attention-heads": hf["num_attention_heads"],
        "num-query-groups": hf["num_key_value_heads"],
        "kv-channels": hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        "vocab-size": hf["vocab_size"],
        "make-vocab-size-divisible-by": 2,
        "rotary-base": int(hf["rope_parameters"]["rope_theta"]),
        "norm-epsilon": hf["rms_norm_eps"],
        "normalization": "RMSNorm",
        "position-embedding-type": "rope",
        "transformer-impl": "local",
        "seq-length": 16,
        "attention-dropout": 0,
        "hidden-dropout": 0,
        "micro-batch-size": 1,
        "global-batch-size": 1,
        "tensor-model-parallel-size": tp,
        "pipeline-model-parallel-size": pp,
        "actor-num-gpus-per-node": tp * pp,
        "lr": 1e-2,
        "clip-grad": 0,
        "num-rollout": 1,
        "hf-checkpoint": model,
        "load": model,
        "ref-load": model,
    }
    switches = ["group-query-attention", "swiglu", "disable-bias-linear", "debug-train-only"]
    switches += ["use-cpu-initialization"]
    switches += ["untie-embeddings-and-output-weights"] * (not hf["tie_word_embeddings"])
    switches += ["add-qkv-bias"] * (hf["model_type"] == "qwen2")
    switches += ["qk-layernorm"] * (hf["model_type"] == "qwen3")
    given = [text for name, value in words.items() for text in (f"--{name}", str(value))]
    return [*given, *(f"--{name}" for name in switches), "--spec", __name__, "layer_spec"]


def parse(*words: Any, add_custom_arguments: Callable[..., Any] | None = None) -> Namespace:
    """slime's namespace of a command line, in what a CPU can do."""
    from slime.utils.arguments import parse_args

    with mock.patch.object(sys, "argv", ["train.py", *map(str, words)]):
        args = parse_args(add_custom_arguments)
    args.bf16, args.use_distributed_optimizer = False, False
    return args


@contextmanager
def training_process() -> Iterator[None]:
    """A process of slime's: Megatron on the CPU, and groups that are gone afterwards. The only rank, or
    the one that RANK and WORLD_SIZE say."""
    from megatron.core import parallel_state
    from slime.utils.distributed_utils import init_gloo_group, set_gloo_group

    from tests.support.cuda_shim import cuda_on_cpu

    started = not dist.is_initialized()
    if started:
        store = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0}
        dist.init_process_group("gloo", **store, **({"world_size": 1} if store else {}))
    torch.set_num_threads(1)
    try:
        with cuda_on_cpu(), slime_on_cpu() if IS_REAL else nullcontext():
            init_gloo_group()
            yield
    finally:
        set_gloo_group(None)
        parallel_state.destroy_model_parallel()
        forget_slime()
        if started:
            dist.destroy_process_group()


def process_ends() -> None:
    """Let go of what a training process of slime's holds, so that another one can start in its place."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def forget_slime() -> None:
    """Its modules are imported anew by who asks next: what a plugin has bound in them is gone."""
    for name in [n for n in sys.modules if n == "slime" or n.startswith("slime.")]:
        del sys.modules[name]


def start_actor(args: Namespace, role: str = "actor", **options: Any) -> Any:
    """slime's training actor after `init`; the double's alone runs without Ray."""
    from slime.backends.megatron_utils.actor import MegatronTrainRayActor

    actor = MegatronTrainRayActor()
    actor.init(args, role, **options)
    return actor
