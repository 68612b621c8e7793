"""Where a run stands, from directories as runs leave them: alive, finished, stopped, failed,
killed, damaged.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from lorry.disk import durable, integrity
from lorry.report import write_report
from lorry.report.table import render_runs, runs_table
from lorry.runs import series, status
from lorry.runs.read import read_run
from tests.support.processes import started
from tests.support.runs import HOSTILE, dump, full, metrics


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until it is killed; it stands for a run's."""
    with started(["sleep", "1000000"]) as made:
        yield made


def at_work(folder: Path, pid: int, **changes: Any) -> Path:
    """process.json of a process that began 100 seconds ago with 200 steps before it."""
    folder.mkdir(parents=True, exist_ok=True)
    found, ago = os.stat(folder), (datetime.now(UTC) - timedelta(seconds=100)).isoformat()
    born = psutil.Process(pid).create_time() if psutil.pid_exists(pid) else 1.0
    content = {
        "pid": pid,
        "born": born,
        "host": os.uname().nodename,
        "folder": [found.st_dev, found.st_ino],
        "command": ["lorry"],
        "started": ago,
        "begun": ago,
        "done": 0,
        "total_steps": 200,
        "ended": None,
    }
    dump(folder / "process.json", {**content, **changes})
    return folder


def ended(code: int, reason: str) -> dict[str, Any]:
    return {"ended": {"at": datetime.now(UTC).isoformat(), "exit_code": code, "reason": reason}}


def checkpoint(folder: Path, step: int, *, whole: bool = True) -> None:
    path = folder / "checkpoints" / f"step-{step:08d}"
    durable.write_directory(
        path, {"state.safetensors": b"state", "meta.json": b"{}"}, manifest=True
    )
    if not whole:
        (path / "state.safetensors").unlink()


def state(folder: Path) -> status.RunState:
    return status.run_state_of(read_run(folder))


