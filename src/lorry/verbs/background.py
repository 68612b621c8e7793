"""A run that is left alone (`background=true`): the same run in a process of its own, which no
closed terminal ends.

    lorry sft data=people.jsonl output_dir=runs/people background=true
    lorry runs                    # where it stands
    kill -TERM PID                # it saves and ends with exit code 75; resume_from_checkpoint=auto goes on

The process reads its description from RUN/background.yaml and writes what a terminal would show to
RUN/log.txt.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil

from lorry.config import dump_settings
from lorry.config.schema.run import RunConfig
from lorry.disk import durable
from lorry.runs import ownership, process
from lorry.streams import BACKGROUND_VARIABLE
from lorry.train.monitoring.process import LOG_FILE
from lorry.visible import make_visible

DESCRIPTION_FILE = "background.yaml"
LOG_START_MARK = b" lorry "  # in the first line of every log: "--- TIME lorry VERB FILE"
# seconds in which a run usually has read its model and data, so that what is wrong with them is
# told here
START_TIMEOUT = 60.0
LOG_TAIL_LINES = 30  # lines of the log shown when it fails at once


def start_background_run(run: RunConfig, verb: str) -> int:
    """Start the run on its own, wait until it trains (or `START_TIMEOUT` is over) and say how to
    watch and stop it.

    The last line of standard output is the run directory. Where the run fails meanwhile its last
    lines are shown, and its exit code is returned. Raises ConfigError when another process is at
    work in the directory or it holds somebody else's files, and DiskError.
    """
    from lorry.train.start import MOVE_AWAY_HINT, claim_output_dir

    folder = run.output_dir
    claim_output_dir(run.output_dir, run.job_names)
    own_files = {
        folder / LOG_FILE: ownership.recognise_mark(LOG_START_MARK),
        folder / DESCRIPTION_FILE: lambda path: bool(ownership.read_run_description(path)),
    }
    ownership.refuse_foreign(own_files, MOVE_AWAY_HINT)
    durable.make_directory(folder)
    # the child asks again when it begins; here the answer still reaches the terminal
    process.refuse_second(folder)
    durable.write_files(
        folder,
        # background=false, or the child would start a child
        {DESCRIPTION_FILE: dump_settings(run.model_copy(update={"background": False})).encode()},
    )
    # the log of an earlier run in the directory is kept; only what this one adds is shown
    log_start = _file_size(folder / LOG_FILE)
    child = _start_process(folder, verb)
    try:
        is_training = _wait_for_training(child, folder)
    except KeyboardInterrupt:
        # Ctrl-C before it trains: whoever stops the start wants no run that goes on unseen
        child.terminate()
        raise
    code = child.poll()
    if code:
        print(make_visible(_log_tail(folder / LOG_FILE, log_start)), file=sys.stderr)
        print(
            f"the run ended right after its start; its output is in {folder / LOG_FILE}",
            file=sys.stderr,
        )
        # a signal, -N to Popen, is 128 + N to a shell
        return code if code > 0 else 128 - code
    progress = "finished" if code == 0 else "training" if is_training else "still loading"
    hints = {
        "process": f"{child.pid} ({progress})",
        "watch": f"lorry runs {folder.parent}",
        "curves": f"lorry report {folder}",
        "log": f"tail -f {folder / LOG_FILE}",
        "stop": f"kill -TERM {child.pid}   (it saves and ends with exit code 75)",
    }
    for name, text in hints.items():
        print(f"{name:8}{text}", file=sys.stderr)
    print(folder)
    return 0


def _start_process(folder: Path, verb: str) -> subprocess.Popen[bytes]:
    """A session of its own: it has no terminal, so none can hang up on it."""
    command = [sys.executable, "-m", "lorry", verb, str(folder / DESCRIPTION_FILE)]
    with open(folder / LOG_FILE, "ab") as log:
        log.write(
            f"--- {datetime.now(UTC).isoformat(timespec='seconds')} lorry {verb} {folder / DESCRIPTION_FILE}\n".encode()
        )
        # before the child opens it: the first line must be ours, ownership knows the file by it
        log.flush()
        environment = {**os.environ, BACKGROUND_VARIABLE: "1"}
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=environment,
        )


def _wait_for_training(child: subprocess.Popen[bytes], folder: Path) -> bool:
    """Wait until the child trains or ends, or `START_TIMEOUT` is over; return whether it trains."""
    deadline = time.monotonic() + START_TIMEOUT
    while child.poll() is None and time.monotonic() < deadline:
        record = process.read_process(folder)
        # process.json may still be that of an earlier run
        if (
            record is not None
            and record.begun is not None
            and _is_or_started(child.pid, record.pid)
        ):
            return True
        time.sleep(0.05)
    return False


def _is_or_started(child: int, pid: int) -> bool:
    """Whether ``pid`` is the child or, of a run on several processes, a worker that it started."""
    try:
        return pid == child or psutil.Process(pid).ppid() == child
    except psutil.NoSuchProcess:
        return False


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _log_tail(path: Path, start: int) -> str:
    """The last lines that this start added to the log, without the line that says it started."""
    text = path.read_bytes()[start:].decode("utf-8", "replace")
    return "\n".join(text.splitlines()[1:][-LOG_TAIL_LINES:])
