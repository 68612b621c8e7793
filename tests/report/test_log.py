"""metrics.jsonl: what is written is read back, whatever a kill left behind."""

from __future__ import annotations

import errno
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.disk import durable
from lorry.errors import DataError
from lorry.runs.metrics import MetricsWriter, drop_metrics_after, iter_metrics
from lorry.runs.series import read_metrics

values = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.integers(-(10**12), 10**12))
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(
    lambda n: n != "step" and not n.startswith("eval_")
)
records = st.lists(st.dictionaries(names, values, max_size=4), max_size=12)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with MetricsWriter(path) as writer:
        for row in rows:
            writer.write(row)


def same(one: Any, other: Any) -> bool:
    return repr(one) == repr(other)  # NaN equals itself here, and 1 differs from 1.0


@settings(max_examples=60, deadline=None)
@given(records)
def test_round_trip_and_strict_json(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    numbered = [{"step": i, **row} for i, row in enumerate(rows, 1)]
    write(path, numbered)
    assert same(read_metrics(path).records, numbered)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    for line in path.read_text("utf-8").split("\n")[:-1]:
        json.loads(line, parse_constant=refuse)


@settings(max_examples=60, deadline=None)
@given(rows=records.filter(bool), data=st.data())
def test_any_cut_of_the_file_loses_at_most_the_last_line(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    numbered = [{"step": i, **row} for i, row in enumerate(rows, 1)]
    write(path, numbered)
    whole = path.read_bytes()
    end = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:end])
    finished = whole[:end].count(b"\n")
    shown = read_metrics(path).records
    assert len(shown) - finished in (0, 1)  # one more where only the line end was lost
    assert same(shown, numbered[: len(shown)])
    write(path, numbered[len(shown) :])  # a restarted writer goes on as if nothing had happened
    assert path.read_bytes() == whole


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(0, 12),
    step=st.integers(0, 14),
    tail=st.sampled_from(["", '{"step": 99', '{"step": 99}']),
)
def test_cut_after_keeps_bytes_up_to_the_step(
    tmp_path_factory: pytest.TempPathFactory, count: int, step: int, tail: str
) -> None:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    lines = []
    for i in range(1, count + 1):
        lines.append(f'{{"step":{i},   "loss":0.{i}}}\n')
        if i % 3 == 0:
            lines.append(f'{{"step": {i}, "eval_loss": 1.0}}\n')
    path.write_text("".join(lines) + tail)
    expected = [line for line in lines if json.loads(line)["step"] <= step]
    dropped = drop_metrics_after(path, step)
    assert path.read_text() == "".join(expected)
    assert dropped == len(lines) - len(expected) + bool(tail)
    assert drop_metrics_after(path, step) == 0
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_cut_after_does_not_touch_what_needs_no_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert drop_metrics_after(path, 3) == 0
    assert not path.exists()
    write(path, [{"step": 1}])
    before = path.stat()
    assert drop_metrics_after(path, 3) == 0
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


