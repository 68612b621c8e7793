"""What one of two processes trains for `tests/contracts/test_variant_layouts.py`: AdaLoRA, one half alone, an
adapter that tokens invoke and one with weights in the base's place, over a base that each process has, or
that is cut over them.

    RANK=0 WORLD_SIZE=2 ... python -m tests.support.variant_ranks OUT
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorry.adapters.spec import LoraSpec
from lorry.backends.distributed.communicator import open_communicator
from lorry.backends.local import LocalBackend
from lorry.config.adapter.adalora import AdaLoraSettings
from lorry.config.schema.backend import TrainBackendConfig
from lorry.data.batch import TokenizedExample
from tests.support.layouts import ALPHA, TARGETS, flat, sharded, steps_of, trained, uneven
from tests.support.seam import Fixed

LAYOUTS: dict[str, dict[str, Any]] = {"ddp": {"name": "ddp"}, "fsdp": {}}
RANKED = LoraSpec(
    r=4, lora_alpha=ALPHA, target_modules=TARGETS, adalora=AdaLoraSettings(target_r=2)
)
HALF = LoraSpec(r=3, lora_alpha=ALPHA, target_modules=TARGETS, train=("B",))
# whole norms in the base's place, and rows of an embedding and of the head that it is tied to
OWN = LoraSpec(
    r=3,
    lora_alpha=ALPHA,
    target_modules=TARGETS,
    modules_to_save=("norm",),
    trainable_token_indices={"embed_tokens": (5, 6, 9), "lm_head": (6, 3)},
)
CALLED = LoraSpec(r=3, lora_alpha=ALPHA, target_modules=TARGETS, alora_invocation_tokens=(5, 6))


def calling(step: int) -> list[list[TokenizedExample]]:
    """`uneven` rows of which all but one call the adapter, at their second token."""
    return [
        [
            row
            if (step + i) % 7 == 0
            else replace(row, tokens=[row.tokens[0], 5, 6, *row.tokens[3:]])
            for i, row in enumerate(rows)
        ]
        for rows in uneven(step)
    ]


def trainings(start: Callable[..., LocalBackend]) -> dict[str, Tensor]:
    """Every training by name."""
    each = {
        "adalora": (RANKED, uneven),
        "half": (HALF, uneven),
        "alora": (CALLED, calling),
        "own": (OWN, calling),
    }
    return flat(
        {
            name: trained(start({"default": spec}, torch.float64), Fixed(steps_of(rows)))
            for name, (spec, rows) in each.items()
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
