"""Tensors of which each rank has some rows, made whole one at a time when they are read: masters and
moments of weights that train, and the weights themselves, on their way into a file.

Nobody holds more than its share and one tensor. To read one is a pass like one through the layers
(`passes.py`): all ranks read it, or rank 0 alone in `on_main`, and the others follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorry.backends.distributed.passes import PassKind, PassSchedule
from lorry.backends.protocol import TensorsWhenRead

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class GatheredTensors(TensorsWhenRead):
    """``shares``: {name: (shape of the whole, this rank's rows)}, the same names on every rank of
    ``group``, among which FSDP2 cuts them. All ranks make it together and keep it until what is read
    has been read.
    """

    def __init__(
        self,
        shares: Mapping[str, tuple[torch.Size, Tensor]],
        group: ProcessGroup,
        schedule: PassSchedule,
        explained: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self.shares, self.group, self.schedule = dict(shares), group, schedule
        self.explained, self.names = explained, list(shares)
        self.number = schedule.join(self)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shares:
            raise KeyError(name)
        place = self.names.index(name)
        self.schedule.begin(self.number, "gather", place)
        return self._gather(place)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def like(self, name: str) -> Tensor:
        """See `TensorsWhenRead.like`."""
        shape, share = self.shares[name]
        return torch.empty(shape, dtype=share.dtype, device="meta")

    def walk_along(self, kind: PassKind, number: int) -> None:
        """Give other ranks the rows of a tensor that they read."""
        self._gather(number)

    def finish_pass(self) -> None:
        """A tensor is gathered in one piece."""

    def release(self) -> None:
        """Nothing is kept."""

    @torch.no_grad()
    def _gather(self, place: int) -> Tensor:
        shape, share = self.shares[self.names[place]]
        ranks = self.group.size()
        # the last ranks may have fewer rows, or none
        filled = share.new_zeros(-(-shape[0] // ranks), *shape[1:])
        filled[: len(share)] = share
        parts = share.new_empty(ranks, *filled.shape)
        with self.explained(f"values of {self.names[place]}"):
            torch.distributed.all_gather(list(parts.unbind()), filled, group=self.group)
        return parts.flatten(0, 1)[: shape[0]]