def printed(*parts: Any, width: int = 400) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(*parts)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_running_run_its_page_and_its_tables(
    tmp_path: Path, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = at_work(tmp_path / "run", child.pid)
    metrics(folder, 40)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "lo')
    began = read_run(folder).process
    assert began is not None
    # the run has written right now, 100 s after its start, however long it took to come here
    now = datetime.fromisoformat(began.started).timestamp() + 100
    monkeypatch.setattr(status, "_seconds_now", lambda: now)
    for path in folder.iterdir():
        os.utime(path, (now, now))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    found = state(folder)
    assert (found.state, found.step, found.total, found.pid) == ("running", 40, 200, child.pid)
    assert found.sentence() == "still running: step 40 of 200"
    assert found.tokens_per_second == 800 / 1.25
    assert found.elapsed == pytest.approx(100)
    assert found.eta == pytest.approx(100 / 40 * 160)
    assert found.best is not None
    assert found.best[::2] == ("eval_loss", 40)
    page = write_report([folder])
    assert "still running: step 40 of 200" in page.read_text()
    assert "contracts not reported" not in page.read_text()
    assert "still running: step 40 of 200" in printed(render_runs([read_run(folder)]))
    assert {
        p.name: p.read_bytes() for p in folder.iterdir() if p.suffix not in (".html", ".png")
    } == before


def test_a_run_that_ends_while_it_is_read(
    tmp_path: Path, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = at_work(tmp_path / "run", child.pid)
    metrics(folder, 40)
    read_metrics = series.read_metrics

    def end_behind(path: Path) -> series.MetricsLog:
        log = read_metrics(path)
        if child.poll() is None:  # its last step, a checkpoint, and the end, right behind the read
            metrics(folder, 41)
            checkpoint(folder, 41)
            at_work(folder, child.pid, **ended(75, "SIGTERM arrived"))
            child.kill()
            child.wait()
        return log

    monkeypatch.setattr(series, "read_metrics", end_behind)
    found = state(folder)
    assert (found.state, found.step, found.checkpoint) == ("interrupted", 41, "step-00000041")


def test_a_checkpoint_that_is_pruned_while_it_is_looked_at(
    tmp_path: Path, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = at_work(tmp_path / "run", child.pid)
    checkpoint(folder, 5)
    verify = integrity.verify_directory

    def save_first(path: Path, *, digests: bool = True) -> list[str]:
        if path.name == "step-00000005":
            checkpoint(folder, 10)
            durable.remove_directory(path)
        return verify(path, digests=digests)

    monkeypatch.setattr(integrity, "verify_directory", save_first)
    assert state(folder).checkpoint == "step-00000010"


def test_a_run_that_takes_its_process_file_away_while_it_is_listed(
    tmp_path: Path, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was `unreadable: No such file`."""
    folder = at_work(tmp_path / "run", child.pid)
    metrics(folder, 40)
    stat = Path.stat

    def finish_behind(path: Path, **how: bool) -> os.stat_result:
        found = stat(path, **how)
        if path.name == "process.json":
            path.unlink()
        return found

    monkeypatch.setattr(Path, "stat", finish_behind)
    [found] = status.list_run_states(tmp_path)
    assert found.state != "unreadable", found.detail
    assert found.written == (folder / "metrics.jsonl").stat().st_mtime


def test_before_its_first_step(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    folder = at_work(tmp_path / "run", child.pid, begun=None, total_steps=None)
    assert state(folder).sentence() == "still running: loading and reading"
    assert "still running: loading and reading" in write_report([folder]).read_text()


def test_how_runs_end(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    run = at_work(
        tmp_path / "run",
        child.pid,
        **ended(75, "SIGTERM arrived; step 9 of 200 is saved in run. The same command"),
    )
    metrics(run, 9)
    assert state(run).sentence() == (
        "interrupted at step 9 of 200: SIGTERM arrived; there is no checkpoint to continue from"
    )
    checkpoint(run, 4)
    checkpoint(run, 9, whole=False)
    assert (
        state(run).detail
        == "SIGTERM arrived; resume_from_checkpoint=auto continues from step-00000004"
    )
    at_work(run, child.pid, **ended(6, "loss is NaN at step 9"))
    assert state(run).sentence() == "failed at step 9 of 200: loss is NaN at step 9"
    at_work(run, 2**22 + 1)
    assert state(run).sentence() == (
        "dead at step 9 of 200: process 4194305 ended without an error message; resume_from_checkpoint=auto continues from step-00000004"
    )
    (run / "process.json").unlink()
    assert (
        state(run).sentence()
        == "interrupted at step 9: resume_from_checkpoint=auto continues from step-00000004"
    )
    dump(
        run / "contracts.json",
        [{"id": 3, "name": "all learn", "status": "failed", "detail": "q_proj did not move"}],
    )
    assert state(run).sentence() == "failed at step 9: contract 3, all learn: q_proj did not move"
    finished = state(full(tmp_path / "finished", steps=40))
    assert (finished.state, finished.sentence(), finished.step, finished.total) == (
        "finished",
        "",
        40,
        40,
    )
    assert finished.elapsed == 40 * 1.25


def test_a_run_of_another_machine_is_judged_by_its_files(tmp_path: Path) -> None:
    run = at_work(tmp_path / "run", 7, host="elsewhere")
    metrics(run, 5)
    assert (
        state(run).sentence()
        == "still running: step 5 of 200 (process 7 of elsewhere, according to its files)"
    )
    for name in os.listdir(run):
        os.utime(run / name, (time.time() - 3600,) * 2)
    assert state(run).state == "dead"


def test_the_best_is_what_the_run_calls_best(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "eval_loss": 2.0, "eval_f1": 0.2},
        {"step": 2, "eval_loss": 3.0, "eval_f1": 0.7},
        {"step": 3, "eval_f1": "NaN"},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert state(tmp_path).best == ("eval_loss", 2.0, 1)
    (tmp_path / "run.yaml").write_text(
        "train: {metric_for_best_model: f1, greater_is_better: true}"
    )
    assert state(tmp_path).best == ("f1", 0.7, 2)


def test_what_is_listed_and_in_which_order(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    for number, name in enumerate(
        [
            "old",
            "sweep/pass-1",
            "sweep/pass-2",
            "new/previous/1",
            "new",
            "a/b/c/d/deep",
            "a/.hidden",
        ]
    ):
        metrics(tmp_path / name, 2)
        os.utime(tmp_path / name / "metrics.jsonl", (1e9 + number,) * 2)
    (tmp_path / "new" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "new" / "checkpoints" / "step-00000001" / "run.yaml").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "old")
    assert [s.name for s in status.list_run_states(tmp_path)] == [
        "new",
        "sweep/pass-2",
        "sweep/pass-1",
        "old",
    ]
    assert [s.name for s in status.list_run_states(tmp_path / "old")] == ["old"]
    assert status.list_run_states(tmp_path / "model") == []
    assert status.list_run_states(tmp_path / "nowhere") == []


def test_a_damaged_run_says_where_and_hides_no_other(tmp_path: Path) -> None:
    full(tmp_path / "sound")
    for name, file, text in (
        ("a", "metrics.jsonl", "{\n{}\n"),
        ("b", "run.yaml", "a: ["),
        ("c", "process.json", "{"),
        ("d", "run.yaml", ""),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    found = {s.name: s for s in status.list_run_states(tmp_path)}
    assert {name: s.state for name, s in found.items()} == {
        "sound": "finished", "a": "unreadable", "b": "unreadable", "c": "unreadable", "d": "dead",
    }  # fmt: skip
    for name, where in (
        ("a", "metrics.jsonl:1: "),
        ("b", "run.yaml:1: "),
        ("c", "process.json:1: "),
    ):
        assert found[name].detail.startswith(str(tmp_path / name / where)), found[name].detail


@pytest.mark.parametrize("width", [60, 90, 400])
def test_the_table(tmp_path: Path, child: subprocess.Popen[bytes], width: int) -> None:
    metrics(at_work(tmp_path / "going", child.pid), 40)
    full(tmp_path / "done", text="T")
    found = status.list_run_states(tmp_path)
    out = printed(runs_table(found, time.time(), width), width=width)
    assert all(len(line) <= width for line in out.splitlines())
    if width > 60:
        rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
        assert rows["going"].split()[1:3] == ["running", "40/200"]
        assert rows["done"].split()[1:3] == ["finished", "40"]
    if width == 400:
        assert "model T, T, rank 16, alpha 32" in rows["done"]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_cannot_reach_the_terminal(
    tmp_path: Path, hostile: str, child: subprocess.Popen[bytes]
) -> None:
    run = full(tmp_path / "r", text=hostile)
    at_work(run, child.pid, **ended(1, hostile))
    out = printed(
        runs_table(status.list_run_states(tmp_path), time.time(), 2000),
        render_runs([read_run(run)]),
        width=2000,
    )
    assert not {"\x1b", "\x07", "\x00", "\u202e", "\ud800"} & set(out)
