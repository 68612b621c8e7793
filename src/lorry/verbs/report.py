"""`lorry report RUN [RUN ...]`: the tables in the terminal, and one offline HTML page with a PNG, from run files only."""

from __future__ import annotations

from pathlib import Path

from lorry.config.settings import ReportSettings
from lorry.console import Console
from lorry.errors import DataError
from lorry.report import build, table
from lorry.runs.read import load_readable


def main(settings: ReportSettings, notes: list[str]) -> int:
    """Build the page, show the tables, say where the page is (the last line of standard output).

    Returns the exit code of a DataError where one of several runs is damaged: the others are shown, and it is named.
    """
    paths = [Path(run) for run in settings.runs]
    page = build(paths, settings.output_dir)
    runs, damaged = load_readable(paths)
    Console(stderr=True).print(table.show(runs, damaged=damaged))
    print(page)
    return DataError.exit_code if damaged else 0
