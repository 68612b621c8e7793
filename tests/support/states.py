"""States and metas for checkpoint tests: every bit pattern, and an equality that compares bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DTYPES = [
    getattr(torch, n)
    for n in "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()  # noqa: SIM905
]


def bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit pattern, NaNs and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def state(version: int) -> dict[str, Tensor]:
    return {
        "adapter/default/model.layers.0.self_attn.q_proj.lora_A": bits(
            (4, 6), torch.float32, version
        ),
        "adam_m/default": bits((3, 4, 2), torch.bfloat16, version).transpose(0, 2),
        "rng/cpu": bits((16,), torch.uint8, version),
        "steps": torch.tensor(version),
        "unused": torch.empty(0, 4),
    }


def meta(version: int, **more: Any) -> dict[str, Any]:
    return {
        "task": {"version": version, "loss": 0.1 + version},
        "config": {},
        "digests": {},
        "environment": {},
        **more,
    }


STATES = {version: state(version) for version in range(10)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names, dtypes, shapes and bits."""
    raw = lambda t: t.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)  # noqa: E731
    return a.keys() == b.keys() and all(
        (a[n].dtype, a[n].shape) == (b[n].dtype, b[n].shape) and torch.equal(raw(a[n]), raw(b[n]))
        for n in a
    )
