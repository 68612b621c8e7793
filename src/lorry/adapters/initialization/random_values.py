"""The first values of an adapter that are random numbers alone, a function of the seed and the module's
path.
"""

from __future__ import annotations

import math

import torch

from lorry.adapters.layers.slot import AdapterSlot
from lorry.adapters.seeds import derive_seed
from lorry.adapters.spec import LoraSpec
from lorry.adapters.tensor_parallel.slices import SIDES, Side


@torch.no_grad()
def init_adapter(slot: AdapterSlot, spec: LoraSpec, seed: int, *, embedding: bool) -> None:
    """Fill A and B from a generator seeded by (seed, module path), on the CPU, so device, order and
    neighbours do not matter; nor do ranks that share the module: each draws the whole and cuts.
    """
    generator = torch.Generator().manual_seed(derive_seed("lora", seed, slot.module))
    # an embedding's A is looked up, so there B is the random side (as in PEFT)
    random_side: Side = "B" if embedding else "A"
    zero_side: Side = "A" if embedding else "B"
    shape = slot.whole_shape(random_side)
    kind = spec.init_lora_weights
    if spec.adalora is not None:
        # both, as in PEFT: what makes the low-rank term 0 is E
        for side in SIDES:
            drawn = torch.randn(slot.whole_shape(side), generator=generator) * 0.02
            slot.copy_whole(side, drawn)
        return
    if kind == "gaussian":
        # std 1/r, PEFT's "gaussian"
        drawn = torch.randn(shape, generator=generator) / spec.rank(slot.module)
    elif embedding:
        drawn = torch.randn(shape, generator=generator)
    else:
        # Kaiming-uniform with a = sqrt(5), as nn.Linear and the LoRA reference code:
        # U(-1/sqrt(in), 1/sqrt(in))
        drawn = torch.rand(shape, generator=generator).mul_(2).sub_(1).div_(math.sqrt(shape[1]))
    slot.copy_whole(random_side, drawn)
    if kind is False:
        # False: both random, PEFT's setting for debugging; the first step has gradients on both
        # sides
        drawn = torch.randn(slot.whole_shape(zero_side), generator=generator) * 0.02
        slot.copy_whole(zero_side, drawn)
