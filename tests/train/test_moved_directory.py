"""A run directory that is moved, removed or replaced while the run is at work, and single files of
it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorry.disk import durable
from lorry.errors import ConfigError, LorryError, ModelError
from lorry.runs.metrics import MetricsWriter, iter_metrics
from lorry.runs.process import RunDirectoryHandle, read_process
from lorry.train.monitoring.events import StepRecord
from lorry.train.session import train_run
from tests.support import tinyrun
from tests.support.mortal import SHAPES, Whole, World, finished, same
from tests.support.tinyrun import quick  # noqa: F401 - a fixture


class Does(tinyrun.Heard):
    """Calls something after a step."""

    def __init__(self, step: int, what: Callable[[], object]) -> None:
        super().__init__()
        self.at, self.what = step, what

    def step(self, record: StepRecord) -> None:
        super().step(record)
        if record["step"] == self.at:
            self.what()


@pytest.mark.parametrize("step", [1, 5, 8, 11])
def test_moved_it_stops_and_nothing_is_made_in_its_place(
    world: World, whole: Whole, tmp_path: Path, step: int
) -> None:
    run, moved = tmp_path / "run", tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    with pytest.raises(
        durable.DiskError, match=rf"was moved, removed or replaced .*output_dir={moved} resume"
    ) as error:
        train_run(
            world.run(tmp_path, **SHAPES["packed"]), [], [Does(step, lambda: run.rename(moved))]
        )
    assert error.value.exit_code == 74
    assert not run.exists()
    process = read_process(moved)
    assert process is not None
    assert process.ended is not None
    assert process.ended.exit_code == 74
    train_run(world.run(moved.parent, **SHAPES["packed"]), [])
    same(finished(moved.parent), whole("packed"), f"moved after step {step}")


@pytest.mark.parametrize("again", [False, True])
def test_removed_or_replaced_nothing_is_written_there(
    world: World, tmp_path: Path, again: bool
) -> None:
    run = tmp_path / "run"

    def remove() -> None:
        shutil.rmtree(run)
        if again:
            run.mkdir()
            (run / "README.md").write_text("another's")

    with pytest.raises(durable.DiskError, match="nothing was written in its place"):
        train_run(world.run(tmp_path, **SHAPES["packed"]), [], [Does(5, remove)])
    assert [p.name for p in run.iterdir()] == ["README.md"] if again else not run.exists()


def test_moved_after_the_last_step(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the adapter is written and read back, the samples are made and the receipt is."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    monkeypatch.setattr("lorry.train.finish.collect_samples", lambda *_: run.rename(moved) and [])
    with pytest.raises(LorryError) as error:
        train_run(world.run(tmp_path, **SHAPES["packed"]), [])
    assert error.value.exit_code == 74
    assert not run.exists()
    assert not (moved / "receipt.json").exists()


def test_a_removed_log_is_put_back_whole(
    world: World, whole: Whole, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "run" / "metrics.jsonl"
    train_run(world.run(tmp_path, **SHAPES["packed"]), [], [Does(5, log.unlink)])
    assert (
        "was removed while the run was going on; it was written again and is complete"
        in caplog.text
    )
    same(finished(tmp_path), whole("packed"), "metrics.jsonl removed")


HARM: dict[str, Callable[[Path], object]] = {
    "cut": lambda log: os.truncate(log, 10),
    "emptied": lambda log: log.write_text(""),
    "written to": lambda log: log.write_text(log.read_text() + '{"step": 1}\n'),
    "replaced": lambda log: os.replace(shutil.copy(log, log.with_name("copy")), log),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_log_that_something_else_changed_stops_the_run(
    world: World, tmp_path: Path, harm: str
) -> None:
    log = tmp_path / "run" / "metrics.jsonl"
    with pytest.raises(
        durable.DiskError, match=r"metrics\.jsonl: another program wrote to it or replaced it"
    ):
        train_run(world.run(tmp_path, **SHAPES["packed"]), [], [Does(5, lambda: HARM[harm](log))])
    assert json.loads((tmp_path / "run" / "process.json").read_text())["ended"]["exit_code"] == 74


@pytest.mark.parametrize("name", ["checkpoints", "process.json"])
def test_other_files_removed_meanwhile_are_no_hindrance(
    world: World, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "run" / name
    remove: Callable[[], object] = (
        (lambda: shutil.rmtree(path)) if name == "checkpoints" else path.unlink
    )
    train_run(
        world.run(tmp_path, **{**SHAPES["packed"], "load_best_model_at_end": False}),
        [],
        [Does(9, remove)],
    )
    assert (tmp_path / "run" / "receipt.json").is_file()


def test_a_best_checkpoint_removed_meanwhile_is_named(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    with pytest.raises(ModelError, match=r"checkpoints/step-\d+/manifest\.json is missing"):
        train_run(
            world.run(tmp_path, **SHAPES["packed"]), [], [Does(11, lambda: shutil.rmtree(folder))]
        )


def test_a_description_removed_meanwhile_is_written_again(
    world: World, whole: Whole, tmp_path: Path
) -> None:
    path = tmp_path / "run" / "run.yaml"
    train_run(world.run(tmp_path, **SHAPES["packed"]), [], [Does(9, path.unlink)])
    same(finished(tmp_path), whole("packed"), "run.yaml removed")


def test_writing_lines(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl") as log:
        for step in range(1, 6):
            log.write({"step": step})
            if step in (2, 3):
                (tmp_path / "metrics.jsonl").unlink()
    assert [record["step"] for _, record in iter_metrics(tmp_path / "metrics.jsonl")] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_a_directory_knows_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with RunDirectoryHandle(tmp_path / "a") as home:
        home.check()
        assert home.now() == tmp_path / "a"
        (tmp_path / "a").rename(tmp_path / "b")
        assert not home.is_there()
        assert home.now() == tmp_path / "b"
        (tmp_path / "a").mkdir()
        assert not home.is_there()
        (tmp_path / "b").rmdir()
        assert home.now() is None
    with pytest.raises(durable.DiskError):
        RunDirectoryHandle(tmp_path / "c")


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_disk_that_does_not_say_where_the_directory_is_ends_no_run(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: object, **options: object) -> os.stat_result:
        raise OSError(code, os.strerror(code))

    with RunDirectoryHandle(tmp_path) as home:
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", failing)
            home.check()
        home.check()


# --- names that no file system takes


@pytest.mark.parametrize("name", ["x" * 300, "x" * 201, "é" * 101, "/".join(["y" * 100] * 45)])
def test_a_name_that_is_too_long_is_refused_with_its_setting(
    world: World, tmp_path: Path, name: str
) -> None:
    with pytest.raises(
        ConfigError, match=r"output_dir.*a name in a path may have at most 200 bytes"
    ):
        tinyrun.described(world.model, world.data, tmp_path / name)


def test_a_name_the_file_system_refuses_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(durable.DiskError, match="File name too long"):
        durable.make_directory(tmp_path / ("x" * 300))
    with pytest.raises(durable.DiskError, match="File name too long"):
        durable.make_directory(tmp_path / ("x" * 300) / "y")
