"""Where a run begins: from which checkpoint, and in a directory that is its own, cleared of an
earlier run.

Nothing of an earlier run and nothing of anybody else's is removed or written over
(runs/ownership.py): a directory with files that no run of Lorry wrote is refused; those of an
earlier run move to previous/N.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from lorry.errors import ConfigError, DataError
from lorry.runs import ownership
from lorry.runs.layout import (
    ADAPTER_FILES,
    CHECKPOINTS,
    CONTRACTS,
    METRICS,
    MODEL_FILES,
    RECEIPT,
    RESULTS,
    ROUTER,
    RUN_FILE,
    SHARDS,
    STAGED,
    START,
    SUITES,
    TOKENIZER_FILES,
    is_adapter_folder,
)
from lorry.runs.read import read_contracts
from lorry.train import checkpoint

MOVE_AWAY_HINT = "use another output_dir, or move them away"
# what each life of a run writes anew from its beginning, or goes on with
RUN_MARKER_FILES = (
    RUN_FILE,
    METRICS,
    CONTRACTS,
    CHECKPOINTS,
)


def claim_output_dir(folder: Path, jobs: Iterable[str] = ()) -> None:
    """Whether a run may write in a directory: it is empty of the names that a run writes, or a run
    of ours is in it. ``jobs``: the names of several.

    Raises ConfigError naming what is somebody else's, before anything is touched; DiskError.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError(f"output_dir={folder} is not a directory; give another one")
    # the directory of a run of ours is judged file by file when each name is written
    if not ownership.is_run(folder):
        names = _matching_names(folder, _written_patterns(list(jobs)))
        ownership.refuse_foreign(
            dict.fromkeys((folder / name for name in names), _is_unmarked), MOVE_AWAY_HINT
        )


def _is_unmarked(path: Path) -> bool:
    """Without a mark in the directory no file there is a run's."""
    return False


def find_resume_checkpoint(folder: Path, requested: str | None) -> Path | None:
    """The checkpoint that a run in a directory resumes from, or None to start afresh.
    ``requested``: `train.resume_from_checkpoint`. Raises ConfigError rather than mix
    with, or lose, another run; ModelError where there are checkpoints and none is whole; DiskError."""
    start = _requested_checkpoint(folder, requested)
    unfinished = (folder / CHECKPOINTS).is_dir() and not (folder / RECEIPT).is_file()
    if (
        unfinished
        and not is_own_checkpoint(start, folder)
        # a broken contract ends a run as surely as its last step does: nothing is lost by a new one
        and not broken_contracts(folder)
        # asked last, for it reads and hashes a checkpoint whole
        and checkpoint.find_latest_checkpoint(folder)
    ):
        raise ConfigError(
            f"{folder} holds an unfinished run; add resume_from_checkpoint=auto to "
            "continue it, or use another output_dir"
        )
    return start


def _requested_checkpoint(folder: Path, requested: str | None) -> Path | None:
    if requested is None or requested == "auto":
        return None if requested is None else checkpoint.find_latest_checkpoint(folder)
    path = Path(requested)
    within = checkpoint.find_latest_checkpoint(path) if (path / CHECKPOINTS).is_dir() else path
    if within is None or not within.is_dir():
        raise ConfigError(
            f"train.resume_from_checkpoint={requested} is neither a checkpoint nor a run with one"
        )
    return within


def is_own_checkpoint(start: Path | None, folder: Path) -> bool:
    """Whether a checkpoint is one of the run directory's own."""
    # resolved: the same directory may be reached through a link, or by a relative path
    return start is not None and start.resolve().parent == (folder / CHECKPOINTS).resolve()


def broken_contracts(folder: Path) -> list[int]:
    """The contracts that the run in a directory broke, by its own report. Its checkpoints lead to
    the same end: the corrected command is another run, and takes its place."""
    if not ownership.is_contracts(folder / CONTRACTS):
        return []
    try:
        return [contract.id for contract in read_contracts(folder) if contract.status == "failed"]
    except DataError:
        return []


