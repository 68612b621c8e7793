"""Which of a run's processes this one is, and where it stands among them (`Mesh`), as its launcher says: RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which torchrun, Kubeflow Trainer and Ray Train set, and
`lorry VERB backend=ddp backend.processes=N` for the workers that it starts itself.

Without them there is one process, of rank 0. No torch here: the command line asks before it imports
any.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from lorry.errors import ConfigError

# what a launcher has to say besides RANK and WORLD_SIZE, so that the processes find each other
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


class ProcessSettings(Protocol):
    """`backend` of a run description, as far as it says how many processes there are."""

    @property
    def name(self) -> str: ...
    @property
    def processes(self) -> int | None: ...
    @property
    def tensor_parallel(self) -> int: ...
    @property
    def replicas(self) -> int: ...


@dataclass(frozen=True)
class LaunchedProcess:
    """This process among those of a job: ``rank`` of ``world_size``, on its machine ``local_rank`` of
    ``local_world_size``.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


@dataclass(frozen=True)
class Mesh:
    """Where ``rank`` stands among ``replicas`` x ``shards`` x ``tensor_size`` ranks.

    Tensor ranks read the same rows and share every matrix; they are neighbours, so that those of one
    group lie in one machine. Data ranks read different rows: ``shards`` of them hold the base between
    them, ``replicas`` times over (`backend=ddp`: one shard, as many replicas as data ranks).
    """

    rank: int = 0
    replicas: int = 1
    shards: int = 1
    tensor_size: int = 1

    @property
    def size(self) -> int:
        """All ranks."""
        return self.data_size * self.tensor_size

    @property
    def data_size(self) -> int:
        """Among how many ranks the rows of a step are dealt."""
        return self.replicas * self.shards

    @property
    def data_rank(self) -> int:
        """Which part of the rows this rank has, as the other tensor ranks of its group do."""
        return self.rank // self.tensor_size

    @property
    def tensor_rank(self) -> int:
        """Which part of every matrix this rank has."""
        return self.rank % self.tensor_size

    def data_group(self, tensor_rank: int) -> list[int]:
        """The ranks with a part of every matrix in common, by data rank."""
        return list(range(tensor_rank, self.size, self.tensor_size))

    def tensor_group(self, data_rank: int) -> list[int]:
        """The ranks with a part of the rows in common, by tensor rank."""
        first = data_rank * self.tensor_size
        return list(range(first, first + self.tensor_size))


def mesh_of(backend: ProcessSettings, launched: LaunchedProcess) -> Mesh:
    """Where a process stands under these settings. Raises ConfigError where they do not divide the
    ranks, or a group of tensor ranks would reach beyond a machine.
    """
    tensor, world = backend.tensor_parallel, launched.world_size
    if world % tensor:
        raise ConfigError(f"backend.tensor_parallel={tensor} does not divide {world} processes")
    if launched.local_world_size % tensor:
        raise ConfigError(
            f"backend.tensor_parallel={tensor} does not divide the {launched.local_world_size} "
            "processes of a machine, and tensor parallel stays inside one"
        )
    data = world // tensor
    if backend.name != "fsdp":
        return Mesh(launched.rank, data, 1, tensor)
    if data % backend.replicas:
        parts = f" / tensor_parallel={tensor}" if tensor > 1 else ""
        raise ConfigError(
            f"backend.replicas={backend.replicas} does not divide {world} processes{parts}"
        )
    return Mesh(launched.rank, backend.replicas, data // backend.replicas, tensor)


def launched_process() -> LaunchedProcess | None:
    """What the launcher says; None where none has set WORLD_SIZE. Raises ConfigError for numbers that
    cannot be.
    """
    if "WORLD_SIZE" not in os.environ:
        return None
    world_size = _number("WORLD_SIZE", 1)
    if world_size < 1:
        raise ConfigError(f"WORLD_SIZE={world_size}: a job has 1 process or more")
    local_world_size = _number("LOCAL_WORLD_SIZE", world_size)
    rank = _number("RANK", 0 if world_size == 1 else None)
    local_rank = _number("LOCAL_RANK", rank % max(local_world_size, 1))
    if not 0 <= rank < world_size or not 0 <= local_rank < local_world_size <= world_size:
        raise ConfigError(
            f"RANK={rank} of WORLD_SIZE={world_size}, LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE="
            f"{local_world_size}: no process of a job has these numbers; correct the launcher"
        )
    if world_size > 1 and (missing := [name for name in ADDRESS if not os.environ.get(name)]):
        raise ConfigError(
            f"WORLD_SIZE={world_size}, but {missing[0]} is not set, so the processes cannot find each "
            "other; start them with torchrun, or set it to the address of rank 0"
        )
    return LaunchedProcess(rank, world_size, local_rank, local_world_size)


def is_main_process() -> bool:
    """Whether this is rank 0, which alone prints, writes the run directory and reports."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def rank_label() -> str:
    """``rank 3: `` for before an error of another process than rank 0; else nothing."""
    return "" if is_main_process() else f"rank {os.environ.get('RANK')}: "


def workers_to_start(backend: ProcessSettings) -> int:
    """How many local processes a command has to start: 0 where it runs in this one, alone or as one
    that a launcher has started. Raises ConfigError where settings and launcher contradict.
    """
    launched = launched_process()
    if launched is None:
        wanted = backend.processes or 1
        return wanted if wanted > 1 else 0
    if backend.name == "single" and launched.world_size > 1:
        raise ConfigError(
            f"{launched.world_size} processes were started (WORLD_SIZE), and each would make the same "
            "run; add backend=ddp or backend=fsdp, or start one process"
        )
    if backend.processes not in (None, launched.world_size):
        raise ConfigError(
            f"backend.processes={backend.processes}, but the launcher has started "
            f"{launched.world_size} (WORLD_SIZE); leave backend.processes out"
        )
    return 0


def note_of_one_process(backend: ProcessSettings) -> str | None:
    """What to say where settings name a backend of several processes and nobody has started any or
    asked for a number; None otherwise."""
    if backend.name == "single" or backend.processes is not None or launched_process() is not None:
        return None
    return (
        f"backend={backend.name} in one process is the same as backend=single; for several type "
        "backend.processes=N, or start the command with torchrun --nproc-per-node N -m lorry"
    )


def _number(name: str, default: int | None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.strip().isdecimal():
        raise ConfigError(f"{name}={text}: the launcher has to set it to a whole number")
    return int(text)
