"""One process's part of a run or of a command: its device, its cores, the rows of a step of all
processes, the checkpoint that all of them go on from; and what has to be the same on their
machines, told before a model is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from lorry.adapters.attach import get_bank
from lorry.adapters.peft.base_digest import base_digest
from lorry.backends.distributed.communicator import Communicator, join_processes
from lorry.config import RunConfig, runs_by_adapter
from lorry.config.schema.backend import SharedBackendConfig
from lorry.config.schema.model import ModelConfig
from lorry.disk.durable import DiskError
from lorry.errors import ConfigError
from lorry.kernels import kernel_status
from lorry.models.causal_lm import CausalLM
from lorry.models.loading.load import pick_dtype
from lorry.models.loading.sources import resolve_model
from lorry.notes import NoteCallback, ignore_note
from lorry.plan.machine import available_cores
from lorry.ranks import LaunchedProcess, launched_process
from lorry.runs.layout import PROCESS
from lorry.runs.stages import data_digests
from lorry.train.checkpoint import code_digest
from lorry.train.start import find_resume_checkpoint

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")  # whose versions make numbers
# of a weights file: so many pieces of so many bytes, spread over it, tell another base from this
# one
SAMPLE_PIECES, SAMPLE_BYTES = 16, 1 << 16
# what a person says of a process about dtypes, kernels and checks of them
ARITHMETIC_VARIABLES = ("LORRY_DTYPE", "LORRY_KERNELS", "LORRY_ISA", "LORRY_PROOFS")
SAME_FILES = "copy the same files to every machine, or name a shared place"
SHARED_WAIT_SECONDS = 10.0  # for a network file system to show what another machine has written
POLL_SECONDS = 0.2


class PlacedSettings(Protocol):
    """Settings of a command that opens a model."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def backend(self) -> SharedBackendConfig: ...
    def model_copy(self, *, update: Mapping[str, Any]) -> Any: ...
    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


S = TypeVar("S", bound=PlacedSettings)


@contextlib.contextmanager
def share_command(settings: S) -> Iterator[tuple[S, Communicator]]:
    """The processes of a command that asks a model, and its settings as this one of them has them
    (`place_settings`). What one raises in the block all raise; they leave together. Raises
    ConfigError."""
    with join_processes(settings.backend) as communicator:
        if communicator.size > 1:
            refuse_other_versions(communicator)
            refuse_other_settings(settings, communicator)
            settings = place_settings(settings, communicator)
        if settings.backend.threads:
            torch.set_num_threads(settings.backend.threads)
        yield settings, communicator


def record_processes(run: RunConfig, communicator: Communicator) -> RunConfig:
    """The run with the number of its processes, also where a launcher has said it. Raises ConfigError
    where they were not given the same description."""
    if communicator.size == 1:
        return run
    refuse_other_settings(run, communicator)
    backend = run.backend.model_copy(update={"processes": communicator.size})
    return run.model_copy(update={"backend": backend})


def place_run(
    run: RunConfig, communicator: Communicator, add_note: NoteCallback, output_dir: Path
) -> RunConfig:
    """The run as this process makes it: on its device, with its cores, and with the rows of a step
    of all processes, so that everything that is counted from them is that of one device.
    ``output_dir``: of the whole run. Raises ConfigError, also where the machines differ.
    """
    if communicator.size == 1:
        return run
    # as rank 0 has it: what was measured before may have come out otherwise on another machine
    shared = communicator.exchange("settings", json.loads(run.model_dump_json()))[0]
    run = type(run).model_validate({**shared, "output_dir": run.output_dir})
    run = scale_batches(run, communicator.mesh.data_size)
    machines = refuse_other_versions(communicator)
    if len(set(machines)) > 1:
        refuse_other_files(run, communicator)
        refuse_unshared(output_dir, communicator, machines)
    train = run.train
    add_note(
        f"{communicator.size} processes: {train.per_device_train_batch_size} rows in a micro-batch "
        f"of all of them, {train.per_device_train_batch_size * train.gradient_accumulation_steps} "
        "in a step"
    )
    return place_settings(run, communicator)


def place_settings(settings: S, communicator: Communicator) -> S:
    """Settings with the device and the number of threads of this process. Raises ConfigError, also
    where the processes would compute in different ways."""
    device = choose_device(settings.model.device, communicator)
    refuse_other_arithmetic(settings.model, torch.device(device), communicator)
    threads = settings.backend.threads or share_cores(communicator)
    placed: S = settings.model_copy(
        update={
            "model": settings.model.model_copy(update={"device": device}),
            "backend": settings.backend.model_copy(update={"threads": threads}),
        }
    )
    return placed


