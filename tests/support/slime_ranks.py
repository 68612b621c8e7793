"""What two processes run of a training actor of slime's with the plugin
(`tests/integrations/slime/test_slime_actor.py`). megatron-core has to be installed, and slime on PYTHONPATH.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m tests.support.slime_ranks FOLDER

FOLDER/model.json names a Hugging Face directory, beside which lies the adapter `-canonical`. Writes the
scores of two rollouts into FOLDER/LAYOUT-RANK.safetensors.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lorry.integrations.slime.arguments import add_lora_arguments
from tests.support.slime_runs import (
    HOOKS,
    INSTALL,
    PROVIDER,
    flags,
    parse,
    start_actor,
    training_process,
)

LORA = ("--use-lora", "--lora-r", "3", "--lora-alpha", "6", "--lora-target-modules", "all-linear")
TOKENS = torch.randint(0, 27, (3, 8), generator=torch.Generator().manual_seed(1))
LAYOUTS: dict[str, dict[str, int]] = {"tp2": {"tp": 2}, "pp2": {"pp": 2}}


def arguments(model: Path, *words: Any, **layout: int) -> Namespace:
    """slime's namespace with the plugin's four functions."""
    plugin = (*PROVIDER, *INSTALL, *HOOKS)
    given = (*flags(model, **layout), *LORA, *plugin, *words)
    return parse(*given, add_custom_arguments=add_lora_arguments)


def main(folder: Path) -> None:
    model = Path(json.loads((folder / "model.json").read_text()))
    start = ("--lora-adapter-path", f"{model}-canonical")
    torch.distributed.init_process_group("gloo")
    for layout, sizes in LAYOUTS.items():
        with training_process():
            rank = torch.distributed.get_rank()
            args = arguments(model, "--use-kl-loss", *start, **sizes)
            actor = start_actor(args, with_ref=True)
            first = {"tokens": TOKENS, "advantages": torch.ones(3, 7)}
            actor.train(0, first)
            after = {"tokens": TOKENS, "advantages": torch.ones(3, 7)}
            actor.train(1, after)
            found = first | {f"after/{name}": tensor for name, tensor in after.items()}
            save_file(
                {n: t.contiguous().clone() for n, t in found.items()},
                folder / f"{layout}-{rank}.safetensors",
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
