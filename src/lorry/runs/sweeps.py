"""The one reader of sweep.json, which `lorry sweep` writes beside its passes: the jobs as they ended,
what ranked them, and what it said of them.

    {"ranked_by": "held-out loss", "jobs": [{"name", "path", "settings": {dotted name: value}, "parameters",
     "loss", "eval_loss"}], "combinations": [...], "advice": ["take r16: ..."]}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorry.disk import documents
from lorry.errors import RunFilesError
from lorry.runs.layout import SWEEP

# a run of several bases and passes lies in SWEEP/BASE/pass-N
DEEPEST_PASS = 2
MOST_JOBS_READ = 10_000


@dataclass(frozen=True)
class SweepRecord:
    """A finished sweep: ``jobs``, rows of sweep.json; ``held_out``: whether rows that nobody trained on
    ranked them; ``advice``: sentences."""

    path: Path
    jobs: Sequence[Mapping[str, Any]]
    held_out: bool
    advice: Sequence[str]

    @property
    def loss(self) -> str:
        """The number that ranks."""
        return "eval_loss" if self.held_out else "loss"


def find_sweep(run: Path, jobs: Collection[str]) -> SweepRecord | None:
    """The sweep that a run is a pass of, in its directory or above it: one that has one of the run's
    ``jobs``, by name. Raises DataError for a file that is damaged."""
    folder = run.resolve()
    for path in (folder / SWEEP, *(up / SWEEP for up in [*folder.parents][:DEEPEST_PASS])):
        if not path.is_file():
            continue
        found = read_sweep(path)
        return found if {*jobs} & {job["name"] for job in found.jobs} else None
    return None


def read_sweep(path: Path) -> SweepRecord:
    """Raises DataError for what `lorry sweep` does not write."""
    try:
        content = documents.read_json_document(path, nonfinite=True)
    except OSError as error:
        raise RunFilesError(f"{path}: cannot be read ({error.strerror})") from error
    if not isinstance(content, dict):
        raise RunFilesError(f"{path}: expected an object, got {type(content).__name__}")
    jobs, advice = content.get("jobs"), content.get("advice", [])
    if not isinstance(jobs, list) or not 0 < len(jobs) <= MOST_JOBS_READ or not _are_texts(advice):
        raise RunFilesError(f"{path}: jobs have to be a list of some, and advice a list of texts")
    for number, job in enumerate(jobs, 1):
        if not _is_job(job):
            raise RunFilesError(
                f"{path}: job {number} lacks a name, a path, settings, its parameters or a loss"
            )
    held_out = any("eval_loss" in job for job in jobs)
    return SweepRecord(path, jobs, held_out, advice)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_job(job: Any) -> bool:
    return (
        isinstance(job, dict)
        and all(isinstance(job.get(key), str) for key in ("name", "path"))
        and isinstance(job.get("settings"), dict)
        and _is_rate(job["settings"].get("train.learning_rate"))
        and _is_number(job.get("parameters"))
        and all(job.get(key) is None or _is_number(job[key]) for key in ("loss", "eval_loss"))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rate(value: Any) -> bool:
    """Of a job: positive, since it has a place on an axis of powers; or the same for all, and absent."""
    return value is None or (documents.is_finite_number(value) and value > 0)
