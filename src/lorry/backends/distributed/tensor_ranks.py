"""The ranks that share a model's matrices (`backend.tensor_parallel`), and those that train the same
values on other rows, over torch.distributed.

Inside a forward or backward pass there is no room for `Communicator.exchange`: these calls are bare
collectives. Tensor ranks run the same tokens and see the same bits, so what one of them raises
between two of these calls mostly all raise. One that fails alone (a signal, its disk, its memory) never
comes to the next: who waits there longer than a sum takes looks for its word in the store, and raises
the same error.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorry.adapters.tensor_parallel.ranks import TensorRanks
from lorry.backends.distributed.communicator import Communicator, TorchCommunicator
from lorry.backends.distributed.exchange import BareCollectives

if TYPE_CHECKING:
    from torch.distributed import Work

# of waiting in a collective, until a rank looks whether another one has failed, and again each time
LOOK_SECONDS = 0.25


@dataclass(frozen=True, eq=False)
class ProcessRanks:
    """`TensorRanks` of processes: ``collectives`` are of the tensor ranks of one data rank."""

    communicator: TorchCommunicator
    collectives: BareCollectives
    rank: int
    size: int

    def add_up(self, tensor: Tensor) -> Tensor:
        """See `TensorRanks.add_up`."""
        with self.communicator.explained("a sum over tensor ranks"):
            self._await(self.collectives.begin_sum(tensor), tensor)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """See `TensorRanks.gather`."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with self.communicator.explained("every tensor rank's part"):
            self._await(self.collectives.begin_gather(parts, tensor), tensor)
        return parts

    def _await(self, work: Work, tensor: Tensor) -> None:
        """Wait for a collective. Raises what `TorchCommunicator.hear_failure` raises."""
        # of a GPU's the CPU does not wait at all, and a wait with a limit would make it
        if tensor.is_cuda:
            work.wait()
            return
        while not _has_ended(work):
            self.communicator.hear_failure()

    def __deepcopy__(self, memo: object) -> ProcessRanks:
        """Itself: a copy of a model has the same neighbours."""
        return self


@dataclass(frozen=True, eq=False)
class DataRanks:
    """`TensorRanks` of the data ranks of one tensor rank. They do not run alike, so every call of theirs
    is agreed on."""

    communicator: TorchCommunicator
    rank: int
    size: int

    def add_up(self, tensor: Tensor) -> Tensor:
        """See `TensorRanks.add_up`."""
        self.communicator.add_up("a sum over data ranks", tensor)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """See `TensorRanks.gather`."""
        return self.communicator.gather_alike("every data rank's part", tensor, "data")


def _has_ended(work: Work) -> bool:
    """Whether a collective ends within `LOOK_SECONDS`. Raises what it ended with."""
    try:
        work.wait(timedelta(seconds=LOOK_SECONDS))
    except RuntimeError:
        if not work.is_completed():
            return False  # the wait has ended
        work.wait()
    return True


def tensor_ranks(communicator: Communicator) -> TensorRanks | None:
    """The ranks that share this one's model; None where it has a whole one."""
    if not isinstance(communicator, TorchCommunicator) or communicator.bare is None:
        return None
    mesh = communicator.mesh
    return ProcessRanks(communicator, communicator.bare, mesh.tensor_rank, mesh.tensor_size)


def data_ranks(communicator: Communicator) -> TensorRanks | None:
    """The ranks that train the same values on other rows; None where there is one."""
    mesh = communicator.mesh
    if mesh.data_size == 1 or not isinstance(communicator, TorchCommunicator):
        return None
    return DataRanks(communicator, mesh.data_rank, mesh.data_size)
