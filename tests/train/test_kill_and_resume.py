"""A run killed anywhere goes on from its last checkpoint and ends as if it had never been stopped, bit for bit.

At every call of a whole run that changes the disk, and at moments between such calls, a real process in that state dies by
SIGKILL (in the middle of the call, if it is a write); what it leaves behind is resumed and compared with an uninterrupted run,
every file of it. Equal leavings are resumed once.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tinyrun
import torch
import yaml
from tinyrun import quick  # noqa: F401 - a fixture

from faults import FaultyDisk, die, kill, run_forked
from lorry import cli
from lorry.backends.local import Local
from lorry.config import Run
from lorry.disk import durable
from lorry.disk.metrics import MetricsWriter
from lorry.errors import ConfigError, DataError, Interrupted
from lorry.models import score
from lorry.train import checkpoint, engine
from lorry.train.events import Record
from lorry.train.session import train_sft

STEPS = 11  # three epochs and a bit: the last save is no multiple of save_steps, an evaluation and a save fall together
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS, "save_steps": 4, "eval_steps": 3, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"],
    "load_best_model_at_end": True, "early_stopping_patience": 9, "resume_from_checkpoint": "auto",
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "packed": {"packing": True, "gradient_accumulation_steps": 2},
    "not packed": {"gradient_accumulation_steps": 2, "eval_strategy": "epoch", "save_strategy": "epoch", "eval_steps": None},
    "streamed": {"streaming": True, "packing": True, "load_best_model_at_end": False},
}
TIMES = ("seconds", "peak_memory_bytes")


@dataclass(frozen=True)
class World:
    """What every run reads."""

    model: Path
    data: Path
    held: Path

    def run(self, folder: Path, **settings: Any) -> Run:
        given = {"eval": str(self.held), **SETTINGS, **settings}
        return tinyrun.described(self.model, self.data, folder / "run", **{k: v for k, v in given.items() if v is not None})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    data = tinyrun.write_rows(root / "data.jsonl", tinyrun.rows(16))
    held = tinyrun.write_rows(root / "held.jsonl", tinyrun.rows(4, start=40))
    return World(tinyrun.model_directory(root / "model"), data, held)


class RunDisk(FaultyDisk):
    """A disk that also knows files it did not open itself, as metrics.jsonl, and where every file is now."""

    def path_of(self, kind: str, args: tuple[Any, ...]) -> Path | str:
        descriptor = bool(args) and isinstance(args[0], int)
        return Path(os.readlink(f"/proc/self/fd/{args[0]}")) if descriptor else super().path_of(kind, args)


class Mortal(RunDisk):
    """At every call, or ``every`` few, a clone of this process is killed; what it leaves is handed to ``left(number, kind)``.

    The clone dies before the call, or when half of a write has got through. This process then goes on; after a write, with
    the other half, as if it had been a short one. The first call of every kind at every place is never left out.
    """

    def __init__(self, left: Callable[[int, str], None], every: int) -> None:
        super().__init__()
        self.left, self.every = left, every
        self.halved = False
        self.places: set[tuple[str, str]] = set()
        self.killed: Counter[str] = Counter()

    def tick(self, kind: str, *args: Any) -> Any:
        self.calls += 1
        place = kind, re.sub(r"\d+", "N", plain_name(Path(self.path_of(kind, args)).name))
        if self.calls % self.every and place in self.places:
            self.halved = False
            return self.make(kind, *args)
        self.places.add(place)
        self.killed[kind] += 1
        self.halved = kind == "write" and len(args[1]) > 1 and not self.halved
        child = os.fork()
        if child == 0:
            if self.halved:
                self.make(kind, args[0], args[1][: len(args[1]) // 2])
            die()
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
        self.left(self.calls, kind)
        return len(args[1]) // 2 if self.halved else self.make(kind, *args)


def plain_name(path: str) -> str:
    """A path without the random part of temporary names."""
    return re.sub(r"-\d+-[0-9a-f]{8}", "", path)


# --- moments that no call to the disk marks


def mark_moments(patch: pytest.MonkeyPatch) -> None:
    """Count the middle of a forward pass, its end, an update and an evaluation as calls of the disk in use."""

    def before(owner: Any, name: str, kind: str) -> None:
        original = getattr(owner, name)

        def marked(*args: Any, **kwargs: Any) -> Any:
            durable.disk.tick(kind)  # type: ignore[attr-defined]
            return original(*args, **kwargs)

        patch.setattr(owner, name, marked)

    before(score, "score_rows", "mid-forward")
    before(Local, "step", "between forward and step")
    before(MetricsWriter, "write", "after step, before metrics")
    before(engine, "evaluate_task", "before evaluation")


MOMENTS = {"mid-forward", "between forward and step", "after step, before metrics", "before evaluation"}


# --- what a finished run is


def finished(folder: Path) -> dict[str, Any]:
    """Every file of a run as a value to compare; what may differ (times, where it ran, how it was started) taken out."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in (folder / "run").rglob("*") if p.is_file()):
        name = str(path.relative_to(folder / "run"))
        if name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
        elif path.name == "meta.json":
            meta = json.loads(path.read_text())
            found[name] = {**meta, "config": _without_place(meta["config"])}
        elif path.name == "manifest.json":
            found[name] = json.loads(path.read_text())["files"].keys()
        elif name == "run.yaml":
            found[name] = _without_place(yaml.safe_load(path.read_text()))
        else:
            found[name] = path.read_bytes()
    return found


