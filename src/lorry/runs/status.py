"""Where a run stands, from its files and the table of processes: what `lorry runs` lists and a
report of a live run says.

    for state in listed(Path("runs")): print(state.name, state.state, state.step, state.total)

running       its process is at work (process.json, see runs/process.py)
finished      it got to its end: receipt.json is the last of its files
interrupted   a signal stopped it, and it saved; or it ended without a message and has a checkpoint but no process.json
failed        it said why: an error, or a contract that did not hold
dead          its process ended without an error message (kill -9, power, out of memory)
unreadable    one of its files is damaged; ``detail`` says where
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lorry.disk import integrity
from lorry.errors import DataError, ModelError, RunInterruptedError
from lorry.formatting import format_number
from lorry.runs.layout import (
    CHECKPOINTS,
    CONTRACTS,
    METRICS,
    PREVIOUS,
    PROCESS,
    RECEIPT,
    RUN_FILE,
    STAGES,
    STEP,
    SWEEP,
)
from lorry.runs.process import RunProcess
from lorry.runs.read import RUN_FILES, RunRecord, read_run
from lorry.runs.series import MetricsLog, is_number
from lorry.runs.summary import describe_run_subject, flatten_config
from lorry.streams import is_left_alone

RUN_MARKS = (PROCESS, RUN_FILE, METRICS)  # what a run directory is known by
SKIPPED_FOLDERS = {CHECKPOINTS, PREVIOUS, "tensorboard", "node_modules"}
DEEPEST_FOLDER = 4  # folders below the one that is listed
RECENT_STEPS = 20  # steps over which speed is measured
# seconds without a written line after which a run of another machine counts as dead
SILENT_SECONDS = 900.0
_STOPPED_CODES = {RunInterruptedError.exit_code, 130}  # by a signal, or Ctrl-C twice


@dataclass(frozen=True)
class RunState:
    """Where one run stands. Times in seconds, ``written`` as seconds since 1970 of the last line or
    file; None: not known.

    ``best``: (name, value, step) of the best evaluation so far by the run's own
    metric_for_best_model.
    """

    path: Path
    name: str
    state: str
    detail: str = ""
    pid: int | None = None
    step: int = 0
    total: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    elapsed: float | None = None
    eta: float | None = None
    written: float | None = None
    model: str = ""
    data: str = ""
    adapter: str = ""
    best: tuple[str, float, int] | None = None
    checkpoint: str | None = None

    def sentence(self) -> str:
        """Where it stands in a line: ``still running: step 40 of 200``; empty for a finished run."""
        at = f"step {format_number(self.step)}" + (
            f" of {format_number(self.total)}" if self.total else ""
        )
        if self.state == "finished":
            return ""
        if self.state == "running":
            return f"still running: {at if self.total else 'loading and reading'}" + (
                f" ({self.detail})" if self.detail else ""
            )
        return f"{self.state} at {at}: {self.detail}"


def list_run_states(folder: Path) -> list[RunState]:
    """The state of every run at or below a folder, the one written to last first."""
    states = [_state_or_why(path, _relative_name(path, folder)) for path in find_runs(folder)]
    # the name too, so that runs written in the same second keep their order
    return sorted(states, key=lambda state: (-(state.written or 0.0), state.name))


def find_runs(folder: Path, depth: int = DEEPEST_FOLDER) -> Iterator[Path]:
    """Run directories at or below a folder; not in checkpoints, `previous`, hidden folders or
    links.
    """
    try:
        inside = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    if any(entry.name in RUN_MARKS for entry in inside):
        yield folder
    for entry in inside if depth else ():
        if (
            entry.is_dir(follow_symlinks=False)
            and entry.name not in SKIPPED_FOLDERS
            and not entry.name.startswith(".")
        ):
            yield from find_runs(Path(entry.path), depth - 1)


def list_runs_of(path: Path) -> list[Path]:
    """The run that a directory is; of one where only stages of `lorry moe` lie (a workspace, or
    experts that are whole models) the runs of its stages, of a sweep of several passes these."""
    is_run = any((path / name).exists() for name in RUN_FILES)
    if is_run or not any((path / name).is_file() for name in (STAGES, SWEEP)):
        return [path]
    return list(find_runs(path)) or [path]


def _relative_name(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path != folder else path.resolve().name


def _state_or_why(path: Path, name: str) -> RunState:
    try:
        return run_state_of(read_run(path, name))
    except DataError as error:
        return RunState(path, name, "unreadable", str(error), written=_last_written(path))
    except OSError as error:  # it moved away while we looked
        return RunState(path, name, "unreadable", f"{error.filename}: {error.strerror}")


def run_state_of(run: RunRecord) -> RunState:
    """The state of a run that was read."""
    process, training, saved = run.process, run.log.training, newest_complete_checkpoint(run.path)
    if process is not None and is_left_alone() and process.pid == os.getpid():
        # this process reports its own run, which is complete; only the others are to wait for its
        # last line
        process = None
    # the last line, or after a resume without one yet what the process began with
    step = training[-1]["step"] if training else process.done if process else 0
    written = _last_written(run.path)
    state, detail = _judge_state(run, process, step, saved, written)
    # a finished run took its process.json away: it made as many steps as it had
    total = process.total_steps if process else step if state == "finished" else None
    losses, subject = run.log.series("loss")[1], describe_run_subject(run)
    live = state == "running"
    return RunState(
        path=run.path,
        name=run.name,
        state=state,
        detail=detail,
        pid=process.pid if process and live else None,
        step=step,
        total=total,
        loss=losses[-1] if losses else None,
        tokens_per_second=_recent_speed(run.log),
        elapsed=_elapsed_seconds(run.log, process, live, written),
        eta=_remaining_seconds(process, step, written) if live else None,
        written=written,
        model=subject.get("model", ""),
        data=subject.get("data", ""),
        adapter=subject.get("adapter", ""),
        best=_best_evaluation(run),
        checkpoint=saved,
    )


def newest_complete_checkpoint(run_dir: Path) -> str | None:
    """The name of the newest checkpoint with all its files, by presence and size; None where there
    is none. A run at work removes older ones meanwhile; then the folder is looked at again.
    """
    folder = run_dir / CHECKPOINTS
    while True:
        names, newest = _checkpoint_names(folder), None
        for name in names:
            try:
                integrity.verify_directory(folder / name, digests=False)
            except ModelError:
                continue
            newest = name
            break
        if newest in names[:1] or names == _checkpoint_names(folder):
            return newest


def _checkpoint_names(folder: Path) -> list[str]:
    """The newest first; empty where there is no such folder."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((n for n in names if STEP.fullmatch(n)), key=lambda n: int(n[5:]), reverse=True)


