"""Ranks of one program: started with a store of their own, and waited for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lorry.backends.distributed.launch import open_store, worker_environments

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(
    module: str, *arguments: str | Path, ranks: int = 2, **environment: str
) -> list[tuple[str, str]]:
    """Run `python -m MODULE ARGUMENTS` as so many ranks, and return what each printed (standard output,
    standard error). Fails the test where one ends badly."""
    ended = await_ranks(module, *arguments, ranks=ranks, **environment)
    assert [code for code, _, _ in ended] == [0] * ranks, "\n".join(err for _, _, err in ended)
    return [(out, err) for _, out, err in ended]


def await_ranks(
    module: str, *arguments: str | Path, ranks: int = 2, **environment: str
) -> list[tuple[int, str, str]]:
    """The same; (exit code, standard output, standard error) of each, whatever became of it."""
    store = open_store()
    children = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            env={**os.environ, **of_rank, **environment},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for of_rank in worker_environments(ranks, store.port).values()
    ]
    try:
        printed = [child.communicate() for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, *texts) for child, texts in zip(children, printed, strict=True)]
