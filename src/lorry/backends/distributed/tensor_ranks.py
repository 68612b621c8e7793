"""The ranks that share a model's matrices (`backend.tensor_parallel`), over torch.distributed.

Inside a forward or backward pass there is no room for `Communicator.exchange`: these calls are the
bare collectives. Tensor ranks run the same tokens and see the same bits, so what one of them raises
between two of these calls all raise; one that fails alone (its memory, its machine) is noticed by the
others after `backend.timeout` seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorry.adapters.tensor_parallel.ranks import TensorRanks
from lorry.backends.distributed.communicator import Axis, Communicator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class ProcessRanks:
    """`TensorRanks` of processes: ``group`` are the tensor ranks of one data rank, or the data ranks of
    a tensor rank (``axis``)."""

    communicator: Communicator
    group: ProcessGroup
    rank: int
    size: int
    axis: Axis = "tensor"

    def add_up(self, tensor: Tensor) -> Tensor:
        """See `TensorRanks.add_up`."""
        with self.communicator.explained(f"a sum over {self.axis} ranks"):
            torch.distributed.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """See `TensorRanks.gather`."""
        what = f"every {self.axis} rank's part"
        if self.axis == "data":
            # these do not run alike: one may have failed on its way here
            self.communicator.exchange(what)
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with self.communicator.explained(what):
            torch.distributed.all_gather(parts, tensor, group=self.group)
        return parts

    def __deepcopy__(self, memo: object) -> ProcessRanks:
        """Itself: a copy of a model has the same neighbours."""
        return self


def tensor_ranks(communicator: Communicator) -> TensorRanks | None:
    """The ranks that share this one's model; None where it has a whole one."""
    mesh, group = communicator.mesh, communicator.group("tensor")
    if mesh.tensor_size == 1 or group is None:
        return None
    return ProcessRanks(communicator, group, mesh.tensor_rank, mesh.tensor_size)


def data_ranks(communicator: Communicator) -> TensorRanks | None:
    """The ranks that train the same values on other rows; None where there is one."""
    mesh, group = communicator.mesh, communicator.group("data")
    if mesh.data_size == 1 or group is None:
        return None
    return ProcessRanks(communicator, group, mesh.data_rank, mesh.data_size, "data")
