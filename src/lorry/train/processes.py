"""One process's part of a run: its device, its cores, the rows of a step of all processes, and the
checkpoint that all of them go on from.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lorry.backends.distributed.communicator import Communicator
from lorry.config import RunConfig
from lorry.errors import ConfigError
from lorry.notes import NoteCallback
from lorry.plan.machine import available_threads
from lorry.ranks import launched_process
from lorry.train.start import find_resume_checkpoint


def place_run(run: RunConfig, communicator: Communicator, add_note: NoteCallback) -> RunConfig:
    """The run as this process makes it: on its device, with its cores, and with the rows of a step of
    all processes, so that everything that is counted from them is that of one device. Raises
    ConfigError.
    """
    launched = launched_process()
    if communicator.size == 1 or launched is None:
        return run
    # as rank 0 has it: what was measured before may have come out otherwise on another machine
    shared = communicator.exchange("settings", json.loads(run.model_dump_json()))[0]
    run = type(run).model_validate({**shared, "output_dir": run.output_dir})
    run = scale_batches(run, communicator.size)
    train = run.train
    add_note(
        f"{communicator.size} processes: {train.per_device_train_batch_size} rows in a micro-batch of "
        f"all of them, {train.per_device_train_batch_size * train.gradient_accumulation_steps} in a "
        "step"
    )
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= launched.local_world_size
    device = run.model.device
    several = launched.local_world_size > 1
    if several and (device.startswith("cuda:") or (device == "cuda" and not on_gpu)):
        raise ConfigError(
            f"model.device={device} for {launched.local_world_size} processes on this machine, which "
            f"has {torch.cuda.device_count()} GPUs: every process needs one of its own; leave "
            "model.device out"
        )
    if device == "auto":
        device = f"cuda:{launched.local_rank}" if on_gpu else "cpu"
    elif device == "cuda":
        device = f"cuda:{launched.local_rank}"
    threads = run.backend.threads or max(1, available_threads() // launched.local_world_size)
    return run.model_copy(
        update={
            "model": run.model.model_copy(update={"device": device}),
            "backend": run.backend.model_copy(update={"threads": threads}),
        }
    )


def scale_batches(run: RunConfig, processes: int) -> RunConfig:
    """A run whose `per_device_train_batch_size` is that of all processes together, jobs' own too: with
    `backend.keep_total` it is already. Raises ConfigError where a step has fewer rows than there are
    processes."""
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
