"""The console script, and ``python -m lorry``: the command line, with Ctrl-C quiet from its first
import on.

Python's own handler would print a traceback where `lorry.cli` and typer are being imported, and
again while the process ends; until and after `lorry.cli.main` has its handlers
(lorry.train.monitoring.signals) the signal ends the process as it does any program.
"""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from lorry.cli import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
