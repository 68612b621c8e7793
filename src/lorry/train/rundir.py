"""Where a run begins: from which checkpoint, and in a directory cleared of an earlier run without losing anything of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lorry.config.files import read_file
from lorry.config.schema import Run
from lorry.disk import durable
from lorry.errors import ConfigError
from lorry.train import artifacts, checkpoint
from lorry.train.engine import METRICS

RUN_FILE, RECEIPT = "run.yaml", "receipt.json"


def where_to_start(run: Run) -> Path | None:
    """The checkpoint to resume from, or None to start afresh. Raises ConfigError rather than mix with, or lose, another run."""
    folder, start = run.output_dir, _wanted_checkpoint(run)
    unfinished = (folder / "checkpoints").is_dir() and not (folder / RECEIPT).is_file()
    if unfinished and not inside(start, folder) and checkpoint.find_latest(folder):
        raise ConfigError(
            f"{folder} holds an unfinished run; add resume_from_checkpoint=auto to go on with it, or use another output_dir"
        )
    return start


def _wanted_checkpoint(run: Run) -> Path | None:
    wanted = run.train.resume_from_checkpoint
    if wanted is None or wanted == "auto":
        return None if wanted is None else checkpoint.find_latest(run.output_dir)
    path = Path(wanted)
    within = checkpoint.find_latest(path) if (path / "checkpoints").is_dir() else path
    if within is None or not within.is_dir():
        raise ConfigError(f"train.resume_from_checkpoint={wanted} is no checkpoint and no run with one")
    return within


def inside(start: Path | None, folder: Path) -> bool:
    """Whether a checkpoint is one of the run directory's own."""
    return start is not None and start.resolve().parent == (folder / "checkpoints").resolve()


def make_room(folder: Path) -> Path | None:
    """Clear the way for a new run: the files of a finished one move to FOLDER/previous/N, which is returned; what is left of
    one that never got to a checkpoint is removed, since nothing can come of it. receipt.json, which says that a run is finished,
    moves last: a kill in between loses nothing.
    """
    model = [*artifacts.MODEL_FILES, *(file.name for file in folder.glob(artifacts.SHARDS))] if trained_whole(folder) else []
    names = [n for n in (*artifacts.RESULTS, *model, METRICS, RUN_FILE, "checkpoints") if n != RECEIPT and (folder / n).exists()]
    adapters = _adapter_folders(folder)
    if not (folder / RECEIPT).is_file():
        checkpoint.forget_after(folder, -1)
        for name in [*(f"{a}/{file}" for a in adapters for file in artifacts.ADAPTER_FILES), *names]:
            if (folder / name).is_file():
                durable.disk.unlink(folder / name)
        return None
    taken = [int(p.name) for p in (folder / "previous").glob("*") if p.name.isdigit()]
    aside = folder / "previous" / str(max(taken, default=0) + 1)
    durable.make_directory(aside)
    for name in (*adapters, *names, RECEIPT):  # the adapters first, since the description among the names says which they are
        durable.disk.rename(folder / name, aside / name)
    return aside


def trained_whole(folder: Path) -> bool:
    """Whether a directory is that of a run that trained the base's own weights, by its own description: a model in any other
    directory is somebody's, and not ours to move."""
    described = _described(folder)
    return "lora" in described and described["lora"] is None


def _described(folder: Path) -> Mapping[str, object]:
    return read_file(folder / RUN_FILE).values if (folder / RUN_FILE).is_file() else {}


def _adapter_folders(folder: Path) -> list[str]:
    """The folders that a run of several jobs made for their adapters, by its own description."""
    jobs = _described(folder).get("jobs")
    names = [str(job.get("name")) for job in jobs if isinstance(job, Mapping)] if isinstance(jobs, list) else []
    return [name for name in names if (folder / name / "adapter_config.json").is_file()]
