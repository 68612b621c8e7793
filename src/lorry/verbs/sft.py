"""`lorry sft data=FILE`: fine-tune an adapter, write the run directory, say what held and where everything is.

With ``background=true`` another process does that and this one returns (background.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

from lorry.config.schema import Run
from lorry.console import Console
from lorry.verbs.open_model import tell


def main(run: Run, notes: list[str]) -> int:
    """Train, report, print the summary. The last line of standard output is the run directory."""
    if run.background:
        from lorry.hub.push import check_push
        from lorry.verbs import background

        check_push(run, tell)
        return background.leave(run, run.task)
    from lorry.api import train
    from lorry.report import build, table
    from lorry.runs.read import load
    from lorry.train.monitoring.signals import raising

    result = train(run, [])  # the command line has told its notes
    with raising(f"arrived while the report was made. The run is complete; `lorry report {result.path}` makes its page"):
        page = build([result.path])
        finished = load(result.path)
        console = Console(stderr=True)
        console.print(table.summary(finished), *table.adapters(finished))
        console.print(table.contracts(finished))
    print(f"report  {page}", file=sys.stderr)
    print(f"chat    lorry chat {result.path}", file=sys.stderr)
    print(Path(result.path))
    return 0
