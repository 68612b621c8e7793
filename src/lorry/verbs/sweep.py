"""`lorry sweep data=FILE r=8,16 learning_rate=1e-4,3e-4`: every combination is a job; all train
over one base, and are ranked.

    sweep: {r: [8, 16, 32], learning_rate: [1e-4, 3e-4]}      # the same in a CONFIG.yaml; or a list of combinations

More jobs than `jobs_per_pass` train in several passes, each a run directory of its own. sweep.json
in the output directory has the ranking: by held-out loss, or by the last training loss where there
is nothing to evaluate on.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.config import SweepSettings
from lorry.config.schema import RunConfig
from lorry.console import VisibleConsole
from lorry.disk import durable
from lorry.errors import ConfigError
from lorry.runs import ownership
from lorry.runs.layout import REPORT, SWEEP, RunDir

if TYPE_CHECKING:
    from lorry.train.jobs import RunOutcome


def main(settings: SweepSettings) -> int:
    """Train every pass, rank, show, write. The last line of standard output is the directory of the
    best adapter.
    """
    from lorry.backends.distributed.communicator import join_processes
    from lorry.train.session import train_run

    if not settings.jobs:
        raise ConfigError(
            "nothing to sweep; give several values of a setting, such as r=8,16 or "
            "learning_rate=1e-4,3e-4"
        )
    with join_processes(settings.backend) as communicator:
        if communicator.rank:  # rank 0 shows, ranks and writes
            for run in settings.passes():
                train_run(run)
        else:
            _train_and_rank(settings)
    return 0


def _train_and_rank(settings: SweepSettings) -> None:
    from lorry.hub.push import push_when_finished
    from lorry.report import table, write_report
    from lorry.train import artifacts
    from lorry.train.monitoring.events import terminal_listener
    from lorry.train.session import train_run
    from lorry.train.start import MOVE_AWAY_HINT, claim_output_dir

    rows, paths = list[dict[str, Any]](), list[Path]()
    passes = settings.passes()
    for run in passes:
        claim_output_dir(
            run.output_dir, run.job_names
        )  # of all of them, before the first has trained
    if len(passes) > 1:
        ownership.refuse_foreign(
            {settings.output_dir / SWEEP: ownership.recognise_keys("ranked_by", "jobs")},
            MOVE_AWAY_HINT,
        )
    for number, run in enumerate(passes, 1):
        if len(passes) > 1:
            print(
                f"pass {number} of {len(passes)}: {', '.join(job.name for job in run.jobs)}",
                file=sys.stderr,
            )
        listener = terminal_listener(run.train.logging_steps)
        with push_when_finished(run.train, run.output_dir, listener.note):
            result = train_run(run, listeners=[listener])
        rows += sweep_rows(run, result.adapters, result.outcome)
        paths.append(write_report([result.path]).parent)
    # sorted keeps the order of the combinations among equals
    ranked = sorted(rows, key=_ranking_key)
    # of several passes only their folders have been made
    durable.make_directory(settings.output_dir)
    artifacts.write_json(
        settings.output_dir, SWEEP, {"ranked_by": _ranked_by(rows), "jobs": ranked}
    )
    VisibleConsole(stderr=True).print(
        table.figure_rows(
            f"sweep, by {_ranked_by(rows)}", "job", [_sweep_row_cells(row) for row in ranked]
        )
    )
    for path in paths:
        print(f"report  {path / REPORT}", file=sys.stderr)
    # alone on standard output: `lorry chat $(lorry sweep ...)`
    print(ranked[0]["path"])


def sweep_rows(
    run: RunConfig, adapters: Sequence[str], outcome: RunOutcome
) -> list[dict[str, Any]]:
    """A row of sweep.json for each job of a pass."""

    job_by_name = {job.name: job for job in run.jobs}
    return [
        {
            "name": name,
            "path": str(RunDir(run.output_dir).adapter(name, len(adapters))),
            "settings": job_by_name[name].own_settings(),
            "steps": outcome.jobs[name].steps,
            "loss": outcome.jobs[name].final_loss,
            "best_step": outcome.jobs[name].best_step,
            "stopped_early": outcome.jobs[name].stopped_early,
            **outcome.jobs[name].last_evaluation,
        }
        for name in adapters
    ]


def _ranking_key(row: Mapping[str, Any]) -> tuple[bool, float]:
    """Lower is better; what has no held-out loss comes after what has, and what is not finite last."""
    # a job without an evaluation is ranked by its training loss, behind those that have one
    value = row.get("eval_loss", row["loss"])
    value = math.inf if value is None or not math.isfinite(value) else value
    return "eval_loss" not in row, value


def _ranked_by(rows: Sequence[Mapping[str, Any]]) -> str:
    return (
        "held-out loss"
        if any("eval_loss" in row for row in rows)
        else "last training loss (nothing held out)"
    )


def _sweep_row_cells(row: Mapping[str, Any]) -> tuple[str, str, dict[str, str]]:
    from lorry.formatting import MISSING_VALUE, format_number

    settings = ", ".join(
        f"{name.rpartition('.')[2]} {value}" for name, value in row["settings"].items()
    )
    held_out_loss = (
        {"held-out loss": format_number(row["eval_loss"])}
        if "eval_loss" in row
        else {"held-out loss": MISSING_VALUE}
    )
    return (
        row["name"],
        settings,
        {
            **held_out_loss,
            "last training loss": format_number(row["loss"]),
            "steps": format_number(row["steps"]),
        },
    )
