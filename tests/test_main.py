"""A signal while modules are imported: never a traceback, never a verb that goes on, in a process
of every verb.

A finder that finds nothing stands first in sys.meta_path and sends the signal at the n-th search,
which is deterministic where a timer would not be. Processes that end at their first imports are
clones of one that has made those of the command line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lorry.cli import VERBS

SRC = Path(__file__).resolve().parent.parent / "src"
SENDER = """
import json, os, signal, sys, traceback
signal.signal(signal.SIGINT, signal.default_int_handler)  # one that runs the suite in the background may ignore it

class Sender:
    def __init__(self, at, number):
        self.at, self.number, self.searches = at, number, 0

    def find_spec(self, name, path=None, target=None):
        self.searches += 1
        if self.searches == self.at:
            signal.raise_signal(self.number)
        return None

def signalled(words, at, number):
    sender = Sender(at, number)
    sys.meta_path.insert(0, sender)
    code = main(words)
    assert sender.searches >= at, f"only {sender.searches} searches"
    return code

from lorry.cli import main
"""
ALONE = SENDER + "sys.exit(signalled(sys.argv[3:], int(sys.argv[1]), int(sys.argv[2])))"
CLONES = (
    SENDER
    + """
for words in json.loads(sys.argv[3]):
    clone = os.fork()
    if clone == 0:
        code = 99
        for at, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{words[0]}.{stream}", os.O_WRONLY | os.O_CREAT), at)
        try:
            code = signalled(words, int(sys.argv[1]), int(sys.argv[2]))
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(words[0], os.waitstatus_to_exitcode(os.waitpid(clone, 0)[1]), flush=True)
"""
)
ARGUMENTS = {
    "sft": ["data=x"],
    "distill": ["data=x", "teacher=y"],
    "sweep": ["data=x", "r=8,16"],
    "push": ["run=x"],
}
EXITS = {signal.SIGTERM: 75, signal.SIGHUP: 75, signal.SIGINT: 130}


Ended = subprocess.CompletedProcess[str]


def words_of(verb: str) -> list[str]:
    return [verb, *ARGUMENTS.get(verb, [])]


def run_python(code: str, at: int, number: signal.Signals, *argv: str, cwd: Path) -> Ended:
    env = {
        **os.environ,
        "PYTHONPATH": str(SRC),
        "LORRY_HOME": str(cwd / "home"),
        "COLUMNS": "300",
        "TERM": "dumb",
    }
    return subprocess.run(
        [sys.executable, "-c", code, str(at), str(int(number)), *argv],
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


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """{verb: how its process ended after SIGTERM at the third search}."""
    folder = tmp_path_factory.mktemp("clones")
    every = json.dumps([words_of(verb.name) for verb in VERBS])
    done = run_python(CLONES, 3, signal.SIGTERM, every, cwd=folder)
    assert done.returncode == 0, done.stderr
    codes = dict(line.split() for line in done.stdout.splitlines())
    return {
        verb: subprocess.CompletedProcess(
            words_of(verb),
            int(code),
            *((folder / f"{verb}.{stream}").read_text() for stream in ("out", "err")),
        )
        for verb, code in codes.items()
    }


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_every_verb_ends_in_one_line_at_its_first_imports(
    verb: str, ended: dict[str, Ended]
) -> None:
    check(ended[verb], signal.SIGTERM)


@pytest.mark.parametrize(("at", "number"), [(200, signal.SIGTERM), (700, signal.SIGINT)])
def test_deep_in_torch_too(at: int, number: signal.Signals, tmp_path: Path) -> None:
    check(run_python(ALONE, at, number, *words_of("chat"), cwd=tmp_path), number)
