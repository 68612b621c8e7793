"""Command lines on several processes, as a launcher starts them: every process runs all of them, one
after the other.

    ended = run_ranked(folder, {"eval": ["eval", run, f"data={rows}"]})
    ended.codes["eval"]  # [0, 0]: of each rank
    ended.printed["eval"][0]  # (standard output, standard error) of rank 0

A fault of one rank is a function of `FAULTS`, named by the words ``FAULT=NAME`` before the verb.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from lorry import cli
from lorry.backends.distributed.launch import open_store, worker_environments

ROOT = Path(__file__).resolve().parents[2]
MARK, FAULT = "=== ", "FAULT="
# {name: (the rank that has it, what changes there while the command runs)}
FAULTS: dict[str, tuple[int, Callable[[ExitStack], None]]] = {}


class Ended(NamedTuple):
    """By command and rank: exit codes, and what was printed on (standard output, standard error)."""

    codes: dict[str, list[int]]
    printed: dict[str, list[tuple[str, str]]]


def run_ranked(
    folder: Path, commands: Mapping[str, Sequence[object]], ranks: int = 2, module: str = __name__
) -> Ended:
    """Run the commands in ``ranks`` processes. ``module``: whose `run_rank` they call."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {name: list(map(str, command)) for name, command in commands.items()}
    (folder / "commands.json").write_text(json.dumps(words))
    store = open_store()
    children = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
            env={**os.environ, "COLUMNS": "200", **environment},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in worker_environments(ranks, store.port).values()
    ]
    try:
        printed = [child.communicate() for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * ranks, printed
    codes = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    parts = [[_parts(text) for text in pair] for pair in printed]
    return Ended(
        {name: [code[name] for code in codes] for name in words},
        {name: [(out[name], err[name]) for out, err in parts] for name in words},
    )


def _parts(text: str) -> dict[str, str]:
    """{command: what was printed} of all that a process printed."""
    named = [part.partition("\n") for part in text.split(MARK)[1:]]
    return {name: rest for name, _, rest in named}


def run_rank(folder: Path) -> None:
    """One rank: run the commands, write their exit codes."""
    codes, rank = dict[str, int](), int(os.environ["RANK"])
    for name, words in json.loads((folder / "commands.json").read_text()).items():
        for stream in (sys.stdout, sys.stderr):
            print(f"{MARK}{name}", file=stream, flush=True)
        fault = words.pop(0).removeprefix(FAULT) if words[0].startswith(FAULT) else ""
        with ExitStack() as changes:
            if fault and FAULTS[fault][0] == rank:
                FAULTS[fault][1](changes)
            codes[name] = cli.main(words)
    (folder / f"rank-{rank}.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
