"""A run that is left alone (`background=true`): the same run in a process of its own, which no closed terminal ends.

    lorry sft data=people.jsonl output_dir=runs/people background=true
    lorry runs                    # where it stands
    kill -TERM PID                # it saves and ends with exit code 75; resume_from_checkpoint=auto goes on

The process reads its description from RUN/background.yaml and writes what a terminal would show to RUN/log.txt.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from lorry.config import dump
from lorry.config.schema import Run
from lorry.disk import durable
from lorry.runs import ownership, process
from lorry.streams import BACKGROUND
from lorry.train.monitoring.process import LOG
from lorry.visible import visible

DESCRIPTION = "background.yaml"
STARTED = b" lorry "  # in the first line of every log: "--- TIME lorry VERB FILE"
PATIENCE = 60.0  # seconds in which a run usually has read its model and data, so that what is wrong with them is told here
TAIL = 30  # lines of the log shown when it fails at once


def leave(run: Run, verb: str) -> int:
    """Start the run on its own, wait until it trains (or `PATIENCE` is over) and say how to watch and stop it.

    The last line of standard output is the run directory. Where the run fails meanwhile its last lines are shown, and its exit
    code is returned. Raises ConfigError when another process is at work in the directory or it holds somebody else's files, and
    DiskError.
    """
    from lorry.train.start import OTHERWISE, claim

    folder = run.output_dir
    claim(run)
    ours = {folder / LOG: ownership.says(STARTED), folder / DESCRIPTION: lambda path: bool(ownership.description(path))}
    ownership.refuse_foreign(ours, OTHERWISE)
    durable.make_directory(folder)
    process.refuse_second(folder)
    durable.write_files(folder, {DESCRIPTION: dump(run.model_copy(update={"background": False})).encode()})
    start = _size(folder / LOG)
    child = _start(folder, verb)
    try:
        at_work = _wait(child, folder)
    except KeyboardInterrupt:
        child.terminate()
        raise
    code = child.poll()
    if code:
        print(visible(_tail(folder / LOG, start)), file=sys.stderr)
        print(f"the run ended at once; all it said is in {folder / LOG}", file=sys.stderr)
        return code if code > 0 else 128 - code
    done = "finished" if code == 0 else "training" if at_work else "still loading"
    lines = {
        "process": f"{child.pid} ({done})", "watch": f"lorry runs {folder.parent}", "curves": f"lorry report {folder}",
        "log": f"tail -f {folder / LOG}", "stop": f"kill -TERM {child.pid}   (it saves and ends with exit code 75)",
    }  # fmt: skip
    for name, text in lines.items():
        print(f"{name:8}{text}", file=sys.stderr)
    print(folder)
    return 0


def _start(folder: Path, verb: str) -> subprocess.Popen[bytes]:
    """A session of its own: it has no terminal, so none can hang up on it."""
    command = [sys.executable, "-m", "lorry", verb, str(folder / DESCRIPTION)]
    with open(folder / LOG, "ab") as log:
        log.write(f"--- {datetime.now(UTC).isoformat(timespec='seconds')} lorry {verb} {folder / DESCRIPTION}\n".encode())
        log.flush()
        alone = {**os.environ, BACKGROUND: "1"}
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=alone)


def _wait(child: subprocess.Popen[bytes], folder: Path) -> bool:
    """Until the child trains or ends, or patience does; whether it trains."""
    until = time.monotonic() + PATIENCE
    while child.poll() is None and time.monotonic() < until:
        found = process.read(folder)
        if found is not None and found.pid == child.pid and found.begun is not None:
            return True
        time.sleep(0.05)
    return False


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tail(path: Path, start: int) -> str:
    """The last lines that this start added to the log, without the line that says it started."""
    text = path.read_bytes()[start:].decode("utf-8", "replace")
    return "\n".join(text.splitlines()[1:][-TAIL:])
