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
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lorry.backends.distributed.exchange import (
    Axis,
    PeerError,
    RankExchange,
    is_shared,
    mark_shared,
)
from lorry.backends.distributed.passes import PassSchedule
from lorry.errors import ConfigError, LorryError
from lorry.ranks import LaunchedProcess, Mesh, launched_process, mesh_of, workers_to_start

if TYPE_CHECKING:  # imported where it is used: it is a second of every single-process run
    from torch.distributed import ProcessGroup

END_WAIT_SECONDS = 30.0  # for rank 0 to write how a run ended, before this rank ends as well
# for the others to hear of an error before they were joined: they are starting
EARLY_SECONDS = 60.0
POLL_SECONDS = 0.05
# between two of a rank; with a timeout of less than four of them a quarter of it
PULSE_SECONDS = 5.0


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


class TorchCommunicator(RankExchange):
    """Over torch.distributed. ``store``: a key-value store of its own, where a rank says that something
    long is done; ``pulse``: the ranks' signs of life. Every rank makes it.
    """

    def __init__(self, store: Any, mesh: Mesh, pulse: Pulse) -> None:
        super().__init__(mesh, pulse.timeout)
        self.store, self.pulse, self.passes = store, pulse, PassSchedule(self.exchange)
        # of `on_main` and `await_all` since a rank has failed, which every rank counts alike
        self._calls = 0
        self.told: BaseException | None = None  # this rank's error that the others have heard last

    def set_timeout(self, seconds: float) -> None:
        """How long this rank waits for another from now on, in a collective or for its pulse; every
        rank calls it."""
        super().set_timeout(seconds)
        self.pulse.set_timeout(seconds)

    def on_main(self, what: str, function: Callable[[], Any]) -> Any:
        """See `Communicator.on_main`."""
        # where rank 0 fails on its way here the others learn of it now: waiting for the key they
        # would not, and rank 0 would wait for them
        self.exchange(what)
        self._calls += 1
        key = f"main/{self.failures}/{self._calls}"
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
        keys = [f"here/{self.failures}/{self._calls}/{rank}" for rank in range(self.size)]
        with self.explained(what):
            self.store.set(keys[self.rank], what)
        for rank, key in enumerate(keys):
            self._wait_for(key, rank)
        return self.exchange(what, value)

    def together(self) -> contextlib.AbstractContextManager[None]:
        """See `Communicator.together`."""
        return self.passes.together()

    @contextlib.contextmanager
    def sharing_failures(self) -> Iterator[None]:
        """See `Communicator.sharing_failures`."""
        outside = sys.exception()
        try:
            yield
        except BaseException as error:
            # Blocks may lie in each other: an error is told once. So is one that came in the way of
            # another, as a signal does that arrives while a run ends.
            known = any(is_shared(e) or e is self.told for e in _with_causes(error, outside))
            if not known and not isinstance(error, PeerError):
                self.told = error
                # a rank that cannot be told any more ends by itself, and this one has its own error
                with contextlib.suppress(PeerError):
                    with self.explained("a failure"):
                        self.store.set(self._failure_key(), "")
                    self.tell_failure(error)
            raise

    def _settle(self) -> None:
        """See `RankExchange._settle`; ranks were at different places, and count anew."""
        super()._settle()
        self._calls = 0
        self.passes.forget()

    def wait_for_main(self) -> None:
        """Wait until rank 0 has ended, for `END_WAIT_SECONDS` at most."""
        limit = time.monotonic() + END_WAIT_SECONDS
        # the store goes with rank 0 where that holds it: then it has ended, too
        with contextlib.suppress(PeerError):
            while time.monotonic() < limit and not self._is_set("main/ended"):
                time.sleep(POLL_SECONDS)

    def hear_failure(self) -> None:
        """Raise what another rank has failed with, if one has: for waits that it will not come to. A
        pass through sharded weights is walked to its end before, as the others walk it."""
        if self._is_set(self._failure_key()):
            self.passes.finish_pass()
            self.exchange("a failure")

    def _failure_key(self) -> str:
        """What a failing rank sets, for those that do not wait in an exchange: the next one tells."""
        return f"failed/{self.failures}"

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


class Pulse:
    """Signs of life of this rank, from a thread of its own, and of the others: a number in the store
    that grows. ``timeout``: seconds after which one that has not grown means that a rank is gone.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self.timeout, self.store = timeout, store
        self._keys = [f"pulse/{number}" for number in range(size)]
        # {rank: (its number, when it was first seen)}
        self._seen = dict[int, tuple[int, float]]()
        self._ended, self._woken = False, threading.Event()
        # a store serves one thread; a copy has a connection of its own
        arguments = (store.clone(), self._keys[rank])
        self._thread = threading.Thread(target=self._beat, args=arguments, daemon=True)
        self._thread.start()

    def _beat(self, store: Any, key: str) -> None:
        # a store that has gone says the same to whoever waits for it
        with contextlib.suppress(RuntimeError):
            while not self._ended:
                store.add(key, 1)
                self._woken.wait(min(PULSE_SECONDS, self.timeout / 4))
                self._woken.clear()

    def set_timeout(self, seconds: float) -> None:
        """Another number of seconds, of all ranks."""
        if seconds != self.timeout:
            self.timeout = seconds
            self._woken.set()  # the next sign may be due before

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
        self._ended = True
        self._woken.set()
        # not for ever: a store that cannot be reached keeps the thread
        self._thread.join(PULSE_SECONDS)


def _with_causes(
    error: BaseException | None, outside: BaseException | None
) -> Iterator[BaseException]:
    """An error, and those in whose way it came, as far as ``outside``."""
    while error is not None and error is not outside:
        yield error
        error = error.__context__


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
            raise mark_shared(
                ConfigError(
                    f"rank {odd[0]} has another backend than rank 0: give all one description"
                )
            )
    if mesh not in _communicators:
        import torch.distributed as dist

        world = next(iter(_communicators.values()))
        # a rank that fails on its way here is heard now: making groups the others would wait
        world.exchange("groups of a mesh")
        name = f"{mesh.replicas}x{mesh.shards}x{mesh.tensor_size}"
        store = dist.PrefixStore(name, world.store)
        _communicators[mesh] = TorchCommunicator(store, mesh, world.pulse)
    # of this command: the processes may have been joined by another
    _communicators[mesh].set_timeout(backend.timeout)
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
