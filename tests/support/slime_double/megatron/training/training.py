"""Megatron's order: every chunk from the provider, then its dtype, then DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config
from megatron.training.global_vars import get_args


def get_model(provider: Callable[..., Any], model_type: Any = None) -> list[Any]:
    args = get_args()
    chunks = [
        provider(
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
    ]
    for chunk in chunks:
        for parameter in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    config = get_model_config(chunks[0])
    if args.bf16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    config.finalize_model_grads_func = finalize_model_grads
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=False,
        overlap_grad_reduce=False,
        use_distributed_optimizer=args.use_distributed_optimizer,
    )
    return [DistributedDataParallel(config, settings, chunk) for chunk in chunks]
