"""Where gathered weights lie in a CPU's memory, for FSDP2 (`sharded.py`).

FSDP2 takes memory for whole weights when it gathers them and frees it when it lets them go, sixty
times in a step of thirty layers; gloo takes as much again for its all-gather, in threads with heaps
of their own. On a GPU a caching allocator makes nothing of that. A CPU's heap is left full of holes
that nothing else fits into, and a rank with half of a base held more than one with all of it.

So every weight has a place of its own, as large as the whole of it, in which this rank's rows lie
where they belong. What the others' rows take there is given back to the system when they are let
go, and the rank's own rows are never there twice.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work, irecv, isend
from torch.distributed.fsdp import FSDPModule


class WholePlace:
    """Memory for the parts of a weight, which ``ranks`` ranks have; that of rank ``rank`` stays.
    ``part``: the shape of one, filled up to equal ones."""

    def __init__(self, part: torch.Size, dtype: torch.dtype, ranks: int, rank: int) -> None:
        values = part.numel()
        self.bytes = values * dtype.itemsize
        self.start = rank * self.bytes
        self.map = map_memory(max(ranks * self.bytes, 1))
        # a huge page that this rank's rows touch would hold those of others, and of other weights;
        # a kernel that knows none says that it does not know the advice
        with suppress(OSError):
            self.map.madvise(mmap.MADV_NOHUGEPAGE)
        # views that share no storage, as far as torch knows: that of the part is what a rank holds
        self.whole = torch.frombuffer(self.map, dtype=dtype, count=ranks * values)
        self.part = torch.frombuffer(self.map, dtype=dtype, count=values, offset=self.start)
        self.part = self.part.view(part)

    def let_go(self) -> None:
        """Give back what the other parts take, in whole pages."""
        page = mmap.PAGESIZE
        before = self.start // page * page
        behind = -(-(self.start + self.bytes) // page) * page
        if before:
            self.map.madvise(mmap.MADV_DONTNEED, 0, before)
        if behind < len(self.map):
            self.map.madvise(mmap.MADV_DONTNEED, behind, len(self.map) - behind)


class WholePlaces:
    """The places of a model's weights, cut over ``ranks`` of which this is ``rank``."""

    def __init__(self, ranks: int, rank: int) -> None:
        self.ranks, self.rank = ranks, rank
        self._unbound: dict[int, WholePlace] = {}  # by the address of the part

    def lay(self, share: Tensor, rows: int) -> Tensor:
        """``share`` [up to ``rows``, ...] where it belongs, its own memory no more."""
        part = torch.Size([rows, *share.shape[1:]])
        place = WholePlace(part, share.dtype, self.ranks, self.rank)
        self._unbound[place.part.data_ptr()] = place
        laid = place.part[: len(share)]
        laid.copy_(share)
        return laid

    def bind(self, layers: Sequence[FSDPModule], rest: FSDPModule) -> None:
        """Let FSDP2 gather the weights of these groups, which have been read, into their places.
        One of ``layers`` is fetched at a time, and ``rest`` beside them."""
        of_layers: Any = MappedGather(keep=True)
        of_rest: Any = MappedGather(keep=False)
        for group in (*layers, rest):
            group.set_custom_all_gather(of_rest if group is rest else of_layers)
            for known in parameters_of(group):
                known.reset_sharded_param()  # takes what was read
                rows = known.padded_sharded_param_size[0]
                share = known.sharded_param.to_local()
                if share.untyped_storage().data_ptr() not in self._unbound:
                    # of odd rows: FSDP2 has filled it up, in other memory
                    share = known.sharded_param._local_tensor = self.lay(share, rows)
                place = self._unbound[share.untyped_storage().data_ptr()]
                known._sharded_param_data = place.part.view(-1)
                known.all_gather_outputs = [place.whole]
                known.free_unsharded_param = place.let_go
        self._unbound.clear()


def parameters_of(group: FSDPModule) -> list[Any]:
    """What FSDP2 keeps of each parameter of a group (its `FSDPParam`)."""
    return [
        known
        for of_mesh in group._get_fsdp_state()._fsdp_param_groups
        for known in of_mesh.fsdp_params
    ]


def can_map() -> bool:
    """Whether the system takes back single pages (Linux)."""
    return hasattr(mmap, "MADV_NOHUGEPAGE")


def map_memory(size: int) -> mmap.mmap:
    """Memory that goes back to the system with its last tensor."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class MappedGather:
    """FSDP2's all-gather (`FSDPModule.set_custom_all_gather`) between processes that can send from any
    memory, without buffers of its own. ``keep``: the memory in which parts arrive is used again,
    so no two of these gathers may be under way at a time."""

    def __init__(self, keep: bool) -> None:
        self.keep, self.kept = keep, map_memory(mmap.PAGESIZE)

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for all parts."""
        count = torch.Size(size).numel()
        memory, needed = self.kept, count * dtype.itemsize
        if not self.keep or needed > len(memory):
            memory = map_memory(needed)
        if self.keep:
            self.kept = memory
        return torch.frombuffer(memory, dtype=dtype, count=count).view(*size)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: ProcessGroup,
        async_op: bool = False,
    ) -> Work | None:
        """Send this rank's part, which lies in ``output_tensor``, to every other, and receive theirs."""
        parts, rank = output_tensor.chunk(group.size()), group.rank()
        # each begins with another neighbour
        others = [(rank + i) % group.size() for i in range(1, group.size())]
        begun = [isend(input_tensor, group=group, group_dst=other) for other in others]
        begun += [irecv(parts[other], group=group, group_src=other) for other in reversed(others)]
        work = AllOf([each for each in begun if each is not None])
        if async_op:
            return work
        work.wait()
        return None


class AllOf(Work):
    """Several works as one."""

    def __init__(self, works: Sequence[Work]) -> None:
        super().__init__()
        self.works = works

    def wait(self, *given: Any) -> bool:
        """Wait for each."""
        for work in self.works:
            work.wait(*given)
        return True
