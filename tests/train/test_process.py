"""process.json: what real processes leave of themselves, alive, stopped, failed, killed; and two
that want one directory.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.disk import durable
from lorry.errors import ConfigError, ContractError, DataError
from lorry.runs.layout import PROCESS
from lorry.runs.process import is_process_alive, read_process, refuse_second
from lorry.train.monitoring.process import record_process, redact_secrets
from tests.support.processes import started, wait_until

HOLD = """
import sys
from pathlib import Path
from lorry.train.monitoring.process import record_process
with record_process(Path(sys.argv[1])) as process:
    if sys.argv[2] == "train":
        process.begin(3, 20)
    print("ready", flush=True)
    sys.stdin.read()  # until whoever started it is gone
"""


@contextmanager
def holding(folder: Path, phase: str = "train") -> Iterator[subprocess.Popen[str]]:
    """A real process at work in a directory; it is gone afterwards."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with started([sys.executable, "-c", HOLD, str(folder), phase], text=True, **pipes) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child


def train_and_fail(
    folder: Path, error: BaseException, first: Callable[[], None] = lambda: None
) -> None:
    with record_process(folder) as process:
        process.begin(0, 5)
        first()
        raise error


def written(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / PROCESS).read_text())
    return found


def test_it_is_there_while_the_run_goes(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    with record_process(folder) as process:
        assert written(folder)["total_steps"] is None
        process.begin(4, 20)
        found = written(folder)
        assert (found["pid"], found["done"], found["total_steps"], found["ended"]) == (
            os.getpid(),
            4,
            20,
            None,
        )
        now = read_process(folder)
        assert now is not None
        assert is_process_alive(now, folder) is True
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (ContractError("contract 3 failed: q_proj"), 5, "contract 3 failed: q_proj"),
        (KeyboardInterrupt(), 130, "KeyboardInterrupt"),
        (ZeroDivisionError("by hand"), 1, "ZeroDivisionError: by hand"),
    ],
)
def test_an_error_is_kept(tmp_path: Path, error: BaseException, code: int, reason: str) -> None:
    with pytest.raises(type(error)):
        train_and_fail(tmp_path, error)
    found = read_process(tmp_path)
    assert found is not None
    assert found.ended is not None
    assert (found.ended.exit_code, found.ended.reason) == (code, reason)
    assert is_process_alive(found, tmp_path) is False
    with record_process(tmp_path):  # the next run has its own
        assert written(tmp_path)["ended"] is None


def test_what_was_wrong_before_training_is_not_the_end_of_an_earlier_run(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        with pytest.raises(DataError), record_process(folder):
            raise DataError("rows.jsonl: no such file")

    fail(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    finished = tmp_path / "finished"
    finished.mkdir()
    (finished / "receipt.json").write_text("{}")
    fail(finished)
    assert [p.name for p in finished.iterdir()] == ["receipt.json"]
    with pytest.raises(ContractError):
        train_and_fail(finished, ContractError("of the earlier run"))
    before = (finished / PROCESS).read_bytes()
    fail(finished)
    assert (finished / PROCESS).read_bytes() == before
    # in the background: the log is there, so there is something to tell of
    logged = tmp_path / "logged"
    logged.mkdir()
    (logged / "log.txt").touch()
    fail(logged)
    assert written(logged)["ended"]["reason"] == "rows.jsonl: no such file"


def test_a_second_process_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with holding(tmp_path) as child:
        with (
            pytest.raises(
                ConfigError, match=f"in use: process {child.pid} has been running there since"
            ),
            record_process(tmp_path),
        ):
            pass
        (tmp_path / PROCESS).rename(tmp_path / "gone")  # as if both had started at the same moment
        with (
            pytest.raises(ConfigError, match="another process has just begun there"),
            record_process(tmp_path),
        ):
            pass
        (tmp_path / "gone").rename(tmp_path / PROCESS)
        child.send_signal(signal.SIGKILL)
        found = read_process(tmp_path)
        wait_until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
        assert found is not None
        assert (found.ended, found.done, found.total_steps) == (None, 3, 20)
        # although its number is not free before its parent asks
        assert is_process_alive(found, tmp_path) is False
        with record_process(tmp_path):
            assert written(tmp_path)["pid"] == os.getpid()


def test_a_number_used_again_a_copy_and_another_machine(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with holding(folder) as child:
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        found = read_process(copy)
        assert found is not None
        assert (is_process_alive(found, folder), is_process_alive(found, copy)) == (True, False)
        refuse_second(copy)
        for change, expected in (
            ({"born": found.born - 100}, False),
            ({"host": "elsewhere"}, None),
            ({"pid": 2**31 - 1}, False),
        ):
            (folder / PROCESS).write_text(json.dumps({**written(copy), **change}))
            changed = read_process(folder)
            assert changed is not None
            assert is_process_alive(changed, folder) is expected, change
            refuse_second(folder)
        os.rename(folder, tmp_path / "moved")
        assert is_process_alive(found, tmp_path / "moved") is True
        assert child.poll() is None


@pytest.mark.parametrize("phase", ["read", "train"])
def test_sigterm_outside_the_loop_is_an_end_too(tmp_path: Path, phase: str) -> None:
    (tmp_path / "log.txt").touch()
    with holding(tmp_path, phase) as child:
        child.terminate()
        assert child.wait() == 1  # the traceback of Interrupted; the command line makes 75 of it
    ended = written(tmp_path)["ended"]
    assert ended["exit_code"] == 75
    assert ended["reason"].startswith("SIGTERM arrived outside the training steps")


class Full(durable.DiskCalls):
    """No file can be made any more."""

    def create(self, path: Path) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_does_not_hide_what_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ContractError, match="the reason"):
        train_and_fail(
            tmp_path,
            ContractError("the reason"),
            lambda: monkeypatch.setattr(durable, "disk", Full()),
        )
    assert written(tmp_path)["ended"] is None
    with (
        pytest.raises(durable.DiskError, match="No space left"),
        record_process(tmp_path / "other"),
    ):
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"pid": 1,\n', r"process\.json:2: not JSON"),
        ("[1]", r"process\.json:1: this was not written by a run; move it away"),
        ("{}", "not written by a run"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / PROCESS).write_text(text)
    with pytest.raises(DataError, match=message):
        read_process(tmp_path)


json_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=9),
    st.lists(st.integers()),
)


@settings(max_examples=40)
@given(
    st.sampled_from(
        [
            "pid",
            "born",
            "host",
            "folder",
            "started",
            "begun",
            "done",
            "total_steps",
            "ended",
            "more",
        ]
    ),
    json_values,
)
def test_any_value_anywhere_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("run")
    with record_process(folder):
        content = {**written(folder), name: value}
        (folder / PROCESS).write_text(json.dumps(content))
        try:
            found = read_process(folder)
        except DataError:
            return
        assert found is not None
        assert is_process_alive(found, folder) in (True, False, None)


def test_secrets_are_not_kept() -> None:
    key = "hf_" + "a1B2" * 8
    words = [
        "lorry",
        "sft",
        f"hub_token={key}",
        "--api-key",
        "hunter2",
        "max_new_tokens=5",
        "data=x",
        key,
        f"url=u:{key}@h",
        "tokenizer=t",
    ]
    kept = [
        "lorry",
        "sft",
        "hub_token=***",
        "--api-key",
        "***",
        "max_new_tokens=5",
        "data=x",
        "***",
        "url=u:***@h",
        "tokenizer=t",
    ]
    assert redact_secrets(words) == kept
