"""What a run did not write is never removed and never written over, whatever becomes of the run.

Every name that a run writes is tried. Bytes that are somebody's must be found below the directory
afterwards, unchanged: where they were, or in previous/N.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from test_whole import described as whole_model

from lorry.disk import durable
from lorry.disk.durable import build_directory
from lorry.errors import ConfigError, ContractError, LorryError
from lorry.runs import layout, ownership
from lorry.train import checkpoint, start
from lorry.train.monitoring.events import StepRecord
from lorry.train.session import train_run
from tests.support import tinyrun
from tests.support.faults import FaultyDisk, QuietDisk, die, kill, run_forked
from tests.support.foreign import everything, strange
from tests.support.mortal import RunDisk, World, state_of
from tests.support.tinyrun import quick  # noqa: F401 - a fixture

PLAIN: dict[str, Any] = {
    "eval": None,
    "max_steps": 4,
    "save_steps": 2,
    "eval_strategy": "no",
    "eval_steps": None,
    "load_best_model_at_end": False,
    "early_stopping_patience": None,
    "resume_from_checkpoint": None,
    "target_modules": ["q_proj"],
    "lora_dropout": 0.0,
}
EXAMPLES = {
    layout.SHARDS: "model-00001-of-00002.safetensors",
    "*.tiktoken": "own.tiktoken",
    "quarantine*.jsonl": "quarantine.jsonl",
}
NAMES = [EXAMPLES.get(pattern, pattern) for pattern in start._written_patterns([])]
LATE = [
    name
    for name in (*layout.RESULTS, *layout.TOKENIZER_FILES)
    if name not in (layout.CONTRACTS, "*.tiktoken")
]
OUTCOMES = ("finishes", "fails", "is killed")


class Fails(tinyrun.Heard):
    """Breaks a contract after step 3; ``first`` is called after step 1."""

    def __init__(self, outcome: str, first: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.outcome, self.first = outcome, first

    def step(self, record: StepRecord) -> None:
        if record["step"] == 1:
            self.first()
        if record["step"] == 3 and self.outcome == "fails":
            raise ContractError("contract 3 broken, by hand")
        if record["step"] == 3 and self.outcome == "is killed":
            die()


def train(
    world: World,
    folder: Path,
    outcome: str,
    first: Callable[[], object] = lambda: None,
    **settings: Any,
) -> str:
    """Run in a process of its own, to the end that is wanted; what it said if it failed."""

    def work(where: Path, say: Callable[[int], object]) -> None:
        train_run(world.run(where, **{**PLAIN, **settings}), [], [Fails(outcome, first)])
        say(1)

    done = run_forked(work, RunDisk(), folder)
    assert done.killed == (outcome == "is killed"), done.error
    assert bool(done.said) == (outcome == "finishes"), done.error
    return done.error


# --- a directory that is somebody's


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
@pytest.mark.parametrize("name", NAMES)
def test_a_strangers_file_is_refused_before_anything_is_touched(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    monkeypatch.setattr(
        "lorry.train.setup.base.open_model", lambda *_: pytest.fail("the model was loaded")
    )
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    if kind == "folder":
        path.mkdir()
        (path / "step-00000004").write_bytes(strange(name))
    elif kind == "file":
        path.write_bytes(strange(name))
    else:
        path.symlink_to(tmp_path / "nowhere")
    before = state_of(tmp_path)
    for resume in (None, "auto"):
        with pytest.raises(
            ConfigError,
            match="which Lorry did not write and would overwrite; nothing was changed",
        ) as error:
            train_run(world.run(tmp_path, **{**PLAIN, "resume_from_checkpoint": resume}), [])
        assert Path(name).name in str(error.value)
        assert error.value.exit_code == 2
        assert state_of(tmp_path) == before


@pytest.mark.parametrize("process", ["{}", "[]", '{"name": "web", "script": "app.js"}', "pm2"])
def test_a_strangers_process_json(world: World, tmp_path: Path, process: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "process.json").write_text(process)
    with pytest.raises(LorryError):
        train_run(world.run(tmp_path, **PLAIN), [])
    assert (tmp_path / "run" / "process.json").read_text() == process
    assert len(list((tmp_path / "run").iterdir())) == 1


FOREIGN_MARKS: dict[str, str] = {
    "run.yaml": "model: {name: gpt2}\ntrain: {learning_rate: 1e-3}\ndata: {path: x}\noutput_dir: out\n",
    "receipt.json": '{"code": {"commit": "abc"}, "total": 12.5}',
    "process.json": '{"pid": 1, "born": 1.0, "folder": [1, 2], "begun": null}',
    "checkpoints/step-00000100/manifest.json": '{"format": "other"}',
    "checkpoints/epoch=3.ckpt": "lightning",
}


@pytest.mark.parametrize("name", FOREIGN_MARKS)
def test_the_name_of_a_mark_is_no_mark(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(FOREIGN_MARKS[name])
    assert not ownership.is_run(tmp_path)


def test_every_mark_of_a_run_is_one(world: World, finished: Path, tmp_path: Path) -> None:
    for name in ("run.yaml", "receipt.json", "checkpoints/step-00000004"):
        alone = tmp_path / name.replace("/", "-")
        (alone / name).parent.mkdir(parents=True)
        copy = shutil.copytree if (finished / "run" / name).is_dir() else shutil.copy
        copy(finished / "run" / name, alone / name)
        assert ownership.is_run(alone), name
    train(world, tmp_path, "is killed")
    assert json.loads((tmp_path / "run" / "process.json").read_text())["begun"]
    (tmp_path / "run" / "run.yaml").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert ownership.is_run(tmp_path / "run")


def test_files_that_no_run_writes_are_no_hindrance(world: World, tmp_path: Path) -> None:
    for name in (
        "rows.jsonl",
        "notes.txt",
        "model.old-2024-0badcafe",
        "src/main.py",
        "x.tmp-1-0badcafe",
    ):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(strange(name))
    before = everything(tmp_path)
    train_run(world.run(tmp_path, **PLAIN), [])
    after = everything(tmp_path)
    assert all(after[content] == before[content] for content in before)


# --- beside a run of ours


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("finished")
    train_run(world.run(folder, **PLAIN), [])
    return folder


@pytest.fixture(scope="module")
def failed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that broke a contract before its first checkpoint."""
    folder = tmp_path_factory.mktemp("failed")
    train(world, folder, "fails", save_steps=100)
    assert not (folder / "run" / "checkpoints").exists()
    return folder


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("resume", [None, "auto"])
@pytest.mark.parametrize("earlier", ["finished", "failed"])
def test_what_somebody_put_into_a_run_survives_the_next(
    world: World,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    earlier: str,
    resume: str | None,
    outcome: str,
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(earlier), tmp_path / "copy"))
    names = [name for name in LATE if name != layout.RECEIPT]
    for name in names:
        (folder / "run" / name).write_bytes(strange(name))
    kept = everything(folder) if earlier == "finished" else {}
    # every step is made: there is nothing to fail at
    going_on = earlier == "finished" and resume == "auto"
    train(
        world,
        folder,
        "finishes" if going_on else outcome,
        save_steps=100,
        resume_from_checkpoint=resume,
    )
    after = everything(folder)
    assert {name: after.get(strange(name)) for name in names if strange(name) not in after} == {}
    for name in names:
        place = after[strange(name)][0]
        assert place == f"run/{name}" or fnmatchcase(place, f"run/previous/[0-9]/{name}")
    if earlier == "finished" and resume is None:
        assert all(content in after for content in kept), (
            "nothing of the finished run is gone either"
        )


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_what_appears_while_a_run_goes_is_not_written_over(
    world: World, tmp_path: Path, outcome: str
) -> None:
    names = [*LATE, layout.CONTRACTS]

    def first() -> None:
        for name in names:
            (tmp_path / "run" / name).write_bytes(strange(name))

    train(world, tmp_path, outcome, first)
    after = everything(tmp_path)
    assert [name for name in names if strange(name) not in after] == []
    if outcome == "finishes":
        assert checkpoint.find_latest_checkpoint(tmp_path / "run") is not None
        read = [c["status"] for c in json.loads((tmp_path / "run" / "contracts.json").read_text())]
        assert set(read) == {"held"}
        (place,) = after[strange("README.md")]
        assert place.startswith("run/previous/")