def archive_previous_run(folder: Path, *, going_on: bool) -> Path | None:
    """Clear the way for a new run: what an earlier one wrote moves to FOLDER/previous/N, which is
    returned. ``going_on``: a run that was stopped before its first checkpoint starts again, in the
    files of its earlier lives.

    What marks the directory as a run's moves last: after a kill in between the next run moves the
    rest. Raises DiskError.
    """
    patterns = [*RESULTS, METRICS, CHECKPOINTS, RUN_FILE]
    # in any other directory config.json and weights are a model that somebody put there
    if is_full_finetune_dir(folder):
        patterns += [*MODEL_FILES, SHARDS]
    # else the tokenizer is of a model that is not the run's
    if is_full_finetune_dir(folder) or not (folder / "config.json").exists():
        patterns += TOKENIZER_FILES
    names = [*recorded_adapter_folders(folder), *_matching_names(folder, patterns)]
    if not going_on and is_adapter_folder(folder / START):
        names.append(START)
    # what was measured of its adapter; any other folder of that name is somebody's
    if ownership.is_suites_folder(folder / SUITES):
        names.append(SUITES)
    # metrics and checkpoints of the earlier lives stay where resuming looks for them
    if going_on:
        names = [
            name
            for name in names
            if name not in RUN_MARKER_FILES or not _is_run_marker(folder / name)
        ]
    # the receipt last: without it, checkpoints still there would look like an unfinished run's
    marks = [CHECKPOINTS, RUN_FILE, RECEIPT]
    names.sort(key=lambda name: marks.index(name) if name in marks else -1)
    return ownership.move_to_previous(folder, names) if names else None


def is_full_finetune_dir(folder: Path) -> bool:
    """Whether a directory is that of a run that trained the base's own weights, by its own
    description: a model in any other directory is somebody's, and not ours to move."""
    described = ownership.run_description_of(folder)
    return "lora" in described and described["lora"] is None


def _is_run_marker(path: Path) -> bool:
    """Whether a file of `RUN_MARKER_FILES` is what a run of ours writes there."""
    if path.name == RUN_FILE:
        return bool(ownership.read_run_description(path))
    # metrics and checkpoints have readers of their own, which refuse what they do not know
    return ownership.is_contracts(path) if path.name == CONTRACTS else True


def _written_patterns(jobs: list[str]) -> list[str]:
    """Every name that a run writes in its directory, as patterns."""
    inside = [START] if len(jobs) < 2 else [p for job in jobs for p in (job, f"{job}/{START}")]
    nested = [f"{folder}/{file}" for folder in inside for file in ADAPTER_FILES]
    return [
        *RESULTS, *TOKENIZER_FILES, *MODEL_FILES, SHARDS, STAGED,
        METRICS, RUN_FILE, CHECKPOINTS, "quarantine*.jsonl", *nested,
    ]  # fmt: skip


def _matching_names(folder: Path, patterns: list[str]) -> list[str]:
    """The names in a directory that match one of the patterns; ``a/b`` is looked for as it is."""
    # only the names in it, never a walk: whatever else lies below is not ours to look at
    here = os.listdir(folder) if folder.is_dir() else []
    nested = [
        pattern for pattern in patterns if "/" in pattern and os.path.lexists(folder / pattern)
    ]
    return (
        sorted(name for name in here if any(fnmatchcase(name, pattern) for pattern in patterns))
        + nested
    )


def recorded_adapter_folders(folder: Path) -> list[str]:
    """The folders that a run of several jobs made for their adapters, or a mixture for its experts
    and its router, by its own description."""
    described = ownership.run_description_of(folder)
    names = [
        str(entry.get("name"))
        for key in ("jobs", "experts")
        if isinstance(listed := described.get(key), list)
        for entry in listed
        if isinstance(entry, Mapping)
    ]
    is_mixture = "experts" in described and (folder / ROUTER).is_dir()
    return [ROUTER] * is_mixture + [
        n
        for n in names
        # a run.yaml is text that anybody may have written: no path, no "." and ".." moves a folder
        if n == os.path.basename(n) and n.strip(".") and is_adapter_folder(folder / n)
    ]
