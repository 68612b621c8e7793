"""Messages that cannot be written cost nothing; results that cannot be written end the command with
the disk's exit code.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lorry import cli
from lorry.disk.durable import DiskError
from lorry.streams import MessageStream, ResultStream, guard_streams
from tests.support.processes import started

SRC = Path(cli.__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SRC)}
VERB = """
import sys, types
from lorry.cli import main
verb = types.ModuleType("lorry.verbs.doctor")
{body}
sys.modules["lorry.verbs.doctor"] = verb
sys.exit(main(["doctor"]))
"""
FULL = Path("/dev/full")  # every write fails with ENOSPC
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


class Failing(io.StringIO):
    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EPIPE, errno.EAGAIN])
def test_a_message_that_cannot_be_written_is_dropped(code: int) -> None:
    messages = MessageStream(Failing(OSError(code, os.strerror(code))))
    print("step 1/8", file=messages, flush=True)
    assert messages.write("abc") == 3


def test_a_result_that_cannot_be_written_is_a_disk_error_and_a_gone_reader_stays_one() -> None:
    with pytest.raises(DiskError, match="standard output: No space left"):
        print(
            "runs/a", file=ResultStream(Failing(OSError(errno.ENOSPC, "No space left on device")))
        )
    with pytest.raises(BrokenPipeError):
        print("runs/a", file=ResultStream(Failing(BrokenPipeError(errno.EPIPE, "Broken pipe"))))


def test_the_streams_come_back_and_act_as_those_behind(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with guard_streams():
        assert sys.stderr.isatty() == before[1].isatty()
        assert sys.stdout.encoding == before[0].encoding
        print("out")
        print("err", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("out\n", "err\n")


@needs_full
@pytest.mark.parametrize(("stream", "code"), [("stderr", 0), ("stdout", 74)])
def test_a_full_disk_behind_a_command(stream: str, code: int, tmp_path: Path) -> None:
    """`lorry ... 2> log` goes on and ends as if it had been heard; `lorry ... > results` says that
    they are not there.
    """
    body = (
        "def work(settings):\n"
        "    for n in range(3): print('told', n, file=sys.stderr, flush=True)\n"
        f"    open({str(tmp_path / 'done')!r}, 'w').close()\n"
        "    print('result')\n"
        "    return 0\n"
        "verb.main = work"
    )
    other = tmp_path / "other"
    with FULL.open("w") as full, other.open("w") as kept:
        where = (
            {"stderr": full, "stdout": kept}
            if stream == "stderr"
            else {"stderr": kept, "stdout": full}
        )
        done = subprocess.run(
            [sys.executable, "-c", VERB.format(body=body)], env=ENVIRONMENT, check=False, **where
        )
    assert done.returncode == code
    assert (tmp_path / "done").exists()
    text = other.read_text()
    assert "Traceback" not in text
    assert (
        text == "result\n"
        if stream == "stderr"
        else text.endswith(
            "error: standard output: No space left on device; complete files were not changed; "
            "repair the disk and run again\n"
        )
    )


WAITING = """
import os, time
def work(settings):
    print("ready", flush=True)
    while not os.path.exists({flag!r}):
        time.sleep(0.01)
    return 0
verb.main = work
"""


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGUSR1, 0, ""),
        (signal.SIGTERM, 75, "error: SIGTERM arrived; all files written so far are complete\n"),
        (signal.SIGHUP, 75, "error: SIGHUP arrived; all files written so far are complete\n"),
    ],
)
def test_signals_of_schedulers_outside_the_training_steps(
    number: signal.Signals, code: int, said: str, tmp_path: Path
) -> None:
    """SIGUSR1, which would kill a process that has no handler, changes nothing; the others end it
    with a word.
    """
    flag = tmp_path / "go on"
    command = [sys.executable, "-c", VERB.format(body=WAITING.format(flag=str(flag)))]
    with started(
        command,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=_default_handlers,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        if number == signal.SIGUSR1:
            flag.touch()
        _, told = child.communicate()
    assert (child.returncode, told) == (code, said)


def _default_handlers() -> None:
    """Whoever runs this suite may ignore these, as nohup does."""
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_stream_that_is_closed_goes_nowhere(closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`>&-`: Python has None there."""
    monkeypatch.setattr(sys, closed, None)
    with guard_streams():
        print("result")
        print("told", file=sys.stderr)
    assert getattr(sys, closed) is None


@needs_full
def test_help_that_cannot_be_written_is_one_line() -> None:
    with FULL.open("w") as full:
        command = [sys.executable, "-m", "lorry.cli", "--help"]
        done = subprocess.run(
            command, env=ENVIRONMENT, check=False, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr.count("\n")) == (74, 1)
