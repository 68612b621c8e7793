"""`lorry sweep data=FILE r=8,16 learning_rate=1e-4,3e-4`: every combination is a job; all train
over one base, and are ranked.

    sweep: {r: [8, 16, 32], learning_rate: [1e-4, 3e-4]}      # the same in a CONFIG.yaml; or a list of combinations

More jobs than `jobs_per_pass` train in several passes, each a run directory of its own with its page
as soon as it has trained, and so does each base. sweep.json in the output directory has the ranking: by held-out loss, or by the last
training loss where there is nothing to evaluate on; with ``seeds=3`` each combination an interval.
sweep.png is the loss by learning rate.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.config import SweepSettings, runs_by_adapter
from lorry.config.schema.run import RunConfig
from lorry.console import VisibleConsole
from lorry.disk import durable
from lorry.errors import ConfigError
from lorry.runs import ownership
from lorry.runs.layout import SWEEP, SWEEP_PLOT, RunDir

if TYPE_CHECKING:
    from lorry.report.sweep import Combination
    from lorry.train.session import TrainResult


def main(settings: SweepSettings) -> int:
    """Train every pass, rank, show, write. The last line of standard output is the directory of the
    best adapter.
    """
    from lorry.backends.distributed.communicator import join_processes
    from lorry.train.session import train_run

    if not settings.jobs and settings.seeds == 1 and len(settings.models) < 2:
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
    from lorry.report.plots import render_panel_png
    from lorry.report.sweep import combine_seeds, rate_panel, sweep_advice
    from lorry.train.artifacts import json_text
    from lorry.train.monitoring.events import terminal_listener
    from lorry.train.session import train_run
    from lorry.train.start import MOVE_AWAY_HINT, claim_output_dir

    rows, run_dirs = list[dict[str, Any]](), list[Path]()
    passes = settings.passes()
    for run in passes:
        claim_output_dir(
            run.output_dir, run.job_names
        )  # of all of them, before the first has trained
    if len(passes) > 1:
        ownership.refuse_foreign(
            {
                settings.output_dir / SWEEP: ownership.recognise_keys("ranked_by", "jobs"),
                settings.output_dir / SWEEP_PLOT: ownership.is_report_picture,
            },
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
        rows += sweep_rows(settings, run, result)
        run_dirs.append(result.path)
        if len(passes) > 1 and number == 1:
            # an earlier sweep's ranking, which the page would show, is of other runs
            earlier = [n for n in (SWEEP, SWEEP_PLOT) if (settings.output_dir / n).exists()]
            ownership.displace_entries(settings.output_dir, earlier)
        # now already: whatever ends the sweep, what has trained is told of
        print(f"report  {write_report([result.path])}", file=sys.stderr)
    held_out = any("eval_loss" in row for row in rows)
    loss = "eval_loss" if held_out else "loss"
    ranked = combine_seeds(rows, loss)
    advice = sweep_advice(ranked, held_out=held_out)
    ranked_by = "held-out loss" if held_out else "last training loss (nothing held out)"
    # of several passes only their folders have been made
    durable.make_directory(settings.output_dir)
    document = {
        "ranked_by": ranked_by,
        # sorted keeps the order of the combinations among equals
        "jobs": sorted(rows, key=lambda row: _ranking_key(row, loss)),
        "combinations": [one.as_json() for one in ranked],
        "advice": advice,
    }
    files = {SWEEP: json_text(document).encode()}
    if (panel := rate_panel(ranked, held_out=held_out)) is not None:
        files[SWEEP_PLOT] = render_panel_png(panel)
    ownership.write_owned_files(settings.output_dir, files)
    VisibleConsole(stderr=True).print(
        table.figure_rows(
            f"sweep, by {ranked_by}", "combination", [_sweep_row_cells(row) for row in ranked]
        )
    )
    for line in advice:
        print(line, file=sys.stderr)
    if SWEEP_PLOT in files:
        print(f"plot    {settings.output_dir / SWEEP_PLOT}", file=sys.stderr)
    # once more: their pages show sweep.json
    for run_dir in run_dirs:
        write_report([run_dir])
    # alone on standard output: `lorry chat $(lorry sweep ...)`
    print(ranked[0].path)


def sweep_rows(sweep: SweepSettings, run: RunConfig, result: TrainResult) -> list[dict[str, Any]]:
    """A row of sweep.json for each job of a pass, ``run``."""
    from lorry.adapters.trainable import parameter_set

    job_by_name, names = {job.name: job for job in run.jobs}, result.adapters
    base, model_settings = sweep.model_label(run.model), sweep.model_settings(run.model)
    # also of a job whose value is the run's own: others of the sweep, in other passes too, have another
    varied = dict.fromkeys(name for job in sweep.tried_jobs() for name in job.own_settings())
    whole = {name: job.model_dump(mode="json") for name, job in runs_by_adapter(run).items()}
    rows = []
    for name in names:
        outcome = result.outcome.jobs[name]
        own = job_by_name[name].own_settings()
        settings = {
            dotted: own[dotted] if dotted in own else whole[name][group][leaf]
            for dotted in varied
            for group, _, leaf in [dotted.partition(".")]
        }
        rows.append(
            {
                "name": name,
                **({"base": base} if base else {}),
                "path": str(RunDir(run.output_dir).adapter(name, len(names))),
                "settings": {**model_settings, **settings},
                "parameters": parameter_set(result.model, name).num_parameters(),
                "steps": outcome.steps,
                "loss": outcome.final_loss,
                "best_step": outcome.best_step,
                "stopped_early": outcome.stopped_early,
                **outcome.last_evaluation,
            }
        )
    return rows


def _ranking_key(row: Mapping[str, Any], loss: str) -> float:
    """Lower is better; what has no such loss, or none that is finite, comes last."""
    value = row.get(loss)
    return math.inf if value is None or not math.isfinite(value) else float(value)


def _sweep_row_cells(one: Combination) -> tuple[str, str, dict[str, str]]:
    from lorry.formatting import format_number

    return (
        one.name,
        one.describe_settings(),
        {
            "loss": one.describe_loss(),
            "seeds": str(len(one.losses)),
            "parameters": format_number(one.parameters),
        },
    )
