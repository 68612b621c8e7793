"""The group of all ranks on the CPU."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

GLOO_GROUP: Any = None


def init_gloo_group() -> Any:
    global GLOO_GROUP
    if GLOO_GROUP is None:
        GLOO_GROUP = dist.new_group(backend="gloo")
    return GLOO_GROUP


def set_gloo_group(group: Any) -> None:
    global GLOO_GROUP
    GLOO_GROUP = group


def get_gloo_group() -> Any:
    if GLOO_GROUP is None:
        raise RuntimeError("init_gloo_group() comes first")
    return GLOO_GROUP
