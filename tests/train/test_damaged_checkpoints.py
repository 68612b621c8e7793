"""What is damaged, what cannot be read and what is not there are three answers, and none of them
costs a file.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume_rules import StopAt, Stopped

from lorry.disk import durable, integrity, manifest
from lorry.errors import LorryError, ModelError, NonFiniteError
from lorry.train import checkpoint, jobs
from lorry.train.session import train_run
from tests.support import tinyrun
from tests.support.faults import UnreadableDisk
from tests.support.mortal import SHAPES, Whole, World, finished, same, state_of
from tests.support.tinyrun import quick  # noqa: F401 - a fixture

PACKED = SHAPES["packed"]


@pytest.fixture(scope="module")
def stopped(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed run that was stopped after step 10, with checkpoints of steps 8 and 9."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Stopped):
        train_run(world.run(folder, **PACKED), [], [StopAt(10)])
    assert tinyrun.saved(folder / "run") == [8, 9]
    return folder


@pytest.fixture
def unfinished(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it, to harm."""
    return Path(shutil.copytree(stopped, tmp_path / "copy"))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def directories(folder: Path) -> list[Path]:
    return sorted((folder / "run" / "checkpoints").iterdir())


# --- all of them damaged


@pytest.mark.parametrize("file", ["meta.json", "state.safetensors", "manifest.json"])
@pytest.mark.parametrize("wanted", ["auto", None, "the run"])
def test_none_whole_is_an_error_that_names_them_and_removes_nothing(
    world: World, unfinished: Path, file: str, wanted: str | None
) -> None:
    for path in directories(unfinished):
        flip(path / file)
    before = state_of(unfinished)
    resume = str(unfinished / "run") if wanted == "the run" else wanted
    with pytest.raises(ModelError) as error:
        train_run(world.run(unfinished, **{**PACKED, "resume_from_checkpoint": resume}), [])
    assert error.value.exit_code == 4
    assert all(f"{path / file} is damaged" in str(error.value) for path in directories(unfinished))
    assert "restore one of them" in str(error.value)
    assert state_of(unfinished) == before


def test_one_that_was_repaired_goes_on(world: World, whole: Whole, unfinished: Path) -> None:
    for path in directories(unfinished):
        flip(path / "meta.json")
    with pytest.raises(ModelError):
        train_run(world.run(unfinished, **PACKED), [])
    flip(directories(unfinished)[1] / "meta.json")
    train_run(world.run(unfinished, **PACKED), [])
    damaged = unfinished / "run" / "checkpoints" / "step-00000008.damaged"
    if damaged.is_dir():
        shutil.rmtree(damaged)
    for name in ("adapter_model.safetensors", "metrics.jsonl"):
        assert finished(unfinished)[name] == whole("packed")[name]


def test_a_set_aside_name_is_never_written_over(tmp_path: Path) -> None:
    for _ in range(3):
        path = tmp_path / "checkpoints" / "step-00000005"
        path.mkdir(parents=True)
        checkpoint.remove_checkpoints_after(tmp_path, 4)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-00000005.damaged{end}" for end in ("", "-1", "-2")]


# --- a disk that does not answer


CODES = (errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT)


class Counting(tinyrun.Heard):
    """Keeps how many reads there were when the first step began."""

    def __init__(self, disk: UnreadableDisk) -> None:
        super().__init__()
        self.disk, self.reads = disk, 0

    def start(self, done: int, total: int) -> None:
        self.reads = self.disk.calls


