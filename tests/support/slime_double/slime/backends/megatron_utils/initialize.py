"""The begin of every training process: groups, seeds, and last of all the custom init hook, before there
is any model.
"""

from __future__ import annotations

from argparse import Namespace

from megatron.core import parallel_state, tensor_parallel
from megatron.training.global_vars import set_args

from slime.utils.misc import load_function


def init(args: Namespace) -> None:
    set_args(args)
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    )
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
    if args.custom_megatron_init_path:
        load_function(args.custom_megatron_init_path)(args)