def _without_place(config: dict[str, Any]) -> dict[str, Any]:
    train = {k: v for k, v in config["train"].items() if k != "resume_from_checkpoint"}
    return {**config, "train": train, "output_dir": None}


def same(a: dict[str, Any], b: dict[str, Any], where: str) -> None:
    """The two runs left the same files with the same content."""
    assert a.keys() == b.keys(), f"{where}: {sorted(a.keys() ^ b.keys())}"
    for name in a:
        assert a[name] == b[name], f"{where}: {name} differs"


def state_of(folder: Path) -> str:
    """A digest of everything below a folder, the random part of temporary names left out."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*"), key=lambda p: plain_name(str(p))):
        total.update(f"\n{plain_name(str(path.relative_to(folder)))} {path.is_dir()} ".encode())
        if path.is_file():
            total.update(path.read_bytes())
    return total.hexdigest()


# --- the tests


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The uninterrupted run of each shape, made once."""
    done: dict[str, dict[str, Any]] = {}

    def get(shape: str) -> dict[str, Any]:
        if shape not in done:
            folder = tmp_path_factory.mktemp("whole")
            train_sft(world.run(folder, **SHAPES[shape]), [])
            done[shape] = finished(folder)
        return done[shape]

    return get


def killed_everywhere(world: World, root: Path, shape: str, every: int) -> tuple[Counter[str], list[Path]]:
    """Kill a run at every call: (how often at each kind, a folder for each different state that was left)."""
    live, states = root / "live", {}
    live.mkdir()

    def left(number: int, kind: str) -> None:
        digest = state_of(live)
        if digest not in states:
            states[digest] = root / f"{number:04d}-{kind.replace(' ', '-')}"
            shutil.copytree(live, states[digest])

    before, disk = durable.disk, Mortal(left, every)
    durable.disk = disk
    try:
        train_sft(world.run(live, **SHAPES[shape]), [])
    finally:
        durable.disk = before
    return disk.killed, list(states.values())


