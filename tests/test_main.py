"""A signal while modules are imported: never a traceback, never a verb that goes on, in a process
of every verb.

A finder that finds nothing stands first in sys.meta_path and sends the signal at the n-th search,
which is deterministic where a timer would not be.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lorry.cli import VERBS

SRC = Path(__file__).resolve().parent.parent / "src"
SIGNALLED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # one that runs the suite in the background may ignore it

class Sender:
    searches = 0

    def find_spec(self, name, path=None, target=None):
        Sender.searches += 1
        if Sender.searches == {at}:
            signal.raise_signal({number})
        return None

from lorry.cli import main
sys.meta_path.insert(0, Sender())
code = main(sys.argv[1:])
assert Sender.searches >= {at}, f"only {{Sender.searches}} searches"
sys.exit(code)
"""
ARGUMENTS = {
    "sft": ["data=x"],
    "distill": ["data=x", "teacher=y"],
    "sweep": ["data=x", "r=8,16"],
    "push": ["run=x"],
}
EXITS = {signal.SIGTERM: 75, signal.SIGHUP: 75, signal.SIGINT: 130}


def signalled(
    verb: str, at: int, number: signal.Signals, cwd: Path
) -> subprocess.CompletedProcess[str]:
    words = [verb, *ARGUMENTS.get(verb, [])]
    env = {
        **os.environ,
        "PYTHONPATH": str(SRC),
        "LORRY_HOME": str(cwd / "home"),
        "COLUMNS": "300",
        "TERM": "dumb",
    }
    code = SIGNALLED.format(at=at, number=int(number))
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        env=env,
        cwd=cwd,
    )


def check(done: subprocess.CompletedProcess[str], number: signal.Signals) -> None:
    said = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    told = "error: interrupted" if number == signal.SIGINT else f"error: {number.name} arrived"
    assert [line[: len(told)] for line in said] == [told], done.stderr
    assert done.returncode == EXITS[number]
    assert done.stdout == ""


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_every_verb_ends_in_one_line_at_its_first_imports(verb: str, tmp_path: Path) -> None:
    check(signalled(verb, 3, signal.SIGTERM, tmp_path), signal.SIGTERM)


@pytest.mark.parametrize(("at", "number"), [(200, signal.SIGTERM), (700, signal.SIGINT)])
def test_deep_in_torch_too(at: int, number: signal.Signals, tmp_path: Path) -> None:
    check(signalled("chat", at, number, tmp_path), number)
