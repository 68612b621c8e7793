"""`lorry report RUN [RUN ...]`: the tables in the terminal, and one offline HTML page with a PNG,
from run files only.
"""

from __future__ import annotations

from pathlib import Path

from lorry.config.settings import ReportSettings
from lorry.console import VisibleConsole
from lorry.errors import DataError
from lorry.report import table, write_report
from lorry.runs.read import read_readable_runs


def main(settings: ReportSettings) -> int:
    """Build the page, show the tables, say where the page is (the last line of standard output).

    Returns the exit code of a DataError where one of several runs is damaged: the others are shown,
    and it is named.
    """
    paths = [Path(run) for run in settings.runs]
    # first: where no run can be read, nothing is shown
    page = write_report(paths, settings.output_dir)
    runs, damaged = read_readable_runs(paths)
    VisibleConsole(stderr=True).print(table.render_runs(runs, damaged=damaged))
    print(page)
    return DataError.exit_code if damaged else 0