class Broken(durable.DiskCalls):
    """A disk that refuses one kind of call, after taking ``room`` bytes of a write."""

    def __init__(self, call: str, room: int = 0) -> None:
        self.call, self.room = call, room

    def fsync(self, fd: int) -> None:
        self._refuse("fsync")

    def rename(self, old: Path, new: Path) -> None:
        self._refuse("rename")

    def write(self, fd: int, data: memoryview) -> int:
        if self.call == "write" and not self.room:
            self._refuse("write")
        taken, self.room = (self.room, 0) if self.call == "write" else (len(data), 0)
        return super().write(fd, data[:taken])

    def _refuse(self, call: str) -> None:
        if self.call == call:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_failed_replacement_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [{"step": 1}, {"step": 2}])
    content = path.read_bytes()
    monkeypatch.setattr(durable, "disk", Broken(call))
    with pytest.raises(durable.DiskError, match="No space left"):
        drop_metrics_after(path, 1)
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_is_named_and_the_next_writer_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": 1})
        monkeypatch.setattr(durable, "disk", Broken("write", room=5))
        with pytest.raises(durable.DiskError, match=r"metrics\.jsonl: No space left"):
            writer.write({"step": 2})
        monkeypatch.undo()
    assert path.read_bytes() == b'{"step": 1}\n{"ste'
    write(path, [{"step": 2}])
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_killed_writer_loses_nothing_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom lorry.runs.metrics import MetricsWriter\n"
        "w = MetricsWriter(Path(sys.argv[1]))\n"
        "for i in range(1, 51): w.write({'step': i})\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [r["step"] for r in read_metrics(path).records] == list(range(1, 51))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 2, "loss"', r"metrics\.jsonl:2: not JSON"),
        ("[1, 2]", r":2: a metrics line is a JSON object, got list"),
        ('{"loss": 1.0}', r":2: 'step' must be a whole number of 0 or more, got 'None'"),
        ('{"step": 1.5}', r":2: 'step' must be"),
        ('{"step": -1}', r":2: 'step' must be"),
        ('{"step": true}', r":2: 'step' must be"),
        ('{"step": ' + "9" * 5000 + "}", r":2: not JSON"),
        ("[" * 100_000, r":2: not JSON"),
        ('{"step": 1, "loss": "\udcff"}', r":2: not UTF-8"),
    ],
)
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1}\n' + line.encode("utf-8", "surrogateescape") + b'\n{"step": 3}\n'
    )
    with pytest.raises(DataError, match=message):
        list(iter_metrics(path))
    with pytest.raises(DataError, match=message):
        drop_metrics_after(path, 1)


def test_blank_lines_and_windows_line_ends_are_no_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'\n{"step": 1, "loss": 2}\r\n\n{"step": 2, "loss": 1}\n')
    assert [number for number, _ in iter_metrics(path)] == [2, 4]
    assert read_metrics(path).series("loss") == ([1, 2], [2.0, 1.0])


def test_series_take_what_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 2.5, "note": "warm", "flag": true}\n{"step": 2, "loss": "NaN"}\n{"step": 3}\n'
        '{"step": 4, "loss": NaN, "eval_loss": null}\n{"step": 5, "loss": ' + "1" * 400 + "}\n"
    )
    log = read_metrics(path)
    steps, losses = log.series("loss")
    assert steps == [1, 2, 4, 5]
    assert losses[0] == 2.5
    assert math.isnan(losses[1])
    assert math.isnan(losses[2])
    assert losses[3] == math.inf
    assert log.names() == ["loss"]


def test_a_restarted_run_shows_its_last_course_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": s, "loss": float(s)} for s in (1, 2, 3)] + [{"step": 3, "eval_loss": 9.0}]
    rows += [{"step": 2, "loss": 20.0}, {"step": 3, "loss": 30.0}, {"step": 3, "eval_loss": 5.0}]
    write(path, rows)
    log = read_metrics(path)
    assert log.series("loss") == ([1, 2, 3], [1.0, 20.0, 30.0])
    assert log.series("eval_loss") == ([3], [5.0])
    assert len(log.notes) == 1
    assert "metrics.jsonl:5: the run starts again at step 2" in log.notes[0]


def test_evaluation_lines_do_not_count_as_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(
        path,
        [
            {"step": 0, "eval_loss": 3.0},
            {"step": 1, "loss": 2.0, "lr": 0.1},
            {"step": 1, "eval_loss": 2.5},
        ],
    )
    log = read_metrics(path)
    assert [r["step"] for r in log.training] == [1]
    assert log.notes == []


def test_the_writer_refuses_a_record_without_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer, pytest.raises(DataError, match="'step' must be"):
        writer.write({"loss": 1.0})
    assert path.read_bytes() == b""
    with pytest.raises(durable.DiskError, match="Bad file descriptor"):
        writer.write({"step": 1})


def test_an_absent_file_is_an_empty_log(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl").records == []
