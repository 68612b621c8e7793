"""`lorry report RUN [RUN ...]`: one offline HTML page and PNG plots, from run files only."""

from __future__ import annotations

from pathlib import Path

from lorry.config.settings import ReportSettings
from lorry.report import build


def main(settings: ReportSettings, notes: list[str]) -> int:
    """Build the page and say where it is."""
    page = build([Path(run) for run in settings.runs], settings.output)
    print(page)
    return 0
