"""`lorry report RUN [RUN ...]`: the tables in the terminal, and one offline HTML page with a PNG, from run files only."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from lorry.config.settings import ReportSettings
from lorry.report import build, table
from lorry.report.run import load_all


def main(settings: ReportSettings, notes: list[str]) -> int:
    """Build the page, show the tables, say where the page is (the last line of standard output)."""
    paths = [Path(run) for run in settings.runs]
    page = build(paths, settings.output_dir)
    Console(stderr=True).print(table.show(load_all(paths)))
    print(page)
    return 0
