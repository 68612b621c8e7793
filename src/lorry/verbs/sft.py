"""`lorry sft data=FILE`: fine-tune an adapter, write the run directory, say what held and where everything is."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from lorry.config.schema import Run


def main(run: Run, notes: list[str]) -> int:
    """Train, report, print the summary. The last line of standard output is the run directory."""
    from lorry.report import build, table
    from lorry.report.run import load
    from lorry.train.events import for_terminal
    from lorry.train.session import train_sft

    result = train_sft(run, notes, [for_terminal(run.train.logging_steps)])
    page = build([result.path])
    finished = load(result.path)
    console = Console(stderr=True)
    console.print(table.summary(finished), *table.adapters(finished))
    console.print(table.contracts(finished))
    print(f"report  {page}", file=sys.stderr)
    print(f"chat    lorry chat {result.path}", file=sys.stderr)
    print(Path(result.path))
    return 0
