"""Checkpoints survive a kill, a power cut and a failing disk at every single call that changes the
disk.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorry.disk import durable
from lorry.errors import ModelError
from lorry.train.checkpoint import (
    find_latest_checkpoint,
    load_checkpoint,
    remove_checkpoints_after,
    save_checkpoint,
)
from tests.support.faults import (
    FaultyDisk,
    Outcome,
    PowerCut,
    Say,
    breaking,
    failing,
    kill,
    kill_points,
    short,
)
from tests.support.states import STATES, meta, same


@pytest.fixture(scope="module", autouse=True)
def _unsynced_disk() -> Iterator[None]:
    """Tests in this process make no fsync; what fsync is for is tested by cutting the power."""
    before, durable.disk = durable.disk, FaultyDisk()
    yield
    durable.disk = before


def history(run: Path, say: Say) -> None:
    """Versions 1 to 4 are steps 1 to 4; version 5 is step 4 saved again with other content,
    replacing the first.
    """
    for version in (1, 2, 3, 4, 5):
        save_checkpoint(run, min(version, 4), STATES[version], meta(version), keep=2, protect={1})
        say(version)


def check(outcome: Outcome) -> None:
    """What is promised after the history ended anywhere: the last version that was saved, or the
    one then being saved.
    """
    run, reached = outcome.folder, outcome.said[-1] if outcome.said else 0
    try:
        path = find_latest_checkpoint(run)
    except ModelError:  # there are some, and none is whole
        path = None
    if path is None:
        assert reached == 0, f"call {outcome.at}: version {reached} was saved and is gone"
    else:
        tensors, found = load_checkpoint(path)
        version = found["task"]["version"]
        assert version in (reached, reached + 1), (
            f"call {outcome.at}: version {reached} was saved, {version} found"
        )
        assert same(tensors, STATES[version])
        assert found == {**meta(version), "step": min(version, 4)}
    save_checkpoint(run, 9, STATES[9], meta(9), keep=2, protect={1})
    names = sorted(os.listdir(run / "checkpoints"))
    assert all(re.fullmatch(r"step-0000000\d", name) for name in names), (
        f"call {outcome.at}: left over in {names}"
    )
    assert len(names) <= 3
    latest = find_latest_checkpoint(run)
    assert latest is not None
    assert same(load_checkpoint(latest)[0], STATES[9])


def check_all(
    root: Path, make_disk: Callable[[int], FaultyDisk], work: Callable[[Path, Say], None]
) -> int:
    """Check after a disaster at every call; returns how many there were."""
    for outcome in kill_points(root, make_disk, work):
        assert not outcome.error, outcome.error
        check(outcome)
    return outcome.at - 1


DISKS: dict[str, Callable[[int], FaultyDisk]] = {
    "kill -9": lambda n: FaultyDisk(n, kill),
    "power cut, contents lost": lambda n: PowerCut(n, data=True),
    "power cut, names lost": lambda n: PowerCut(n, names=True),
    "power cut, both lost": lambda n: PowerCut(n, data=True, names=True),
}


# what is lost with both is in the suite lost with one: files never synced, folders never synced
@pytest.mark.parametrize(
    "disaster",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "power cut, both lost" else name
        for name in DISKS
    ],
)
def test_a_disaster_at_every_disk_call_leaves_a_whole_checkpoint(
    disaster: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("ERROR")
    points = check_all(tmp_path, DISKS[disaster], history)
    assert points > 100
    with capsys.disabled():
        print(
            f"\n{disaster}: {points} points, after each the last saved checkpoint is whole and the next save works"
        )


class Forgetful(PowerCut):
    """The same machine under a saver that leaves one kind of fsync out."""

    forgotten = ""

    def make(self, kind: str, *args: Any) -> Any:
        return None if kind == self.forgotten else super().make(kind, *args)


@pytest.mark.parametrize(
    ("forgotten", "lost"), [("fsync", {"data": True}), ("fsync_dir", {"names": True})]
)
def test_the_harness_sees_a_missing_fsync(
    forgotten: str, lost: dict[str, bool], tmp_path: Path
) -> None:
    def make_disk(n: int) -> FaultyDisk:
        disk = Forgetful(n, **lost)
        disk.forgotten = forgotten
        return disk

    with pytest.raises(AssertionError, match="was saved"):
        check_all(tmp_path, make_disk, history)


def test_the_harness_sees_a_saver_that_prunes_first(tmp_path: Path) -> None:
    def prune_first(run: Path, say: Say) -> None:
        for version in (1, 2):
            remove_checkpoints_after(run, -1)
            save_checkpoint(run, version, STATES[version], meta(version))
            say(version)

    with pytest.raises(AssertionError, match="version 1 was saved and is gone"):
        check_all(tmp_path, DISKS["kill -9"], prune_first)


def failure(run: Path, disk: FaultyDisk, say: Say) -> durable.DiskError | None:
    """The error that the history ends with on this disk."""
    before, durable.disk = durable.disk, disk
    try:
        history(run, say)
    except durable.DiskError as e:
        return e
    finally:
        durable.disk = before
    return None


FAILURES = {
    "full": (errno.ENOSPC, failing(errno.ENOSPC)),
    "error": (errno.EIO, failing(errno.EIO)),
    "gone": (errno.EIO, breaking),
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_failing_call_names_its_place_and_loses_nothing(how: str, tmp_path: Path) -> None:
    code, fault = FAILURES[how]
    for n in itertools.count(1):
        run, said = tmp_path / str(n), bytearray()
        run.mkdir()
        error = failure(run, FaultyDisk(n, fault), said.append)
        if error is None:
            break
        assert error.errno == code
        assert str(error).startswith(str(run))
        assert os.strerror(code) in str(error)
        check(Outcome(run, n, killed=False, error="", said=bytes(said)))
    assert n > 100


def test_writes_that_stop_short_are_continued(tmp_path: Path) -> None:
    class Short(FaultyDisk):
        def make(self, kind: str, *args: Any) -> Any:
            return (
                super().make(kind, args[0], args[1][:7])
                if kind == "write"
                else super().make(kind, *args)
            )

    before, durable.disk = durable.disk, Short()
    path = save_checkpoint(tmp_path, 1, STATES[1], meta(1))
    durable.disk = FaultyDisk(8, short)
    again = save_checkpoint(tmp_path, 2, STATES[2], meta(2))
    durable.disk = before
    assert same(load_checkpoint(path)[0], STATES[1])
    assert same(load_checkpoint(again)[0], STATES[2])


def test_the_order_of_a_commit(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, STATES[1], meta(1))
    before, durable.disk = durable.disk, FaultyDisk()
    save_checkpoint(tmp_path, 2, STATES[2], meta(2), keep=1)
    trace = [
        (kind, re.sub(r"\.lorry-\d+-[0-9a-f]{8}", "", str(Path(path).relative_to(tmp_path))))
        for kind, path in durable.disk.trace
    ]
    durable.disk = before
    temp, gone = "checkpoints/step-00000002.tmp", "checkpoints/step-00000001.gone"
    files = ("state.safetensors", "meta.json", "manifest.json")
    each = [
        [(kind, f"{temp}/{name}") for kind in ("create", "write", "fsync", "close")]
        for name in files
    ]
    assert [call for call, _ in itertools.groupby(trace)] == [
        ("mkdir", temp),
        *itertools.chain(*each),
        ("fsync_dir", temp),
        ("rename", "checkpoints/step-00000002"),
        ("fsync_dir", "checkpoints"),
        ("rename", gone),
        ("fsync_dir", "checkpoints"),
        *[("unlink", f"{gone}/{name}") for name in sorted(files)],
        ("rmdir", gone),
    ]
