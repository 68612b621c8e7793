"""What one rank knows, for all of slime's ranks."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def from_first(value: Any) -> Any:
    """Rank 0's value on every rank; all of them call this."""
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def is_first() -> bool:
    """Whether this is rank 0, which talks to slime's engines and to people."""
    return dist.get_rank() == 0


def say(text: str) -> None:
    """A line of the log, once for all ranks."""
    if is_first():
        print(f"lorry: {text}", flush=True)