def test_adapters_of_several_jobs(world: World, tmp_path: Path) -> None:
    jobs = [{"name": "a"}, {"name": "b", "r": 3}]
    (tmp_path / "run" / "b").mkdir(parents=True)
    mine = tmp_path / "run" / "b" / "adapter_model.safetensors"
    mine.write_bytes(strange("b"))
    with pytest.raises(
        ConfigError,
        match=r"adapter_model\.safetensors, which Lorry did not write and would overwrite",
    ):
        train_run(world.run(tmp_path, **PLAIN, jobs=jobs), [])
    assert mine.read_bytes() == strange("b")
    mine.unlink()
    (tmp_path / "run" / "b" / "notes.txt").write_bytes(strange("notes"))

    def first() -> None:
        mine.write_bytes(strange("b"))

    train(world, tmp_path, "finishes", first, jobs=jobs)
    train(world, tmp_path, "finishes", jobs=jobs)
    after = everything(tmp_path)
    assert strange("b") in after
    assert strange("notes") in after


@pytest.mark.parametrize("jobs", [[], [{"name": "a"}, {"name": "b", "r": 3}], None])
def test_the_table_has_every_name_that_a_run_writes(
    world: World, tmp_path: Path, jobs: list[Any] | None
) -> None:
    whole = jobs is None
    run = (
        whole_model(world.model, world.data, tmp_path / "run")
        if whole
        else world.run(tmp_path, **PLAIN, jobs=jobs)
    )
    train_run(run, [])
    patterns = start._written_patterns([job["name"] for job in jobs or []])
    written = [
        str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()
    ]
    odd = [
        n
        for n in written
        if not n.startswith("checkpoints/") and not any(fnmatchcase(n, p) for p in patterns)
    ]
    assert odd == []


