"""What one of two processes trains for `tests/contracts/test_dora_layouts.py`: DoRA adapters over a base that
ranks share (tensor parallel), or that is cut over them.

    RANK=0 WORLD_SIZE=2 ... python -m tests.support.dora_ranks OUT
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorry.adapters.spec import LoraSpec
from lorry.backends.distributed.communicator import open_communicator
from lorry.backends.local import LocalBackend
from lorry.config.schema.backend import TrainBackendConfig
from tests.support.layouts import ALPHA, TARGETS, flat, mixed, sharded, steps_of, trained, uneven
from tests.support.seam import Fixed

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"name": "ddp", "tensor_parallel": 2},
    "fsdp": {},
}
WHOLE = LoraSpec(r=3, lora_alpha=ALPHA, target_modules="all-linear", use_dora=True)
ENDS = LoraSpec(r=2, target_modules=(*TARGETS, "embed", "lm_head"), use_dora=True, lora_dropout=0.2)
PLAIN = LoraSpec(r=2, target_modules=("q_proj",))


def trainings(start: Callable[..., LocalBackend]) -> dict[str, Tensor]:
    """Every training by name."""
    plain = Fixed(steps_of(uneven))
    two = {"dora": ENDS, "plain": PLAIN}
    return flat(
        {
            "float32": trained(start({"default": WHOLE}), plain),
            "float64": trained(start({"default": WHOLE}, torch.float64), plain),
            "mixed": trained(start(two), Fixed(steps_of(mixed), list(two))),
            # with biases, and q, k and v of one matrix
            "gpt_neox": trained(start({"default": WHOLE}, torch.float64, family="gpt_neox"), plain),
        }
    )


def main(out: Path) -> None:
    torch.set_num_threads(1)
    communicator = open_communicator(TrainBackendConfig(name="ddp", timeout=300.0))
    tensors = {
        f"{layout}/{name}": tensor
        for layout, settings in LAYOUTS.items()
        for name, tensor in trainings(sharded(out, **settings)[1]).items()
    }
    save_file(tensors, out / f"rank-{communicator.rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