@pytest.mark.parametrize(("shape", "every"), [("packed", 1), ("not packed", 3), ("streamed", 10)])
def test_killed_at_every_call_and_moment(
    world: World, whole: Callable[[str], dict[str, Any]], shape: str, every: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    expected = whole(shape)
    with monkeypatch.context() as patch:
        mark_moments(patch)
        killed, states = killed_everywhere(world, tmp_path, shape, every)
    same(finished(tmp_path / "live"), expected, "writes cut short")
    assert killed.keys() >= {"mkdir", "create", "write", "fsync", "close", "fsync_dir", "rename", "unlink", "rmdir", *MOMENTS}
    for folder in states:
        train_sft(world.run(folder, **SHAPES[shape]), [])
        same(finished(folder), expected, f"killed at {folder.name}")
        shutil.rmtree(folder)
    with capsys.disabled():
        share = "every call" if every == 1 else f"every kind of call at every place and each {every}th call"
        print(f"\n{shape}: {killed.total()} SIGKILLs ({share}), {len(states)} different states left; all resumed bitwise")


def resume_forked(world: World, folder: Path, at: int) -> bool:
    """Go on with the packed run in a process of its own that is killed at its call ``at``; whether it was."""
    outcome = run_forked(lambda f, _: train_sft(world.run(f, **SHAPES["packed"]), []) and None, RunDisk(at, kill), folder)
    assert not outcome.error, outcome.error
    return outcome.killed


def test_killed_several_times(world: World, whole: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    """First, second and third lives end at random calls; the last one ends well."""
    draw = random.Random(0)
    deaths = 0
    for n in range(6):
        folder = tmp_path / str(n)
        folder.mkdir()
        deaths += sum(resume_forked(world, folder, draw.randrange(5, last)) for last in (260, 160, 80))
        assert not resume_forked(world, folder, 0)
        same(finished(folder), whole("packed"), f"history {n}")
    assert deaths > 12


def test_always_killed_young(world: World, whole: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    """Every life lasts just long enough to save once: a run that is killed over and over still ends, and ends the same."""
    lives = 1
    while resume_forked(world, tmp_path, 90):
        lives += 1
        assert lives < 12
    assert lives > 3
    same(finished(tmp_path), whole("packed"), f"after {lives} lives")


# --- signals


STOP_AT = 5
CHILD = f"""
import os, signal, sys
from lorry.disk.metrics import MetricsWriter
write = MetricsWriter.write
def then_signal(self, record):
    write(self, record)
    if record["step"] == {STOP_AT}:
        os.kill(os.getpid(), signal.SIGTERM)
MetricsWriter.write = then_signal
from lorry.cli import main
sys.exit(main(sys.argv[1:]))
"""


def command_line(world: World, folder: Path) -> list[str]:
    """`lorry sft` for the packed run."""
    given = {**tinyrun.DEFAULTS, **SETTINGS, **SHAPES["packed"], "eval": world.held, "output_dir": folder / "run"}
    settings = {"model": world.model, "data": world.data, **given}
    return ["sft", *(f"{k}={','.join(v) if isinstance(v, list) else str(v)}" for k, v in settings.items())]


def check_stopped(folder: Path) -> None:
    newest = checkpoint.find_latest(folder / "run")
    assert newest is not None
    assert newest.name == f"step-{STOP_AT:08d}"
    contracts = json.loads((folder / "run" / "contracts.json").read_text())
    assert {c["status"] for c in contracts} == {"held", "not_checked"}


def test_sigterm_saves_and_exits_75(world: World, whole: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHILD, *command_line(world, tmp_path)], capture_output=True, text=True, env=env)
    assert done.returncode == Interrupted.exit_code == 75, done.stderr
    assert "SIGTERM arrived; step 5 of 11 is saved" in done.stderr
    assert "resume_from_checkpoint=auto" in done.stderr
    assert "Traceback" not in done.stderr
    check_stopped(tmp_path)
    train_sft(world.run(tmp_path, **SHAPES["packed"]), [])
    same(finished(tmp_path), whole("packed"), "after SIGTERM")


def test_sigint_saves_and_exits_75(world: World, whole: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    def interrupted(folder: Path, say: Callable[[int], object]) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background inherits an ignored one
        write = MetricsWriter.write

        def then_signal(self: MetricsWriter, record: dict[str, Any]) -> None:
            write(self, record)
            if record["step"] == STOP_AT:
                os.kill(os.getpid(), signal.SIGINT)

        MetricsWriter.write = then_signal  # type: ignore[method-assign, assignment]
        say(cli.main(command_line(world, folder)))

    outcome = run_forked(interrupted, RunDisk(), tmp_path)
    assert not outcome.error, outcome.error
    assert list(outcome.said) == [75]
    check_stopped(tmp_path)
    train_sft(world.run(tmp_path, **SHAPES["packed"]), [])
    same(finished(tmp_path), whole("packed"), "after SIGINT")


# --- what may resume


class Stopped(Exception):
    """The run ends here, as a kill would have it."""


class StopAt(tinyrun.Heard):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.at = step

    def step(self, record: Record) -> None:
        if record["step"] == self.at:
            raise Stopped


@pytest.fixture
def unfinished(world: World, tmp_path: Path) -> Path:
    """A packed run that was stopped after step 10, its newest checkpoint of step 9, the best so far."""
    with pytest.raises(Stopped):
        train_sft(world.run(tmp_path, **SHAPES["packed"]), [], [StopAt(10)])
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"learning_rate": 2e-2}, ["train.learning_rate 0.01 -> 0.02"]),
        ({"r": 4}, ["lora.r 2 -> 4", "lora.lora_alpha 4 -> 8"]),
        ({"seed": 4, "packing": False}, ["train.seed 3 -> 4", "data.packing true -> false"]),
        ({"eval_steps": 2}, ["train.eval_steps 3 -> 2"]),
        ({"target_modules": ["q_proj", "o_proj"]}, ["lora.target_modules"]),
    ],
)
def test_another_config_is_refused_by_field(world: World, unfinished: Path, changed: dict[str, Any], named: list[str]) -> None:
    before = state_of(unfinished)
    with pytest.raises(ConfigError) as refused:
        train_sft(world.run(unfinished, **{**SHAPES["packed"], **changed}), [])
    assert all(field in str(refused.value) for field in named)
    assert state_of(unfinished) == before