def _judge_state(
    run: RunRecord, process: RunProcess | None, step: int, saved: str | None, written: float | None
) -> tuple[str, str]:
    """(state, why or what to do)."""
    go_on = (
        f"resume_from_checkpoint=auto continues from {saved}"
        if saved
        else "there is no checkpoint to continue from"
    )
    at_work = False if process is None else run.process_alive
    # of another machine nothing is known but what it writes, and when
    if process is not None and at_work is None:
        at_work = (
            process.ended is None
            and written is not None
            and _seconds_now() - written < SILENT_SECONDS
        )
        if at_work:
            return "running", f"process {process.pid} of {process.host}, according to its files"
    if at_work:
        return "running", ""
    if process is not None and process.ended is not None:
        if process.ended.exit_code in _STOPPED_CODES:
            # the reason goes on with advice of its own time, which may no longer hold
            return "interrupted", f"{process.ended.reason.split(';')[0]}; {go_on}"
        return "failed", process.ended.reason
    # after the process: one at work, or that failed, over a finished run is not that run's end
    if run.receipt is not None:
        return "finished", ""
    if broken := [c for c in run.contracts if c.status == "failed"]:
        return "failed", f"contract {broken[0].id}, {broken[0].name}: {broken[0].detail}"
    if process is not None:
        return "dead", f"process {process.pid} ended without an error message; {go_on}"
    return ("interrupted", go_on) if saved else ("dead", f"no process is known; {go_on}")


def _seconds_now() -> float:
    return datetime.now(UTC).timestamp()


def _seconds_of_time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _last_written(run_dir: Path) -> float | None:
    """When the run's own files were last written; its report is not one of them."""
    times = list[float]()
    for name in (*RUN_MARKS, RECEIPT, CONTRACTS):
        # not asked first whether it is there: a run that ends takes its process.json away
        with contextlib.suppress(FileNotFoundError):
            times.append((run_dir / name).stat().st_mtime)
    return max(times, default=None)


def _recent_speed(log: MetricsLog) -> float | None:
    """Tokens a second over the last steps."""
    timed = [
        r
        for r in log.training[-RECENT_STEPS:]
        if is_number(r.get("tokens")) and is_number(r.get("seconds"))
    ]
    seconds = sum(float(r["seconds"]) for r in timed)
    return sum(float(r["tokens"]) for r in timed) / seconds if 0 < seconds < math.inf else None


def _elapsed_seconds(
    log: MetricsLog, process: RunProcess | None, live: bool, written: float | None
) -> float | None:
    """From the start of the process to its end, or till now; of a run whose process.json is gone,
    the time of its steps.
    """
    if process is None:
        return sum(log.series("seconds")[1]) or None
    end = (
        _seconds_now() if live else _seconds_of_time(process.ended.at) if process.ended else written
    )
    return max(0.0, end - _seconds_of_time(process.started)) if end is not None else None


def _remaining_seconds(
    process: RunProcess | None, step: int, written: float | None
) -> float | None:
    """Seconds left at the pace of this process so far, evaluations and checkpoints included."""
    if (
        process is None
        or process.begun is None
        or not process.total_steps
        or step <= process.done
        or written is None
    ):
        return None
    # of this process alone: earlier lives may have had another machine; clocks may be set back
    pace = max(0.0, written - _seconds_of_time(process.begun)) / (step - process.done)
    return max(0.0, pace * (process.total_steps - step) - (_seconds_now() - written))


def _best_evaluation(run: RunRecord) -> tuple[str, float, int] | None:
    config = flatten_config(run.config)
    name = str(config.get("train.metric_for_best_model") or "eval_loss")
    steps, values = run.log.series(name if name.startswith("eval_") else f"eval_{name}")
    pairs = [
        (value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)
    ]
    if not pairs:
        return None
    # of equal values the earlier step, as the run itself judges
    value, step = (max if config.get("train.greater_is_better") is True else min)(
        pairs, key=lambda pair: pair[0]
    )
    return name, value, step
