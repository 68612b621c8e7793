"""What ranks say to each other in one call of each, over torch.distributed: a name and a value of every
rank (`RankExchange.exchange`), and the tensors that follow one.

All of it is several collectives in a row, which every rank makes or none: so no signal is raised while
a function of this file runs (`train/monitoring/signals.py`), only behind it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lorry.errors import ContractError, LorryError
from lorry.ranks import Mesh

if TYPE_CHECKING:  # imported where it is used: it is a second of every single-process run
    from torch.distributed import ProcessGroup, Work
    from torch.distributed.device_mesh import DeviceMesh

Axis = Literal["data", "tensor"]  # of the mesh

# Bytes of a frame that fits one all_gather: a signal, a step's losses of a few adapters. Larger ones
# take a second, as long as the longest.
FRAME_BYTES = 4096
LENGTH_BYTES = 8  # of a frame's length, before it


class PeerError(LorryError):
    """Another process of the run cannot be reached any more."""


class RankExchange:
    """Collectives over torch.distributed's default group, which is initialised: gloo for what is on
    the CPU. ``timeout``: seconds until one that a rank does not come to fails. Every rank makes it,
    since it makes the groups of the mesh.
    """

    def __init__(self, mesh: Mesh, timeout: float) -> None:
        self.mesh, self.rank, self.size = mesh, mesh.rank, mesh.size
        self.timeout = timedelta(seconds=timeout)
        self.failures = 0  # of ranks, told to all of them
        self.lost = False  # whether another rank could not be reached
        # of the ranks that share its model; None where it has a whole one
        self.bare: BareCollectives | None = None
        self._device_meshes: dict[str, DeviceMesh] = {}
        with self.explained("groups of ranks"):
            self._groups: dict[Axis, ProcessGroup | None] = {
                axis: self._open_group(axis) for axis in get_args(Axis)
            }

        if (tensor_group := self._groups["tensor"]) is not None:
            self.bare = BareCollectives(tensor_group)

    def set_timeout(self, seconds: float) -> None:
        """How long a collective waits from now on; every rank calls it."""
        import torch.distributed as dist

        self.timeout = timedelta(seconds=seconds)
        meshes = [group for mesh in self._device_meshes.values() for group in mesh.get_all_groups()]
        for group in (dist.group.WORLD, *self._groups.values(), *meshes):
            if group is not None:
                group.set_timeout(self.timeout)

    def exchange(self, what: str, value: Any = None) -> list[Any]:
        """See `Communicator.exchange`."""
        frames = self._frames({"what": what, "value": value})
        failed = [(rank, frame["failed"]) for rank, frame in enumerate(frames) if "failed" in frame]
        if failed:
            self._settle()
            rank, failure = failed[0]
            raise _shared_error(rank, failure)
        places = [frame["what"] for frame in frames]
        if len(set(places)) > 1:
            other = next(rank for rank, place in enumerate(places) if place != places[0])
            raise mark_shared(
                ContractError(
                    f"the processes have come apart: rank 0 is at {places[0]!r}, rank {other} at "
                    f"{places[other]!r}; nothing was updated since they last agreed"
                )
            )
        return [frame["value"] for frame in frames]

    def tell_failure(self, error: BaseException) -> None:
        """Have every rank raise this rank's error at the exchange that it comes to next."""
        self._frames({"failed": _describe(error)})
        self._settle()
        # rank 0 speaks for all; its own error is the one that it prints
        if isinstance(error, LorryError):
            mark_shared(error)

    def add_up(self, what: str, tensor: Tensor, axis: Axis = "data") -> None:
        """See `Communicator.add_up`."""
        shapes = self.exchange(what, [str(tensor.dtype), list(tensor.shape)])
        # of all groups: every rank has to raise
        for ranks in self._ranks_by_group(axis):
            added = [shapes[rank] for rank in ranks]
            if any(shape != added[0] for shape in added):
                raise mark_shared(
                    ContractError(
                        f"{what}: the ranks {ranks} would add up tensors of {added}, which differ"
                    )
                )
        if (group := self.group(axis)) is not None:
            with self.explained(what):
                torch.distributed.all_reduce(tensor, group=group)

    def gather(self, what: str, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """See `Communicator.gather`."""
        payload = save_tensors(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        )
        sizes = self.exchange(what, len(payload))
        return [load_tensors(part) for part in self._gather_bytes(what, payload, sizes)]

    def gather_alike(self, what: str, tensor: Tensor, axis: Axis) -> list[Tensor]:
        """The tensors, of one shape and dtype, of this rank's group of an axis, on their device; every
        rank of the run calls it. Raises what `exchange` raises."""
        self.exchange(what)
        if (group := self.group(axis)) is None:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(group.size())]
        with self.explained(what):
            torch.distributed.all_gather(parts, tensor, group=group)
        return parts

    def group(self, axis: Axis) -> ProcessGroup | None:
        """See `Communicator.group`."""
        return self._groups[axis]

    def device_mesh(self, kind: str) -> DeviceMesh:
        """torch's mesh of this rank's data ranks: shard, or replica x shard, for tensors on a kind of
        device (cpu, cuda). Every rank calls it."""
        if kind not in self._device_meshes:
            self.exchange("groups of ranks")
            with self.explained("groups of ranks"):
                self._device_meshes[kind] = _open_device_mesh(self.mesh, kind, self.timeout)
        return self._device_meshes[kind]

    def _ranks_by_group(self, axis: Axis) -> list[list[int]]:
        mesh = self.mesh
        if axis == "data":
            return [mesh.data_group(t) for t in range(mesh.tensor_size)]
        return [mesh.tensor_group(d) for d in range(mesh.data_size)]

    def _open_group(self, axis: Axis) -> ProcessGroup | None:
        """torch's group of this rank's neighbours on an axis; None where it is alone."""
        import torch.distributed as dist

        groups = self._ranks_by_group(axis)
        if len(groups[0]) == 1:
            return None
        # sums over tensor ranks follow no exchange: a rank that fails speaks to the others elsewhere
        if len(groups) == 1 and axis == "data":
            return dist.group.WORLD
        return dist.new_subgroups_by_enumeration(groups, timeout=self.timeout)[0]

    def _settle(self) -> None:
        """Behind a failure that all ranks have heard: nobody is in a collective any more."""
        self.failures += 1
        if self.bare is not None:
            begun = self._frames({"what": "sums that a rank has left", "value": self.bare.begun()})
            neighbours = self.mesh.tensor_group(self.mesh.data_rank)
            with self.explained("a sum that a rank has left"):
                self.bare.catch_up([begun[rank]["value"] for rank in neighbours])

    def _frames(self, frame: Mapping[str, Any]) -> list[dict[str, Any]]:
        data = json.dumps(frame).encode()
        what = str(frame.get("what", "a failure"))
        head = torch.zeros(FRAME_BYTES, dtype=torch.uint8)
        head[:LENGTH_BYTES] = torch.frombuffer(
            bytearray(len(data).to_bytes(LENGTH_BYTES, "little")), dtype=torch.uint8
        )
        short = data[: FRAME_BYTES - LENGTH_BYTES]
        head[LENGTH_BYTES : LENGTH_BYTES + len(short)] = torch.frombuffer(
            bytearray(short), dtype=torch.uint8
        )
        heads = self._all_gather(what, head)
        sizes = [int.from_bytes(bytes(h[:LENGTH_BYTES].tolist()), "little") for h in heads]
        if max(sizes) <= FRAME_BYTES - LENGTH_BYTES:
            parts = [
                bytes(h[LENGTH_BYTES : LENGTH_BYTES + size].tolist())
                for h, size in zip(heads, sizes, strict=True)
            ]
        else:
            parts = self._gather_bytes(what, data, sizes)
        return [json.loads(part) for part in parts]

    def _gather_bytes(self, what: str, data: bytes, sizes: Sequence[int]) -> list[bytes]:
        """Every rank's bytes, whose numbers are known."""
        padded = torch.zeros(max(*sizes, 1), dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = self._all_gather(what, padded)
        return [part[:size].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]

    def _all_gather(self, what: str, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with self.explained(what):
            torch.distributed.all_gather(parts, tensor)
        return parts

    @contextlib.contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """See `Communicator.explained`."""
        try:
            yield
        except LorryError:
            raise  # ContractError is a RuntimeError
        # DistError, DistBackendError, DistStoreError are RuntimeErrors; gloo's own is a plain one
        except RuntimeError as error:
            self.lost = True
            first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise PeerError(
                f"lost another process of the run at {what!r} ({first}); the last checkpoint, if "
                "any, is whole: the same command with resume_from_checkpoint=auto goes on"
            ) from error


class BareCollectives:
    """Sums and gathers that follow no exchange: those inside a pass of ranks that share a model, begun in
    the same order on each rank of ``group``.

    A rank that fails on its way to one leaves the others in it. They are counted, so that when all have
    heard of the failure each can make up for what it has left: a group that somebody still waits in
    could be used no more, and would keep its process from ending.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._count = 0
        self._last: tuple[Work, Tensor] | None = None
        self._gathers = False  # the last one

    def begin_sum(self, tensor: Tensor) -> Work:
        """Begin to replace a tensor by its sum over the ranks."""
        self._count, self._gathers = self._count + 1, False
        work = torch.distributed.all_reduce(tensor, group=self.group, async_op=True)
        self._last = work, tensor
        return work

    def begin_gather(self, parts: list[Tensor], tensor: Tensor) -> Work:
        """Begin to fill ``parts`` with every rank's tensor."""
        self._count, self._gathers = self._count + 1, True
        work = torch.distributed.all_gather(parts, tensor, group=self.group, async_op=True)
        self._last = work, tensor
        return work

    def begun(self) -> list[Any] | None:
        """What another rank has to know of the last one, as JSON; None where there was none on the
        CPU."""
        if self._last is None or self._last[1].is_cuda:
            return None
        tensor = self._last[1]
        dtype = str(tensor.dtype).removeprefix("torch.")
        return [self._count, self._gathers, dtype, list(tensor.shape)]

    def catch_up(self, begun: Sequence[list[Any] | None]) -> None:
        """Take part, with zeros, in the collective that others have begun and this rank has not, and
        see the last one end. ``begun``: of every rank of the group. A rank waits for each to end
        before it begins the next, so nobody is further than one ahead."""
        told = [each for each in begun if each is not None]
        count, gathers, dtype, shape = max(
            told, key=lambda each: each[0], default=(0, False, "", [])
        )
        if self._count < count:
            zeros = torch.zeros(shape, dtype=getattr(torch, dtype))
            if gathers:
                self.begin_gather([torch.empty_like(zeros) for _ in begun], zeros)
            else:
                self.begin_sum(zeros)
        if self._last is not None:
            self._last[0].wait()


def _open_device_mesh(mesh: Mesh, kind: str, timeout: timedelta) -> DeviceMesh:
    """See `RankExchange.device_mesh`: groups of its own, so that weights on their way and what
    ranks say to each other never meet."""
    from torch.distributed import new_subgroups_by_enumeration
    from torch.distributed.device_mesh import DeviceMesh

    data = torch.tensor([mesh.data_group(t) for t in range(mesh.tensor_size)])
    data = data.view(mesh.tensor_size, mesh.replicas, mesh.shards)
    rows = {"shard": data.flatten(0, 1), "replica": data.transpose(1, 2).flatten(0, 1)}
    groups = {
        axis: new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)[0]
        for axis, ranks in rows.items()
        if axis == "shard" or mesh.replicas > 1
    }
    if mesh.replicas == 1:
        return DeviceMesh.from_group(groups["shard"], kind, mesh_dim_names=("shard",))
    return DeviceMesh.from_group(
        [groups["replica"], groups["shard"]],
        kind,
        mesh=data[mesh.tensor_rank],
        mesh_dim_names=("replica", "shard"),
    )


def is_shared(error: BaseException) -> bool:
    """Whether every rank has this error: then rank 0 alone tells of it."""
    return bool(getattr(error, "shared", False))


def mark_shared(error: LorryError) -> LorryError:
    error.shared = True
    return error


def _describe(error: BaseException) -> dict[str, Any]:
    """An error as JSON: of ours by its class, of others by their words."""
    if isinstance(error, LorryError):
        number = error.contract if isinstance(error, ContractError) else None
        return {"kind": type(error).__name__, "text": str(error), "contract": number}
    return {"kind": "", "text": f"{type(error).__name__}: {error}", "contract": None}


def _shared_error(rank: int, failure: Mapping[str, Any]) -> LorryError:
    """The error of another rank, of its class (exit code and page of the manual are the same) and with
    its words.
    """
    text = f"rank {rank}: {failure['text']}"
    kind = _error_classes().get(failure["kind"], LorryError)
    # a class of its own: some of ours (DiskError) make their words of fields that did not travel
    error: LorryError = type(kind.__name__, (kind,), {"__str__": lambda self: text})()
    if isinstance(error, ContractError):
        error.contract = failure["contract"]
    return mark_shared(error)


def _error_classes() -> dict[str, type[LorryError]]:
    known, new = dict[str, type[LorryError]](), [LorryError]
    while new:
        known |= {kind.__name__: kind for kind in reversed(new)}
        new = [below for kind in new for below in kind.__subclasses__()]
    return known