def test_other_data_and_another_base_are_refused(
    world: World, unfinished: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before, data, weights = state_of(unfinished), world.data.read_bytes(), world.model / "model.safetensors"
    tinyrun.write_rows(world.data, [*tinyrun.rows(15), {"question": "What is new?", "answer": "This."}])
    with pytest.raises(ConfigError, match=r"another run:\n  data [0-9a-f]{12} -> [0-9a-f]{12}"):
        train_sft(world.run(unfinished, **SHAPES["packed"]), [])
    world.data.write_bytes(data)
    kept = weights.read_bytes()
    other = tinyrun.model_directory(tmp_path_factory.mktemp("other"), spread=0.21) / "model.safetensors"
    weights.write_bytes(other.read_bytes())
    with pytest.raises(ConfigError, match=r"another run:\n  base [0-9a-f]{12} -> [0-9a-f]{12}"):
        train_sft(world.run(unfinished, **SHAPES["packed"]), [])
    weights.write_bytes(kept)
    assert state_of(unfinished) == before


def test_other_streamed_data_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train_sft(world.run(tmp_path, **SHAPES["streamed"]), [], [StopAt(6)])
    data = world.data.read_bytes()
    tinyrun.write_rows(world.data, tinyrun.rows(16, start=1))
    with pytest.raises(DataError, match="not the data this run was started with"):
        train_sft(world.run(tmp_path, **SHAPES["streamed"]), [])
    world.data.write_bytes(data)


def test_other_threads_go_on_with_a_note(world: World, unfinished: Path) -> None:
    heard = tinyrun.Heard()
    train_sft(world.run(unfinished, **SHAPES["packed"], threads=2), [], [heard])
    torch.set_num_threads(1)
    assert "not bitwise: backend.threads 1 -> 2" in heard.notes
    assert "not bitwise: threads 1 -> 2" in heard.notes
    assert heard.started == [(9, STEPS)]


def test_how_often_it_saves_and_shows_is_free(world: World, whole: Callable[[str], dict[str, Any]], unfinished: Path) -> None:
    heard = tinyrun.Heard()
    settings = {**SHAPES["packed"], "save_steps": 2, "save_total_limit": 5, "logging_steps": 3, "run_name": "other"}
    train_sft(world.run(unfinished, **settings), [], [heard])
    assert [n for n in heard.notes if "bitwise" in n or "resumed" in n] == ["resumed from step-00000009: 9 of 11 steps are done"]
    for name in ("adapter_model.safetensors", "metrics.jsonl", "checkpoints/step-00000011/state.safetensors"):
        assert finished(unfinished)[name] == whole("packed")[name]


@pytest.mark.parametrize("harm", ["state.safetensors", "meta.json", "manifest.json", "lost"])
def test_a_damaged_newest_checkpoint_is_passed_over(
    world: World, whole: Callable[[str], dict[str, Any]], unfinished: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = unfinished / "run" / "checkpoints" / "step-00000009"
    if harm == "lost":
        (newest / "state.safetensors").unlink()
    else:
        content = bytearray((newest / harm).read_bytes())
        content[len(content) // 2] ^= 1
        (newest / harm).write_bytes(content)
    heard = tinyrun.Heard()
    train_sft(world.run(unfinished, **SHAPES["packed"]), [], [heard])
    assert f"skipped the checkpoint {newest}" in caplog.text
    assert any(note.startswith("resumed from step-00000008") for note in heard.notes)
    same(finished(unfinished), whole("packed"), f"{harm} damaged")
