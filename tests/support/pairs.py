"""Two processes of one program, started with a store of their own and waited for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lorry.backends.distributed.launch import open_store, worker_environments

ROOT = Path(__file__).resolve().parents[2]


def run_pair(module: str, *arguments: str | Path) -> list[tuple[str, str]]:
    """Run `python -m MODULE ARGUMENTS` as ranks 0 and 1, and return what they printed (standard output,
    standard error). Fails the test where one ends badly."""
    store = open_store()
    children = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            env={**os.environ, **environment},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in worker_environments(2, store.port).values()
    ]
    try:
        printed = [child.communicate() for child in children]
    finally:
        for child in children:
            child.kill()
    codes = [child.returncode for child in children]
    assert codes == [0, 0], "\n".join(errors for _, errors in printed)
    return printed
