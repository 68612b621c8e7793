"""`lorry runs [FOLDER]`: every run below a folder and where it stands: running, finished,
interrupted, failed, dead.

    lorry runs                      # those in runs/
    lorry runs experiments format=json

Only files and the table of processes are read; nothing is written, so it may be asked at any time.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.text import Text

from lorry.config.settings import RunsSettings
from lorry.console import VisibleConsole
from lorry.errors import RunFilesError
from lorry.report import table
from lorry.runs import status
from lorry.visible import escape_document, make_visible


def main(settings: RunsSettings) -> int:
    """Print the table with a line for whatever needs one, or the list as JSON. Raises DataError
    when there is no such folder.
    """
    folder = Path(settings.folder)
    if not folder.is_dir():
        raise RunFilesError(
            f"{folder}: no such folder; `lorry runs FOLDER` lists the runs below FOLDER"
        )
    states = status.list_run_states(folder)
    if settings.format == "json":
        print(
            # ensure_ascii=False leaves in names what would turn a terminal's text around
            escape_document(
                json.dumps(
                    [run_state_json(state) for state in states],
                    indent=1,
                    ensure_ascii=False,
                    allow_nan=False,
                )
            )
        )
        return 0
    if not states:
        print(f"no runs in {folder}", file=sys.stderr)
        return 0
    console = VisibleConsole()
    console.print(table.runs_table(states, datetime.now(UTC).timestamp(), console.width))
    for state in states:
        if state.detail:
            console.print(Text(make_visible(f"{state.name}  {state.state}: {state.detail}")))
    return 0


def run_state_json(state: status.RunState) -> dict[str, Any]:
    """A state as plain JSON: times as ISO text, what is not known or not finite as null."""
    values = {
        # JSON has neither NaN nor infinity
        name: None if isinstance(v, float) and not math.isfinite(v) else v
        for name, v in asdict(state).items()
    }
    written = (
        None
        if state.written is None
        else datetime.fromtimestamp(state.written, UTC).isoformat(timespec="seconds")
    )
    best = (
        None
        if state.best is None
        else dict(zip(("metric", "value", "step"), state.best, strict=True))
    )
    return {**values, "path": str(state.path), "written": written, "best": best}
