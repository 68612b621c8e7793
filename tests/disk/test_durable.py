"""Files and folders are old or new and never between, whatever call dies; logs are settled and cut."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorry.disk import durable
from lorry.disk.durable import (
    build_directory,
    recover_writes,
    sync_file,
    truncate_file,
    write_directory,
    write_files,
)
from lorry.errors import ConfigError, LorryError, ModelError
from tests.support.faults import FaultyDisk, PowerCut, Say, failing, kill, kill_points

DISKS: list[Callable[[int], FaultyDisk]] = [
    lambda n: FaultyDisk(n, kill),
    lambda n: PowerCut(n, data=True),
    lambda n: PowerCut(n, names=True),
]
OLD, NEW = {"a.json": b"old a", "b.bin": b"old b"}, {"a.json": b"new a" * 100, "c.bin": b"new c"}


@pytest.fixture
def use() -> Iterator[Callable[[FaultyDisk], FaultyDisk]]:
    """Put a disk in place for the rest of the test."""

    def put(disk: FaultyDisk) -> FaultyDisk:
        durable.disk = disk
        return disk

    before = durable.disk
    yield put
    durable.disk = before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_real_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with every true system call, fsync included."""
    monkeypatch.setattr(durable, "disk", durable.DiskCalls())
    write_directory(tmp_path / "deep" / "out", OLD)
    write_directory(tmp_path / "deep" / "out", NEW, replace=True)
    assert contents(tmp_path / "deep" / "out") == NEW
    write_files(tmp_path / "deep" / "out", {"a.json": b"", "d": [b"1", b"", memoryview(b"23")]})
    assert contents(tmp_path / "deep" / "out") == {**NEW, "a.json": b"", "d": b"123"}
    assert os.listdir(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("make_disk", DISKS)
def test_a_replaced_folder_is_old_or_new(
    make_disk: Callable[[int], FaultyDisk], tmp_path: Path
) -> None:
    def work(root: Path, say: Say) -> None:
        for files in (OLD, NEW):
            with build_directory(root / "out", replace=True) as folder:
                for name, data in files.items():
                    (folder / name).write_bytes(data)
            say(1)

    for outcome in kill_points(tmp_path, make_disk, work):
        assert not outcome.error, outcome.error
        recover_writes(outcome.folder, "out")
        assert os.listdir(outcome.folder) in (["out"], [])
        if (outcome.folder / "out").exists() or outcome.said:
            allowed = {0: (OLD,), 1: (OLD, NEW), 2: (NEW,)}[len(outcome.said)]
            assert contents(outcome.folder / "out") in allowed
    assert outcome.at > 15


@pytest.mark.parametrize("make_disk", DISKS)
def test_each_replaced_file_is_old_or_new(
    make_disk: Callable[[int], FaultyDisk], tmp_path: Path
) -> None:
    def work(root: Path, say: Say) -> None:
        for files in (OLD, NEW):
            write_files(root, files)
            say(1)

    for outcome in kill_points(tmp_path, make_disk, work):
        assert not outcome.error, outcome.error
        for name in ("a.json", "b.bin", "c.bin"):
            recover_writes(outcome.folder, name)
        found = contents(outcome.folder)
        assert all(found[name] in (OLD.get(name), NEW.get(name)) for name in found)
        if len(outcome.said) == 1:
            assert found.items() >= {"b.bin": OLD["b.bin"]}.items()
            assert "a.json" in found
        if len(outcome.said) == 2:
            assert found == {**OLD, **NEW}
    assert outcome.at > 15


def test_a_full_disk_leaves_every_old_file(
    tmp_path: Path, use: Callable[[FaultyDisk], FaultyDisk]
) -> None:
    use(FaultyDisk())
    write_files(tmp_path, OLD)
    for n in range(1, 9):  # create, write, fsync, close of each of the two
        use(FaultyDisk(n, failing(28)))
        with pytest.raises(durable.DiskError, match="No space left on device"):
            write_files(tmp_path, {"a.json": b"new", "b.bin": b"new"})
        assert contents(tmp_path) == OLD


def test_a_replacement_that_cannot_move_in_brings_the_old_one_back(
    tmp_path: Path, use: Callable[[FaultyDisk], FaultyDisk]
) -> None:
    calls = use(FaultyDisk())
    write_directory(tmp_path / "out", OLD)
    write_directory(tmp_path / "out", NEW, replace=True)
    moves = [i for i, (kind, _) in enumerate(calls.trace, start=1) if kind == "rename"]
    # the first write ended with the call after its rename
    use(FaultyDisk(moves[2] - (moves[0] + 1), failing(5)))
    with pytest.raises(durable.DiskError):
        write_directory(tmp_path / "out", OLD, replace=True)
    assert contents(tmp_path / "out") == NEW
    assert os.listdir(tmp_path) == ["out"]


def test_an_error_while_building_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise LorryError("no more")

    with pytest.raises(LorryError, match="no more"), build_directory(tmp_path / "out") as folder:
        fill(folder)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    write_directory(tmp_path / "home", OLD)  # an empty folder is no loss
    for target in (tmp_path / "home", tmp_path / "home" / "a.json"):
        with pytest.raises(ConfigError, match="already exists"):
            write_directory(target, NEW)
    assert contents(tmp_path / "home") == OLD


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_bytes(b"mine")
    write_directory(tmp_path / "out", OLD)
    (tmp_path / "out" / "link").symlink_to(tmp_path / "precious")
    write_directory(tmp_path / "out", NEW, replace=True)
    assert contents(tmp_path / "out") == NEW
    assert contents(tmp_path / "precious") == {"file": b"mine"}


def test_recover_touches_the_leftovers_of_its_target_only(tmp_path: Path) -> None:
    names = [
        "out.tmp.lorry-1-0123abcd",
        "out.old.lorry-1-0123abcd",
        "other.tmp.lorry-1-0123abcd",
        "out.tmp",
        "out.tmp-1-XYZ",
        "out",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    recover_writes(tmp_path, "out")
    assert sorted(os.listdir(tmp_path)) == sorted(names[2:])


def test_a_log_is_settled_and_cut(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    assert sync_file(log) == 0
    truncate_file(log, 0)
    log.write_bytes(b"1\n2\n")
    size = sync_file(log)
    assert size == 4
    with log.open("ab") as file:
        file.write(b"3\n{half")
    truncate_file(log, size)
    assert log.read_bytes() == b"1\n2\n"
    truncate_file(log, size)
    with pytest.raises(ModelError, match=r"metrics\.jsonl: 4 bytes, but 5 when"):
        truncate_file(log, 5)


@pytest.mark.parametrize("make_disk", DISKS)
def test_a_settled_log_survives_a_power_cut(
    make_disk: Callable[[int], FaultyDisk], tmp_path: Path
) -> None:
    def work(root: Path, say: Say) -> None:
        fd = durable.disk.create(root / "log")
        durable.disk.write(fd, memoryview(b"1\n2\n"))
        durable.disk.close(fd)
        say(sync_file(root / "log"))
        say(sync_file(root / "absent"))
        # one more call, so that the power is cut after the promise too
        durable.disk.mkdir(root / "later")

    for outcome in kill_points(tmp_path, make_disk, work):
        assert not outcome.error, outcome.error
        if outcome.said:
            assert (outcome.folder / "log").read_bytes() == b"1\n2\n"
    assert outcome.said == b"\4\0"
