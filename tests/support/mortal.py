"""A run that is killed everywhere: the disk that kills it, the moments no call marks, and what a
finished run is, to compare.

killed, states = killed_everywhere(world, tmp_path, "packed", every=1)
same(finished(folder), whole("packed"), "where")
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorry.backends.local import LocalBackend
from lorry.config import RunConfig
from lorry.disk import durable
from lorry.disk.receipt import MEMORY
from lorry.models.scoring import score
from lorry.runs.metrics import MetricsWriter
from lorry.train import engine
from lorry.train.session import train_run
from tests.support import tinyrun
from tests.support.faults import FaultyDisk, die

STEPS = 11  # several epochs and a bit; an evaluation, a save and the end fall on different steps
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "save_steps": 4,
    "eval_steps": 3,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "down_proj"],
    "load_best_model_at_end": True,
    "early_stopping_patience": 9,
    "resume_from_checkpoint": "auto",
}
SHAPES: dict[str, dict[str, Any]] = {
    "packed": {"packing": True, "gradient_accumulation_steps": 2},
    "not packed": {
        "gradient_accumulation_steps": 2,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "eval_steps": None,
    },
    "streamed": {"streaming": True, "packing": True, "load_best_model_at_end": False},
}
TIMES = ("seconds", "peak_memory_bytes")


@dataclass(frozen=True)
class World:
    """What every run reads."""

    model: Path
    data: Path
    held: Path

    def run(self, folder: Path, **settings: Any) -> RunConfig:
        given = {"eval": str(self.held), **SETTINGS, **settings}
        return tinyrun.described(
            self.model,
            self.data,
            folder / "run",
            **{k: v for k, v in given.items() if v is not None},
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    data = tinyrun.write_rows(root / "data.jsonl", tinyrun.rows(16))
    held = tinyrun.write_rows(root / "held.jsonl", tinyrun.rows(4, start=40))
    return World(tinyrun.model_directory(root / "model"), data, held)


class RunDisk(FaultyDisk):
    """A disk that also knows files it did not open itself, as metrics.jsonl, and where every file
    is now.
    """

    def path_of(self, kind: str, args: tuple[Any, ...]) -> Path | str:
        descriptor = bool(args) and isinstance(args[0], int)
        return (
            Path(os.readlink(f"/proc/self/fd/{args[0]}"))
            if descriptor
            else super().path_of(kind, args)
        )


class Mortal(RunDisk):
    """At every call, or ``every`` few, a clone of this process is killed; what it leaves is handed
    to ``left(number, kind)``.

    The clone dies before the call, or when half of a write has got through. This process then goes
    on; after a write, with the other half, as if it had been a short one. The first call of every
    kind is never left out; with ``everywhere``, at every place.
    """

    def __init__(
        self, left: Callable[[int, str], None], every: int, everywhere: bool = True
    ) -> None:
        super().__init__()
        self.left, self.every, self.everywhere = left, every, everywhere
        self.halved = False
        self.places: set[tuple[str, str]] = set()
        self.killed: Counter[str] = Counter()

    def tick(self, kind: str, *args: Any) -> Any:
        self.calls += 1
        name = plain_name(Path(self.path_of(kind, args)).name) if self.everywhere else ""
        place = kind, re.sub(r"\d+", "N", name)
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
    """Count the middle of a forward pass, its end, an update and an evaluation as calls of the disk
    in use.
    """

    def before(owner: Any, name: str, kind: str) -> None:
        original = getattr(owner, name)

        def marked(*args: Any, **kwargs: Any) -> Any:
            durable.disk.tick(kind)  # type: ignore[attr-defined]
            return original(*args, **kwargs)

        patch.setattr(owner, name, marked)

    before(score, "score_supervised_tokens", "mid-forward")
    before(LocalBackend, "step", "between forward and step")
    before(MetricsWriter, "write", "after step, before metrics")
    before(engine, "evaluate_task", "before evaluation")


MOMENTS = {
    "mid-forward",
    "between forward and step",
    "after step, before metrics",
    "before evaluation",
}


# --- what a finished run is


def finished(folder: Path) -> dict[str, Any]:
    """Every file of a run as a value to compare; what may differ (times, where it ran, how it was
    started) taken out.
    """
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
        elif name == "receipt.json":
            receipt = json.loads(path.read_text())
            found[name] = {k: v for k, v in receipt.items() if k not in MEMORY}
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


Whole = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def whole(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """The uninterrupted run of each shape, made once."""
    done: dict[str, dict[str, Any]] = {}

    def get(shape: str) -> dict[str, Any]:
        if shape not in done:
            folder = tmp_path_factory.mktemp("whole")
            train_run(world.run(folder, **SHAPES[shape]), [])
            done[shape] = finished(folder)
        return done[shape]

    return get


def killed_everywhere(
    world: World, root: Path, shape: str, every: int, everywhere: bool = True
) -> tuple[Counter[str], list[Path]]:
    """`killed_while` of a run of a shape."""

    def work(live: Path) -> None:
        train_run(world.run(live, **SHAPES[shape]), [])

    return killed_while(work, root, every, everywhere)


def killed_while(
    work: Callable[[Path], object], root: Path, every: int, everywhere: bool = True
) -> tuple[Counter[str], list[Path]]:
    """Kill ``work(root / "live")`` at every call: (how often at each kind, a folder for each
    different state that was left).
    """
    live, states = root / "live", {}
    live.mkdir()

    def left(number: int, kind: str) -> None:
        digest = state_of(live)
        if digest not in states:
            states[digest] = root / f"{number:04d}-{kind.replace(' ', '-')}"
            shutil.copytree(live, states[digest])

    before, disk = durable.disk, Mortal(left, every, everywhere)
    durable.disk = disk
    try:
        work(live)
    finally:
        durable.disk = before
    return disk.killed, list(states.values())