def test_a_broken_contract_does_not_block_the_corrected_command(
    world: World, tmp_path: Path
) -> None:
    train(world, tmp_path, "fails", save_steps=1)
    run = tmp_path / "run"
    newest = checkpoint.find_latest_checkpoint(run)
    assert newest is not None
    contracts = json.loads((run / "contracts.json").read_text())
    (run / "contracts.json").write_text(
        json.dumps([{**c, "status": "failed"} if c["id"] == 3 else c for c in contracts])
    )
    before = everything(run)
    with pytest.raises(
        ConfigError,
        match=r"(?s)learning_rate .*broke contract 3; without resume_from_checkpoint it is moved away for this one",
    ):
        train_run(
            world.run(
                tmp_path, **{**PLAIN, "learning_rate": 1e-4, "resume_from_checkpoint": "auto"}
            ),
            [],
        )
    heard = tinyrun.Heard()
    train_run(world.run(tmp_path, **{**PLAIN, "learning_rate": 1e-4}), [], [heard])
    assert any(note.endswith(f"was moved to {run / 'previous' / '1'}") for note in heard.notes)
    after = everything(run / "previous" / "1")
    assert {c for c in before if b'"pid"' not in c} <= after.keys()


def test_an_interrupted_run_stays_protected(world: World, tmp_path: Path) -> None:
    train(world, tmp_path, "is killed", save_steps=1)
    with pytest.raises(ConfigError, match="unfinished run"):
        train_run(world.run(tmp_path, **{**PLAIN, "learning_rate": 1e-4}), [])


def test_killed_while_room_is_made_nothing_is_lost(
    world: World, finished: Path, tmp_path: Path
) -> None:
    """At every call of moving a finished run aside; the next run moves the rest."""

    def work(folder: Path, say: Callable[[int], object]) -> None:
        start.archive_previous_run(folder / "run", going_on=False)

    kept = everything(finished)
    for n in count(1):
        folder = Path(shutil.copytree(finished, tmp_path / str(n)))
        killed = run_forked(work, FaultyDisk(n, kill), folder).killed
        assert everything(folder).keys() == kept.keys()
        left = [p.name for p in (folder / "run").iterdir() if p.name != "previous"]
        assert ownership.is_run(folder / "run") or not start._matching_names(
            folder / "run", start._written_patterns([])
        ), left
        assert start.archive_previous_run(folder / "run", going_on=False) is None or left
        assert everything(folder).keys() == kept.keys()
        if not killed:
            break
    assert n > 20


class Stubborn(QuietDisk):
    """Folders for files on their way cannot be removed, as on some network disks."""

    def rmdir(self, path: Path) -> None:
        if ".tmp.lorry-" in path.name:
            raise OSError(errno.EBUSY, "Device or resource busy")
        super().rmdir(path)


def test_a_scratch_folder_that_stays_ends_no_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "disk", Stubborn())
    train_run(world.run(tmp_path, **PLAIN), [])
    assert (tmp_path / "run" / "receipt.json").is_file()
    left = [p.name for p in (tmp_path / "run").iterdir() if ".lorry-" in p.name]
    assert len(left) == 1
    monkeypatch.setattr(durable, "disk", QuietDisk())
    train_run(world.run(tmp_path, **PLAIN), [])  # the next one clears it away
    assert not (tmp_path / "run" / left[0]).exists()


# --- other places


def test_a_folder_filled_while_another_is_built_for_it_stays(tmp_path: Path) -> None:
    target = tmp_path / "merged"
    target.mkdir()

    def build() -> None:
        with build_directory(target) as folder:
            (folder / "new").write_text("new")
            (target / "mine").write_text("mine")

    with pytest.raises(ConfigError, match="already exists and is not empty"):
        build()
    assert everything(tmp_path) == {b"mine": ["merged/mine"]}
    (target / "mine").unlink()
    target.rmdir()
    target.write_text("a file")
    with pytest.raises(ConfigError, match="already exists"):
        build()
    assert target.read_text() == "a file"


def test_previous_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "previous").write_text("mine")
    (tmp_path / "a").write_text("a")
    with pytest.raises(ConfigError, match="previous is not a directory"):
        ownership.move_to_previous(tmp_path, ["a"])
    assert (tmp_path / "a").is_file()


def test_output_dir_that_is_a_file(world: World, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ConfigError, match="is not a directory"):
        train_run(world.run(tmp_path, **PLAIN), [])
    assert (tmp_path / "run").read_text() == "mine"
