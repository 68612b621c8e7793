"""The ranks of a run as threads of one process: the collectives of `backends.distributed` in a hundredth
of the time it takes to start processes.

    on_mesh(2, 2, lambda communicator, ranks: ...)    # 2 data ranks x 2 tensor ranks, rank by rank
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from lorry.errors import ContractError
from lorry.ranks import Mesh

Result = TypeVar("Result")


class Meeting:
    """Where the ranks of a group put what they have, and wait for the others."""

    def __init__(self, size: int) -> None:
        self.barrier, self.things = threading.Barrier(size), [None] * size

    def exchange(self, place: int, thing: Any) -> list[Any]:
        """Everybody's, in order."""
        self.things[place] = thing
        self.barrier.wait(timeout=60)
        things = list(self.things)
        # nobody puts the next before all have read
        self.barrier.wait(timeout=60)
        return things


@dataclass
class ThreadRanks:
    """`TensorRanks`; ``sums`` and ``gathers``: what went over the wire, in order."""

    rank: int
    size: int
    meeting: Meeting
    sums: list[Tensor] = field(default_factory=list)
    gathers: list[Tensor] = field(default_factory=list)

    def add_up(self, tensor: Tensor) -> Tensor:
        self.sums.append(tensor.detach().clone())
        with torch.no_grad():
            return tensor.copy_(torch.stack(self._exchange(tensor)).sum(0))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        self.gathers.append(tensor.detach().clone())
        return self._exchange(tensor)

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        parts: list[Tensor] = self.meeting.exchange(self.rank, tensor.detach().clone())
        shapes = {(part.shape, part.dtype) for part in parts}
        assert len(shapes) == 1, shapes
        return parts

    def __deepcopy__(self, memo: object) -> ThreadRanks:
        return self


@dataclass
class ThreadCommunicator:
    """`Communicator` without shared failures: a thread that raises ends the others' waiting."""

    mesh: Mesh
    world: Meeting
    along: Mapping[str, tuple[int, Meeting]]

    @property
    def rank(self) -> int:
        return self.mesh.rank

    @property
    def size(self) -> int:
        return self.mesh.size

    def exchange(self, what: str, value: Any = None) -> list[Any]:
        frames = self.world.exchange(self.rank, (what, json.dumps(value)))
        if len({name for name, _ in frames}) > 1:
            raise ContractError(f"the processes have come apart: {[name for name, _ in frames]}")
        return [json.loads(text) for _, text in frames]

    def on_main(self, what: str, function: Callable[[], Any]) -> Any:
        return self.exchange(what, function() if self.rank == 0 else None)[0]

    def add_up(self, what: str, tensor: Tensor, axis: str = "data") -> None:
        self.exchange(what)
        place, meeting = self.along[axis]
        parts = meeting.exchange(place, tensor.detach().clone())
        with torch.no_grad():
            tensor.copy_(torch.stack(parts).sum(0))

    def gather(self, what: str, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        self.exchange(what)
        mine = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        return self.world.exchange(self.rank, mine)

    def group(self, axis: str) -> None:
        return None

    def together(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def explained(self, what: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def sharing_failures(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def on_mesh(
    data: int, tensor: int, work: Callable[[ThreadCommunicator, ThreadRanks | None], Result]
) -> list[Result]:
    """What ``work`` gives each rank; its second argument: the ranks that share a model, None where
    there is one. Raises what one of them raised."""
    world = Meeting(data * tensor)
    shared, rows = ([Meeting(n) for _ in range(of)] for n, of in ((tensor, data), (data, tensor)))
    meetings = [world, *shared, *rows]

    def run(rank: int) -> Result:
        mesh = Mesh(rank, data, 1, tensor)
        group = shared[mesh.data_rank]
        along = {
            "data": (mesh.data_rank, rows[mesh.tensor_rank]),
            "tensor": (mesh.tensor_rank, group),
        }
        ranks = None if tensor == 1 else ThreadRanks(mesh.tensor_rank, tensor, group)
        ended = False
        try:
            result = work(ThreadCommunicator(mesh, world, along), ranks)
            ended = True
            return result
        finally:
            if not ended:
                # nobody waits for one that is gone
                for meeting in meetings:
                    meeting.barrier.abort()

    with ThreadPoolExecutor(data * tensor) as pool:
        threads = [pool.submit(run, rank) for rank in range(data * tensor)]
    _raise_first([error for thread in threads if (error := thread.exception()) is not None])
    return [thread.result() for thread in threads]


def on_ranks(size: int, work: Callable[[ThreadRanks], Result]) -> list[Result]:
    """`on_mesh` of the ranks that share one model."""

    def run(communicator: ThreadCommunicator, ranks: ThreadRanks | None) -> Result:
        assert ranks is not None
        return work(ranks)

    return on_mesh(1, size, run)


def _raise_first(errors: Sequence[BaseException]) -> None:
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