def test_a_read_that_fails_stops_with_74_and_costs_nothing(
    world: World, whole: Whole, unfinished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read that resuming makes below checkpoints/ fails once, in turn: none may be taken for
    damage.
    """
    counted = UnreadableDisk(0, 0, below="/checkpoints")
    heard = Counting(counted)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "disk", counted)
        train_run(
            world.run(Path(shutil.copytree(unfinished, tmp_path / "other")), **PACKED), [], [heard]
        )
    assert heard.reads > 20
    before = state_of(unfinished)
    for n in range(1, heard.reads + 1):
        code = CODES[n % len(CODES)]
        with monkeypatch.context() as patch:
            patch.setattr(durable, "disk", UnreadableDisk(n, code, below="/checkpoints"))
            with pytest.raises(durable.DiskError) as error:
                train_run(world.run(unfinished, **PACKED), [])
        assert (error.value.exit_code, error.value.errno) == (74, code)
        assert "step-0000000" in str(error.value.filename)
        assert state_of(unfinished) == before, f"read {n} failed and something changed"
    train_run(world.run(unfinished, **PACKED), [])
    same(finished(unfinished), whole("packed"), "after reads that failed")


@pytest.mark.parametrize("digests", [True, False])
def test_only_absence_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digests: bool
) -> None:
    target = tmp_path / "whole"
    durable.write_directory(target, {"a": b"x" * 10, "b": b"y"}, manifest=True)
    counting = UnreadableDisk(0, 0)
    monkeypatch.setattr(durable, "disk", counting)
    assert integrity.verify_directory(target, digests=digests) == ["a", "b"]
    assert counting.calls >= (12 if digests else 6)
    for n in range(1, counting.calls + 1):
        for code in (errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT):
            monkeypatch.setattr(durable, "disk", UnreadableDisk(n, code))
            with pytest.raises(durable.DiskError) as error:
                integrity.verify_directory(target, digests=digests)
            assert error.value.errno == code
        monkeypatch.setattr(durable, "disk", UnreadableDisk(n, errno.ENOENT))
        with pytest.raises(ModelError, match="is missing"):
            integrity.verify_directory(target, digests=digests)


# --- directories under another's name


def test_exchanged_directories_are_not_what_their_names_say(
    world: World, unfinished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = directories(unfinished)
    older.rename(older.with_name("x"))
    newer.rename(older)
    older.with_name("x").rename(newer)
    before = state_of(unfinished)
    with pytest.raises(
        ModelError, match=r"step-00000008 holds step 9: the directory was renamed or exchanged"
    ):
        checkpoint.load_checkpoint(older)
    with pytest.raises(
        ModelError, match=r"(?s)step-00000009 holds step 8.*step-00000008 holds step 9"
    ):
        train_run(world.run(unfinished, **PACKED), [])
    assert state_of(unfinished) == before


# --- a meta.json that was altered, with a manifest that fits it


def forge(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Alter meta.json, and write the manifest anew."""
    meta = json.loads((path / "meta.json").read_bytes())
    change(meta)
    (path / "meta.json").write_text(json.dumps(meta))
    entries = {
        name: manifest.ManifestEntry(
            bytes=(path / name).stat().st_size, sha256=integrity.file_digest(path / name)
        )
        for name in ("meta.json", "state.safetensors")
    }
    (path / "manifest.json").write_bytes(manifest.encode_manifest(entries))


def _set(*keys: Any) -> Callable[[dict[str, Any]], None]:
    *way, last, value = keys

    def change(meta: dict[str, Any]) -> None:
        for key in way:
            meta = meta[key]
        meta[last] = value

    return change


FORGED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no config": (lambda m: m.pop("config") and None, "'config' is not an object"),
    "config a list": (_set("config", [1]), "'config' is not an object"),
    "digests null": (_set("digests", None), "'digests' is not an object"),
    "environment text": (_set("environment", "cpu"), "'environment' is not an object"),
    "step negative": (_set("step", -5), "step '-5' is not a whole number"),
    "step a float": (_set("step", 9.0), "step '9.0' is not a whole number"),
    "step true": (_set("step", True), "step 'True' is not a whole number"),
    "step missing": (lambda m: m.pop("step") and None, "step 'None' is not a whole number"),
    "step of another": (_set("step", 8), "holds step 8"),
    "progress a list": (_set("progress", []), "progress is not valid in a checkpoint"),
    "progress missing": (
        lambda m: m.pop("progress") and None,
        "progress is not valid in a checkpoint",
    ),
    "progress of another step": (
        _set("progress", "step", 10),
        "progress.step is 10 in a checkpoint of step 9",
    ),
    "progress text": (
        _set("progress", "step", "9"),
        "progress.step is not valid in a checkpoint",
    ),
    "progress with more": (
        _set("progress", "more", 1),
        "progress.more is not valid in a checkpoint",
    ),
    "no jobs": (_set("progress", "jobs", {}), "progress.jobs are none"),
    "steps beyond": (
        _set("progress", "jobs", "default", "steps", 10),
        "default.steps is 10 at step 9",
    ),
    "steps negative": (
        _set("progress", "jobs", "default", "steps", -1),
        "progress.jobs.default.steps is not",
    ),
    "best beyond": (_set("progress", "jobs", "default", "best_step", 99), "best_step is 99"),
    "loss text": (
        _set("progress", "jobs", "default", "loss", "low"),
        "progress.jobs.default.loss is not",
    ),
    "checks null": (_set("checks", None), "checks is not valid in a checkpoint"),
    "checks a contract 9": (
        _set("checks", "found", [{"id": 9, "name": "", "status": "held", "detail": ""}]),
        "there is no contract 9",
    ),
    "checks odd status": (
        _set("checks", "found", [{"id": 1, "name": "", "status": "fine", "detail": ""}]),
        "checks.found.0.status",
    ),
    "proof a list": (_set("checks", "proof", []), "checks.proof is not"),
    "task a list": (_set("task", []), "the state of the task cannot be read"),
    "huge": (_set("seed", 10**30), "too large"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_meta_is_one_error(world: World, unfinished: Path, name: str) -> None:
    change, message = FORGED[name]
    _, newest = directories(unfinished)
    forge(newest, change)
    before = state_of(unfinished)
    with pytest.raises(LorryError) as error:
        train_run(world.run(unfinished, **{**PACKED, "resume_from_checkpoint": str(newest)}), [])
    assert error.value.exit_code == 4
    assert message in str(error.value)
    assert str(newest) in str(error.value)
    assert state_of(unfinished) == before


def test_progress_beyond_the_end_is_no_finished_run(world: World, unfinished: Path) -> None:
    def change(meta: dict[str, Any]) -> None:
        meta["step"] = meta["progress"]["step"] = 10**9

    newest = directories(unfinished)[1]
    far = newest.rename(newest.with_name("step-1000000000"))
    forge(far, change)
    with pytest.raises(ModelError, match=r"progress.step is 1000000000, and the run has 11 steps"):
        train_run(world.run(unfinished, **PACKED), [])
    assert far.is_dir()


# --- what is not finite is not saved


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_an_infinite_update_leaves_the_last_good_checkpoint(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: bool, strategy: str
) -> None:
    """A rate of 1e38 makes masters infinite in an update whose loss and gradients were finite."""
    steps = 3
    settings: dict[str, Any] = {
        "max_steps": steps if last else 9,
        "save_steps": 1,
        "save_total_limit": 1,
        "eval": None,
        "save_strategy": strategy,
        "load_best_model_at_end": False,
        "early_stopping_patience": None,
        "eval_steps": None,
        "eval_strategy": "no",
    }

    monkeypatch.setattr(
        jobs, "learning_rate_at", lambda step, *_, **__: 1e38 if step == steps - 1 else 1e-3
    )
    with pytest.raises(NonFiniteError) as error:
        train_run(world.run(tmp_path, **settings), [])
    assert error.value.exit_code == 6
    run = tmp_path / "run"
    assert not (run / "adapter_model.safetensors").exists()
    contracts = {c["id"]: c["status"] for c in json.loads((run / "contracts.json").read_text())}
    assert contracts[7] == "failed"
    if strategy == "steps":
        assert "infinite or NaN" in str(error.value)
        newest = checkpoint.find_latest_checkpoint(run)
        assert newest is not None
        assert newest.name == f"step-{steps - 1:08d}"
        assert all(
            bool(t.isfinite().all())
            for t in checkpoint.load_checkpoint(newest)[0].values()
            if t.dtype == torch.float32
        )