def choose_device(asked: str, communicator: Communicator) -> str:
    """``cuda:N`` of this process's own, or ``cpu``: "auto" where not every process has a GPU of its
    own. Raises ConfigError where a GPU is asked for that is not there, or that another process has.
    """
    launched = launched_process() or LaunchedProcess()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = _own_gpu(asked, launched, count)
    if index is None and asked.startswith("cuda"):
        raise ConfigError(
            f"model.device={asked} for {launched.local_world_size} processes on this machine, "
            f"which has {count} GPUs: every process needs one of its own; leave model.device out"
        )
    names = communicator.exchange("devices", None if index is None else gpu_identity(index))
    owners = {name: names.index(name) for name in names if name is not None}
    if asked.startswith("cuda") and len(owners) < len(names):
        first, second = next(
            (owners[name], rank) for rank, name in enumerate(names) if owners[name] != rank
        )
        raise ConfigError(
            f"model.device={asked}: ranks {first} and {second} ask for the same GPU "
            f"({names[second]}); every process needs one of its own: leave model.device out, or "
            "start as many processes as there are GPUs"
        )
    if index is None or len(owners) < len(names):
        return "cpu"
    torch.cuda.set_device(index)
    return f"cuda:{index}"


def _own_gpu(asked: str, launched: LaunchedProcess, count: int) -> int | None:
    """The GPU among ``count`` visible ones that this process would take; None for none."""
    if asked.startswith("cuda:"):
        index = int(asked.removeprefix("cuda:"))
        return index if index < count else None
    if asked not in ("auto", "cuda"):
        return None
    if count >= launched.local_world_size:
        return launched.local_rank
    # a launcher may show each process its own alone (srun --gpus-per-task=1)
    return 0 if count == 1 else None


def gpu_identity(index: int) -> str:
    """A GPU by the name that it has for every process."""
    return str(torch.cuda.get_device_properties(index).uuid)


