"""What `tests/integrations/test_deepspeed.py` runs on two processes: adapters under ZeRO-1 and -2.

    RANK=0 WORLD_SIZE=2 ... python -m tests.support.deepspeed_loops OUT

writes OUT/zero-STAGE.safetensors, the values after the last step, and the adapter OUT/zero-STAGE.
"""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorry.adapters.attach import get_bank
from lorry.integrations import trainers
from tests.support.torch_loops import (
    PARAMETERS,
    RANKS,
    RATE,
    ROWS,
    STEPS,
    base,
    loss_of,
    rows,
    spec,
)

STAGES = (1, 2)
ACCUMULATE = 2


def trained(stage: int, rank: int, out: Path) -> dict[str, Tensor]:
    """Values after the steps of `torch_loops.trained`, and logits around a merge."""
    model = PARAMETERS(base(), spec())
    optimizer = torch.optim.AdamW(trainers.get_lora_parameters(model), lr=RATE, weight_decay=0.0)
    settings = {
        "train_micro_batch_size_per_gpu": ROWS // RANKS // ACCUMULATE,
        "gradient_accumulation_steps": ACCUMULATE,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    for step in range(STEPS):
        for part in rows(step)[rank::RANKS].chunk(ACCUMULATE):
            engine.backward(loss_of(engine, part))
            trainers.synchronise(engine)
            engine.step()
    trainers.save_lora(engine, out / f"zero-{stage}")
    with torch.no_grad():
        result = {"logits": engine(rows(99)).logits}
        trainers.merge_lora_weights(engine)
        result["merged"] = engine(rows(99)).logits
        trainers.unmerge_lora_weights(engine)
        result["unmerged"] = engine(rows(99)).logits
    tensors = get_bank(model)["default"].tensors()
    return result | {f"value/{name}": value.clone() for name, value in tensors.items()}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    # a collective in C++ that would be compiled first; gloo has the same
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    for stage in STAGES:
        result = trained(stage, rank, out)
        if not rank:
            save_file(result, out / f"zero-{stage}.safetensors")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
