"""`--load`: a checkpoint of Megatron's, or a Hugging Face directory, which has no adapters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.training.checkpointing import load_checkpoint as _load_checkpoint_megatron
from megatron.training.checkpointing import save_checkpoint
from megatron.training.global_vars import get_args

__all__ = ["load_checkpoint", "save_checkpoint"]


def load_checkpoint(
    ddp_model: Sequence[Any],
    optimizer: Any,
    opt_param_scheduler: Any,
    checkpointing_context: Any,
    skip_load_to_model_and_opt: bool = False,
) -> tuple[int, int]:
    args = get_args()
    path = Path(args.load)
    assert path.exists(), f"{args.load=} does not exist"
    if (path / "latest_checkpointed_iteration.txt").is_file() or re.fullmatch(
        r"iter_\d{7}", path.name
    ):
        return _load_checkpoint_megatron(ddp_model, optimizer, opt_param_scheduler)
    from slime.backends.megatron_utils.hf_to_megatron import load_hf_weights

    load_hf_weights(args, ddp_model, args.load)
    if args.bf16 and optimizer is not None:
        optimizer.reload_model_params()
    return 0, 0
