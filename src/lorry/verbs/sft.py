"""`lorry sft data=FILE`: fine-tune an adapter, write the run directory, say what held and where
everything is.

With ``background=true`` another process does that and this one returns (background.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

from lorry.config.schema.run import RunConfig
from lorry.console import VisibleConsole
from lorry.imports import kept_imports
from lorry.verbs.open_model import print_note


def main(run: RunConfig) -> int:
    """Train, report, print the summary. The last line of standard output is the run directory."""
    if run.background:
        from lorry.hub.push import check_push
        from lorry.verbs import background

        # here, where it reaches the terminal: the child's errors go to a log
        check_push(run.train, print_note)
        return background.start_background_run(run, run.task)
    with kept_imports():
        from lorry.backends.distributed.communicator import join_processes
        from lorry.train.session import train_run

    with join_processes(run.backend) as communicator:
        if communicator.rank:  # rank 0 shows, reports and uploads
            train_run(run)
        else:
            _train_and_report(run)
    return 0


def _train_and_report(run: RunConfig) -> None:
    from lorry.hub.push import push_when_finished
    from lorry.report import table, write_report
    from lorry.runs.read import read_run
    from lorry.train.monitoring.events import terminal_listener
    from lorry.train.monitoring.signals import raise_on_signals
    from lorry.train.session import train_run

    listener = terminal_listener(run.train.logging_steps)
    with push_when_finished(run.train, run.output_dir, listener.note):
        result = train_run(run, listeners=[listener])
    # training handles its signals itself; from here on one must not look like a failed run
    with raise_on_signals(
        "arrived while the report was written. The run is complete; `lorry report "
        f"{result.path}` makes its page"
    ):
        page = write_report([result.path])
        finished = read_run(result.path)
        console = VisibleConsole(stderr=True)
        console.print(table.summary_table(finished), *table.adapter_tables(finished))
        console.print(table.contracts_table(finished))
    print(f"report  {page}", file=sys.stderr)
    print(f"chat    lorry chat {result.path}", file=sys.stderr)
    # alone on standard output: RUN=$(lorry sft ...)
    print(Path(result.path))