def share_cores(communicator: Communicator) -> int:
    """How many threads this process takes: the cores that it may use, divided among the ranks that
    may use them too."""
    mine = [platform.node(), sorted(available_cores())]
    here, cores = mine[0], set(mine[1])
    frames = communicator.exchange("cores", mine)
    sharing = sum(host == here and not cores.isdisjoint(theirs) for host, theirs in frames)
    return max(1, len(cores) // sharing)


def refuse_other_versions(communicator: Communicator) -> list[str]:
    """The machine of every rank by name. Raises ConfigError where their versions differ."""
    versions = {
        "Lorry's code": code_digest(),
        "Python": ".".join(platform.python_version_tuple()[:2]),
        **{package: version(package) for package in PACKAGES},
    }
    frames = communicator.exchange("versions", [platform.node(), versions])
    _refuse_difference([mine for _, mine in frames], "install the same on every machine")
    return [host for host, _ in frames]


def refuse_other_settings(settings: PlacedSettings, communicator: Communicator) -> None:
    """Raise ConfigError where a rank was given other settings than rank 0."""
    frames = communicator.exchange("settings", settings.model_dump(mode="json"))
    _refuse_difference(
        [_by_full_name(frame) for frame in frames], "give every process the same description"
    )


def _by_full_name(settings: Mapping[str, Any], group: str = "") -> dict[str, str]:
    """{backend.timeout: value} of settings in groups."""
    named = dict[str, str]()
    for name, value in settings.items():
        if isinstance(value, Mapping):
            named |= _by_full_name(value, f"{group}{name}.")
        else:
            named[f"{group}{name}"] = str(value)
    return named


def refuse_other_arithmetic(
    model: ModelConfig, device: torch.device, communicator: Communicator
) -> None:
    """Raise ConfigError where ranks have other words about how to compute in their environment, or
    are on machines that choose otherwise: their tensors would not even be of one size."""
    said = {name: os.environ[name] for name in ARITHMETIC_VARIABLES if os.environ.get(name)}
    chosen = dict[str, str]()
    if model.dtype == "auto":
        chosen["meaning of dtype=auto"] = str(pick_dtype("auto", device))
    if device.type == "cpu":
        chosen["state of the kernels"] = "compiled" if kernel_status().active else "torch only"
    frames = communicator.exchange("arithmetic", [said, chosen])
    _refuse_difference([mine for mine, _ in frames], "set it alike for every process, or for none")
    _refuse_difference(
        [mine for _, mine in frames],
        "give a dtype, and LORRY_KERNELS=0 to every process where one has no kernels",
    )


def refuse_other_files(run: RunConfig, communicator: Communicator) -> None:
    """Raise ConfigError where machines would read other rows, or another base."""
    data = [one.data for one in runs_by_adapter(run).values()]
    files = {f"data ({p})": digest for each in data for p, digest in data_digests(each).items()}
    place = resolve_model(run.model.name, revision=run.model.revision, add_note=ignore_note)
    files[f"base ({run.model.name})"] = sampled_digest(place.directory)
    frames = communicator.exchange("files", files)
    _refuse_difference(frames, SAME_FILES)


def refuse_other_questions(communicator: Communicator, model: CausalLM, asked: str) -> None:
    """Raise ConfigError where ranks would ask another model, or other questions. ``asked``: digest of
    theirs."""
    if communicator.size == 1:
        return
    own = hashlib.sha256()
    for name, adapter in sorted(get_bank(model, create=True).adapters.items()):
        for tensor, values in sorted(adapter.whole_factors().items()):
            own.update(f"{name} {tensor} {tuple(values.shape)}\n".encode())
            own.update(values.detach().float().cpu().numpy().tobytes())
    facts = {"set of rows to ask": asked, "base": base_digest(model), "adapter": own.hexdigest()}
    frames = communicator.exchange("questions", facts)
    _refuse_difference(frames, SAME_FILES)


def sampled_digest(folder: Path) -> str:
    """SHA-256 of a model's weights and config: names, sizes and samples of the files. Raises
    DiskError."""
    total = hashlib.sha256()
    files = [*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.gguf")]
    for file in sorted(files):
        try:
            size = file.stat().st_size
            total.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as stream:
                for piece in range(SAMPLE_PIECES):
                    stream.seek(size * piece // SAMPLE_PIECES)
                    total.update(stream.read(SAMPLE_BYTES))
        except OSError as error:
            raise DiskError(error.errno, error.strerror, str(file)) from error
    return total.hexdigest()


def _refuse_difference(facts: Sequence[Mapping[str, str]], advice: str) -> None:
    first, *others = facts
    for rank, other in enumerate(others, 1):
        differing = [name for name in {**first, **other} if other.get(name) != first.get(name)]
        if differing:
            name = differing[0]
            here, there = (str(each.get(name, "none"))[:16] for each in (first, other))
            raise ConfigError(
                f"rank {rank} has another {name} than rank 0 ({there} and {here}); {advice}"
            )


def refuse_unshared(output_dir: Path, communicator: Communicator, machines: Sequence[str]) -> None:
    """Raise ConfigError where a machine does not see what rank 0 has written in the run's
    directory: its checkpoints are read by all."""
    is_main = communicator.rank == 0
    mine = [str(output_dir.absolute()), (output_dir / PROCESS).read_text()] if is_main else None
    folder, text = communicator.exchange("output_dir", mine)[0]
    file, limit = Path(folder) / PROCESS, time.monotonic() + SHARED_WAIT_SECONDS
    here = machines[communicator.rank]
    while here != machines[0]:
        # OSError: not there, or not for this user
        with contextlib.suppress(OSError):
            if file.read_text() == text:
                break
        if time.monotonic() > limit:
            raise ConfigError(
                f"output_dir={folder} is not shared: {here} does not find there what rank 0 on "
                f"{machines[0]} has written; give a directory that every machine mounts"
            )
        time.sleep(POLL_SECONDS)
    # rank 0 may go on and write it anew
    communicator.exchange("output_dir is shared")


def scale_batches(run: RunConfig, processes: int) -> RunConfig:
    """A run whose `per_device_train_batch_size` is that of all processes together, jobs' own too:
    with `backend.keep_total` it is already. Raises ConfigError where a step has fewer rows than
    there are processes."""
    train = run.train
    name, rows = "per_device_train_batch_size", train.per_device_train_batch_size
    if run.backend.keep_total:
        if rows * train.gradient_accumulation_steps < processes:
            raise ConfigError(
                f"a step of {rows} x {train.gradient_accumulation_steps} rows "
                f"({name} x gradient_accumulation_steps) is too few for {processes} processes with "
                "backend.keep_total; raise one of them"
            )
        return run
    jobs = [
        job.model_copy(update={"train": {**job.train, name: job.train[name] * processes}})
        if name in job.train
        else job
        for job in run.jobs
    ]
    return run.model_copy(
        update={"train": train.model_copy(update={name: rows * processes}), "jobs": jobs}
    )


def find_shared_checkpoint(run: RunConfig, communicator: Communicator) -> Path | None:
    """`find_resume_checkpoint` as rank 0 answers it. Raises what that raises."""

    def find() -> str | None:
        found = find_resume_checkpoint(run.output_dir, run.train.resume_from_checkpoint)
        return None if found is None else str(found.absolute())

    found = communicator.on_main("the checkpoint to resume from", find)
    return None if found is None else Path(found)
