"""What the processes of a run say to each other, over torch.distributed.

    with communicator.sharing_failures():
        frames = communicator.exchange("signals", stop.requested)   # every rank's, in order
        communicator.add_up("gradients", grads)                     # the same sum on every rank

**One primitive.** Whatever ranks agree on goes through `exchange`: a name and a value of each rank.
A rank that fails says so by one more exchange, so that the others learn of it at whatever exchange
they come to next, and everybody ends with the same error: nobody waits for a rank that is gone, and
nobody raises alone. A sum of tensors is announced by an exchange first, so a failure never pairs with
half a tensor; and since names travel along, ranks that have come apart (one micro-batch more, a
decision taken by one of them) raise ContractError instead of adding up what does not belong together.

**The rule that follows.** Between two exchanges a rank may raise whatever it likes. What decides
whether an exchange takes place at all must be the same on every rank: settings, step numbers, or
values that came out of an exchange.

A rank that dies without a word closes its connections: the others' next exchange fails, at the latest
after `backend.timeout` seconds, and what started the processes ends the rest. Work that ranks do apart,
each its own (`on_main`, `await_all`), may take any time: there the others wait for a word in the store,
and give up a rank whose pulse (`Pulse`) has not been heard for `backend.timeout` seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lorry.backends.distributed.passes import PassSchedule
from lorry.errors import ConfigError, ContractError, LorryError
from lorry.ranks import LaunchedProcess, Mesh, launched_process, mesh_of, workers_to_start

if TYPE_CHECKING:  # imported where it is used: it is a second of every single-process run
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Axis = Literal["data", "tensor"]  # of the mesh

# Bytes of a frame that fits one all_gather: a signal, a step's losses of a few adapters. Larger ones
# take a second, as long as the longest.
FRAME_BYTES = 4096
LENGTH_BYTES = 8  # of a frame's length, before it
END_WAIT_SECONDS = 30.0  # for rank 0 to write how a run ended, before this rank ends as well
# for the others to hear of an error before they were joined: they are starting
EARLY_SECONDS = 60.0
POLL_SECONDS = 0.05
# between two of a rank; with a timeout of less than four of them a quarter of it
PULSE_SECONDS = 5.0


class PeerError(LorryError):
    """Another process of the run cannot be reached any more."""


class JoinError(ConfigError):
    """The processes have not found each other: there is nobody to tell of it."""


class Communicator(Protocol):
    """The processes of a run as one of them sees them: ``rank`` of ``size``, and where that is
    (``mesh``)."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def mesh(self) -> Mesh: ...
    def exchange(self, what: str, value: Any = None) -> list[Any]:
        """Every rank's value (JSON), in the order of the ranks. Raises what a rank raised instead
        (`sharing_failures`), ContractError where one is at another ``what``, and PeerError."""

    def on_main(self, what: str, function: Callable[[], Any]) -> Any:
        """What ``function`` gives rank 0, which alone calls it (JSON), on every rank; it may take as
        long as it likes. Raises on every rank what it raised there, and what `exchange` raises."""

    def await_all(self, what: str, value: Any = None) -> list[Any]:
        """`exchange` after work that each rank does apart, however long that takes one that lives."""

    def add_up(self, what: str, tensor: Tensor, axis: Axis = "data") -> None:
        """Replace a tensor by its sum over this rank's group of an axis, the same bits on each of
        them; every rank of the run calls it. Raises what `exchange` raises, and ContractError where
        shapes or dtypes differ."""

    def gather(self, what: str, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Every rank's tensors, on the CPU, in the order of the ranks. Raises what `exchange` does."""

    def group(self, axis: Axis) -> ProcessGroup | None:
        """torch's group of this rank's neighbours on an axis; None where it is alone."""

    def explained(self, what: str) -> contextlib.AbstractContextManager[None]:
        """While the block runs, an error of torch.distributed's is a PeerError: another rank cannot be
        reached."""

    def together(self) -> contextlib.AbstractContextManager[None]:
        """While the block runs, ranks may make different numbers of passes through models whose
        weights are cut over them (`PassSchedule.together`); every rank enters it."""

    def sharing_failures(self) -> contextlib.AbstractContextManager[None]:
        """While the block runs, what one rank raises is raised on every rank at its next exchange: the
        others name it (``rank 1: ...``), and their error is of the same class."""


class OneProcess:
    """The communicator of a run that has one process."""

    rank, size, mesh = 0, 1, Mesh()

    def exchange(self, what: str, value: Any = None) -> list[Any]:
        """Its own value."""
        return [value]

    def on_main(self, what: str, function: Callable[[], Any]) -> Any:
        """What the function returns."""
        return function()

    def await_all(self, what: str, value: Any = None) -> list[Any]:
        """Its own value."""
        return [value]

    def add_up(self, what: str, tensor: Tensor, axis: Axis = "data") -> None:
        """The sum is the tensor."""

    def group(self, axis: Axis) -> None:
        """It is alone."""

    def together(self) -> contextlib.AbstractContextManager[None]:
        """There is nobody to wait for."""
        return contextlib.nullcontext()

    def gather(self, what: str, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Its own tensors, on the CPU."""
        return [{name: tensor.cpu() for name, tensor in tensors.items()}]

    def explained(self, what: str) -> contextlib.AbstractContextManager[None]:
        """There is nobody to reach."""
        return contextlib.nullcontext()

    def sharing_failures(self) -> contextlib.AbstractContextManager[None]:
        """There is nobody to share them with."""
        return contextlib.nullcontext()


ONE_PROCESS = OneProcess()


class TorchCommunicator:
    """Over torch.distributed's default group, which is initialised: gloo for what is on the CPU.
    ``store``: a key-value store of its own, where a rank says that something long is done; ``pulse``:
    the ranks' signs of life. Every rank makes it, since it makes the groups of the mesh.
    """

    def __init__(self, store: Any, mesh: Mesh, pulse: Pulse) -> None:
        self.store, self.mesh, self.rank, self.size = store, mesh, mesh.rank, mesh.size
        self.pulse, self.passes = pulse, PassSchedule(self.exchange)
        self._device_meshes: dict[str, DeviceMesh] = {}
        self._calls = 0  # of `on_main` and `await_all`, which every rank counts alike
        self._failures = 0  # of ranks, told to all of them
        self.told: BaseException | None = None  # this rank's error that the others have heard last
        timeout = timedelta(seconds=pulse.timeout)
        self.lost = False  # whether another rank could not be reached
        with self.explained("groups of ranks"):
            self._groups: dict[Axis, ProcessGroup | None] = {
                axis: _open_group(self._ranks_by_group(axis), timeout) for axis in get_args(Axis)
            }

    def exchange(self, what: str, value: Any = None) -> list[Any]:
        """See `Communicator.exchange`."""
        frames = self._frames({"what": what, "value": value})
        failed = [(rank, frame["failed"]) for rank, frame in enumerate(frames) if "failed" in frame]
        if failed:
            self._failures += 1
            rank, failure = failed[0]
            raise _shared_error(rank, failure)
        places = [frame["what"] for frame in frames]
        if len(set(places)) > 1:
            other = next(rank for rank, place in enumerate(places) if place != places[0])
            raise _mark_shared(
                ContractError(
                    f"the processes have come apart: rank 0 is at {places[0]!r}, rank {other} at "
                    f"{places[other]!r}; nothing was updated since they last agreed"
                )
            )
        return [frame["value"] for frame in frames]

    def on_main(self, what: str, function: Callable[[], Any]) -> Any:
        """See `Communicator.on_main`."""
        # where rank 0 fails on its way here the others learn of it now: waiting for the key they
        # would not, and rank 0 would wait for them
        self.exchange(what)
        self._calls += 1
        key = f"main/{self._calls}"
        if self.rank == 0:
            numbers = itertools.count(1)

            def announce() -> None:
                self.store.set(f"{key}/pass/{next(numbers)}", what)

            try:
                with self.passes.announced(announce):
                    result = function()
            finally:
                # the others wait for the key and not in a collective, which has a timeout
                self.store.set(key, what)
            return self.exchange(what, result)[0]
        # rank 0's passes through sharded weights are walked by all: it says before each that it comes
        with self.passes.announced(None):
            self._wait_for(key, 0, self.passes.follow)
        return self.exchange(what)[0]

    def await_all(self, what: str, value: Any = None) -> list[Any]:
        """See `Communicator.await_all`."""
        with self.passes.together():  # who is through walks along with who is not
            pass
        self._calls += 1
        keys = [f"here/{self._calls}/{rank}" for rank in range(self.size)]
        with self.explained(what):
            self.store.set(keys[self.rank], what)
        for rank, key in enumerate(keys):
            self._wait_for(key, rank)
        return self.exchange(what, value)

    def add_up(self, what: str, tensor: Tensor, axis: Axis = "data") -> None:
        """See `Communicator.add_up`."""
        shapes = self.exchange(what, [str(tensor.dtype), list(tensor.shape)])
        # of all groups: every rank has to raise
        for ranks in self._ranks_by_group(axis):
            added = [shapes[rank] for rank in ranks]
            if any(shape != added[0] for shape in added):
                raise _mark_shared(
                    ContractError(
                        f"{what}: the ranks {ranks} would add up tensors of {added}, which differ"
                    )
                )
        if (group := self.group(axis)) is not None:
            with self.explained(what):
                torch.distributed.all_reduce(tensor, group=group)

    def group(self, axis: Axis) -> ProcessGroup | None:
        """See `Communicator.group`."""
        return self._groups[axis]

    def device_mesh(self, kind: str) -> DeviceMesh:
        """torch's mesh of this rank's data ranks: shard, or replica x shard, for tensors on a kind of
        device (cpu, cuda). Every rank calls it."""
        if kind not in self._device_meshes:
            timeout = timedelta(seconds=self.pulse.timeout)
            self.exchange("groups of ranks")
            with self.explained("groups of ranks"):
                self._device_meshes[kind] = _open_device_mesh(self.mesh, kind, timeout)
        return self._device_meshes[kind]

    def together(self) -> contextlib.AbstractContextManager[None]:
        """See `Communicator.together`."""
        return self.passes.together()

    def _ranks_by_group(self, axis: Axis) -> list[list[int]]:
        mesh = self.mesh
        if axis == "data":
            return [mesh.data_group(t) for t in range(mesh.tensor_size)]
        return [mesh.tensor_group(d) for d in range(mesh.data_size)]

    def gather(self, what: str, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """See `Communicator.gather`."""
        payload = save_tensors(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        )
        sizes = self.exchange(what, len(payload))
        return [load_tensors(part) for part in self._gather_bytes(what, payload, sizes)]

    @contextlib.contextmanager
    def sharing_failures(self) -> Iterator[None]:
        """See `Communicator.sharing_failures`."""
        try:
            yield
        except BaseException as error:
            # blocks may lie in each other: an error is told once
            known = is_shared(error) or error is self.told
            if not known and not isinstance(error, PeerError):
                self.told = error
                # a rank that cannot be told any more ends by itself, and this one has its own error
                with contextlib.suppress(PeerError):
                    with self.explained("a failure"):
                        self.store.set(self._failure_key(), "")
                    self._frames({"failed": _describe(error)})
                    self._failures += 1
                    # rank 0 speaks for all; its own error is the one that it prints
                    if isinstance(error, LorryError):
                        _mark_shared(error)
            raise

    def wait_for_main(self) -> None:
        """Wait until rank 0 has ended, for `END_WAIT_SECONDS` at most."""
        limit = time.monotonic() + END_WAIT_SECONDS
        # the store goes with rank 0 where that holds it: then it has ended, too
        with contextlib.suppress(PeerError):
            while time.monotonic() < limit and not self._is_set("main/ended"):
                time.sleep(POLL_SECONDS)

    def _failure_key(self) -> str:
        """What a failing rank sets, for those that wait for another key: the next exchange tells."""
        return f"failed/{self._failures}"

    def _wait_for(self, key: str, rank: int, follow: Callable[[], None] = lambda: None) -> None:
        """Wait until ``rank`` has set a key, or any rank has failed; ``follow``: what is done for each
        KEY/pass/1, KEY/pass/2 ... that it sets before. Raises PeerError for a rank that gives no sign
        of life."""
        passes = 0
        while not self._is_set(key) and not self._is_set(self._failure_key()):
            if self._is_set(f"{key}/pass/{passes + 1}"):
                passes += 1
                follow()
                continue
            with self.explained(key):
                self.pulse.expect(rank)
            time.sleep(POLL_SECONDS)

    def _is_set(self, key: str) -> bool:
        with self.explained(key):
            return bool(self.store.check([key]))

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
        # DistError, DistBackendError, DistStoreError are RuntimeErrors; gloo's own is a plain one
        except RuntimeError as error:
            self.lost = True
            first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise PeerError(
                f"lost another process of the run at {what!r} ({first}); the last checkpoint, if "
                "any, is whole: the same command with resume_from_checkpoint=auto goes on"
            ) from error


def _open_group(groups: Sequence[Sequence[int]], timeout: timedelta) -> ProcessGroup | None:
    """torch's group of this process among these, which are those of the whole mesh; None of one alone."""
    import torch.distributed as dist

    if len(groups) == 1:
        return dist.group.WORLD
    if len(groups[0]) == 1:
        return None
    ranks = [list(group) for group in groups]
    return dist.new_subgroups_by_enumeration(ranks, timeout=timeout)[0]


def _open_device_mesh(mesh: Mesh, kind: str, timeout: timedelta) -> DeviceMesh:
    """See `TorchCommunicator.device_mesh`: groups of its own, so that weights on their way and what
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


class Pulse:
    """Signs of life of this rank, from a thread of its own, and of the others: a number in the store
    that grows. ``timeout``: seconds after which one that has not grown means that a rank is gone.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self.timeout, self.store = timeout, store
        self._keys = [f"pulse/{number}" for number in range(size)]
        # {rank: (its number, when it was first seen)}
        self._seen = dict[int, tuple[int, float]]()
        self._ended = threading.Event()
        # a store serves one thread; a copy has a connection of its own
        arguments = (store.clone(), self._keys[rank], min(PULSE_SECONDS, timeout / 4))
        self._thread = threading.Thread(target=self._beat, args=arguments, daemon=True)
        self._thread.start()

    def _beat(self, store: Any, key: str, seconds: float) -> None:
        # a store that has gone says the same to whoever waits for it
        with contextlib.suppress(RuntimeError):
            while not self._ended.is_set():
                store.add(key, 1)
                self._ended.wait(seconds)

    def expect(self, rank: int) -> None:
        """Raise RuntimeError where a rank has given no sign of life for ``timeout`` seconds."""
        number, now = self.store.add(self._keys[rank], 0), time.monotonic()
        last, since = self._seen.get(rank, (-1, now))
        if number != last:
            self._seen[rank] = (number, now)
        elif now - since > self.timeout:
            raise RuntimeError(f"no sign of life of rank {rank} for {self.timeout:g} seconds")

    def end(self) -> None:
        """No more signs: this process ends."""
        self._ended.set()
        # not for ever: a store that cannot be reached keeps the thread
        self._thread.join(PULSE_SECONDS)


def is_shared(error: BaseException) -> bool:
    """Whether every rank has this error: then rank 0 alone tells of it."""
    return bool(getattr(error, "shared", False))


def _mark_shared(error: LorryError) -> LorryError:
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
    return _mark_shared(error)


def _error_classes() -> dict[str, type[LorryError]]:
    known, new = dict[str, type[LorryError]](), [LorryError]
    while new:
        known |= {kind.__name__: kind for kind in reversed(new)}
        new = [below for kind in new for below in kind.__subclasses__()]
    return known


def open_communicator(backend: Any) -> Communicator:
    """The processes of this run: those that a launcher has started, joined on the first call; else
    this one. ``backend``: the settings. Raises ConfigError.
    """
    if workers_to_start(backend) > 1:
        raise ConfigError(
            f"backend.processes={backend.processes} starts workers for a command; in Python start "
            f"the script itself with torchrun --nproc-per-node {backend.processes}"
        )
    launched = launched_process()
    if launched is None or launched.world_size == 1:
        return ONE_PROCESS
    mesh = mesh_of(backend, launched)
    # once in the life of a process, however many runs it makes, and once for each mesh
    if not _communicators:
        # where another rank failed on its way here, all hear of it before they make more groups
        meshes = _join(launched, backend.timeout).exchange("joined", asdict(replace(mesh, rank=0)))
        if odd := [rank for rank, other in enumerate(meshes) if other != meshes[0]]:
            raise _mark_shared(
                ConfigError(
                    f"rank {odd[0]} has another backend than rank 0: give all one description"
                )
            )
    if mesh not in _communicators:
        import torch.distributed as dist

        world = next(iter(_communicators.values()))
        name = f"{mesh.replicas}x{mesh.shards}x{mesh.tensor_size}"
        store = dist.PrefixStore(name, world.store)
        _communicators[mesh] = TorchCommunicator(store, mesh, world.pulse)
    return _communicators[mesh]


_communicators = dict[Mesh, TorchCommunicator]()  # the first: of one axis, as the processes joined


@contextlib.contextmanager
def join_processes(backend: Any) -> Iterator[Communicator]:
    """The processes of a command, which leave together: what one raises in the block, also what rank 0
    does there alone, all raise. Raises what `open_communicator` raises."""
    communicator = open_communicator(backend)
    with communicator.sharing_failures():
        yield communicator
        communicator.await_all("the end of the command")


def share_early_failure(error: LorryError) -> None:
    """Tell the other processes of an error outside of `sharing_failures`, before `open_communicator`:
    they would wait for this one. Where they cannot be reached within `EARLY_SECONDS`, it stays this
    process's own.
    """
    launched = launched_process()
    known = any(error is communicator.told for communicator in _communicators.values())
    if launched is None or launched.world_size == 1 or known or isinstance(error, JoinError):
        return
    with contextlib.suppress(LorryError):
        world = next(iter(_communicators.values()), None) or _join(launched, EARLY_SECONDS)
        with world.sharing_failures():
            raise error


def _join(launched: LaunchedProcess, seconds: float) -> TorchCommunicator:
    """Join the other processes, as one axis of all of them. Raises JoinError."""
    # imported here: it is a second of every single-process run
    import torch.distributed as dist

    timeout = timedelta(seconds=seconds)
    try:
        store, rank, size = next(
            dist.rendezvous("env://", launched.rank, launched.world_size, timeout=timeout)
        )
        store = dist.PrefixStore("lorry", store)
        dist.init_process_group(
            # NCCL joins when the first tensor on a GPU is added up
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
    # what a rendezvous raises is a RuntimeError of torch's (also for a port in use), or ValueError
    except (RuntimeError, ValueError) as error:
        where = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise JoinError(
            f"rank {launched.rank} could not join the other {launched.world_size - 1} processes at "
            f"{where}: {str(error).splitlines()[0][:200]}"
        ) from error
    pulse = Pulse(store, rank, size, seconds)
    mesh = Mesh(rank, replicas=size)
    _communicators[mesh] = TorchCommunicator(dist.PrefixStore("world", store), mesh, pulse)
    atexit.register(_leave)
    return _communicators[mesh]


def _leave() -> None:
    """At this process's end. The others wait for rank 0: a launcher that sees one of them fail ends
    the rest, and rank 0 may be writing how the run ended."""
    communicators = list(_communicators.values())
    communicators[0].pulse.end()
    with contextlib.suppress(RuntimeError):
        if communicators[0].rank == 0:
            communicators[0].store.set("main/ended", "")
        elif not any(communicator.lost for communicator in communicators):
            communicators[0].wait_for_main()
        torch.distributed.destroy_process_group()
