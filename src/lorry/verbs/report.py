"""`lorry report RUN [RUN ...]`: the tables in the terminal, and one offline HTML page with a PNG,
from run files only.
"""

from __future__ import annotations

from pathlib import Path

from lorry.config.settings import ReportSettings
from lorry.console import VisibleConsole
from lorry.errors import DataError
from lorry.report import table, write_report
from lorry.runs.losses import describe_lost_lines
from lorry.runs.read import read_readable_runs
from lorry.runs.status import list_runs_of, run_state_of
from lorry.verbs.open_model import print_note


def main(settings: ReportSettings) -> int:
    """Build the page, show the tables, say where the page is (the last line of standard output).

    Returns the exit code of a DataError where one of several runs is damaged: the others are shown,
    and it is named.
    """
    asked = [Path(run) for run in settings.runs]
    paths = [run for path in asked for run in list_runs_of(path)]
    output = settings.output_dir
    if output is None and len(asked) == 1 and paths != asked:
        output = asked[0]  # one page for all stages, where they lie
    # first: where no run can be read, nothing is shown
    page = write_report(paths, output)
    runs, damaged = read_readable_runs(paths)
    VisibleConsole(stderr=True).print(table.render_runs(runs, damaged=damaged))
    for run in runs:
        # of a run that goes on after its end lines are taken off on purpose
        if run_state_of(run).state == "finished" and (lost := describe_lost_lines(run.path)):
            print_note(f"warning: {lost}")
    print(page)
    return DataError.exit_code if damaged else 0
