"""An unlearning run killed while it copies its start goes on to the same files, bit for bit; a suite's
results and an attack's, killed at any call to the disk, end as if they had not been.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lorry.config import UnlearnRunConfig, build_settings
from lorry.disk import documents, durable
from lorry.evaluate.unlearning.results import SuiteResults
from lorry.train import artifacts
from lorry.train.session import train_run
from lorry.verbs.attack import add_part
from tests.support import tinyrun
from tests.support.faults import QuietDisk
from tests.support.mortal import finished, killed_while, same
from tests.support.tinyrun import quick  # noqa: F401 - a fixture

FORGET = 5


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, what is forgotten and retained, and a run that is begun from."""
    folder = tmp_path_factory.mktemp("files")
    tinyrun.model_directory(folder / "model")
    rows = tinyrun.rows(12)
    tinyrun.write_rows(folder / "forget.jsonl", rows[:FORGET])
    tinyrun.write_rows(folder / "retain.jsonl", rows[FORGET:])
    start = tinyrun.described(
        folder / "model", folder / "forget.jsonl", folder / "start", max_steps=3, save_strategy="no"
    )
    train_run(start, [])
    return folder


def described(files: Path, folder: Path) -> UnlearnRunConfig:
    given = {
        "model": {"name": str(files / "start")},
        "forget": str(files / "forget.jsonl"),
        "retain": str(files / "retain.jsonl"),
        "output_dir": str(folder / "run"),
        "subjects": [{"name": "a"}, {"name": "b", "beta": 0.5}],
        "max_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "target_modules": ["q_proj", "down_proj"],
        "resume_from_checkpoint": "auto",
        **tinyrun.DEFAULTS,
    }
    return build_settings(UnlearnRunConfig, given, print)


def test_killed_while_the_start_is_copied(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a step was made; everything that comes later is in test_kill_and_resume."""
    original = artifacts.write_start

    def train(live: Path) -> None:
        mortal, quiet_disk = durable.disk, QuietDisk()
        durable.disk = quiet_disk

        def write_start(*given: Any) -> None:
            durable.disk = mortal
            original(*given)
            durable.disk = quiet_disk

        with monkeypatch.context() as patch:
            patch.setattr(artifacts, "write_start", write_start)
            train_run(described(files, live), [])

    killed, states = killed_while(train, tmp_path, every=3)
    expected = finished(tmp_path / "live")
    assert len([name for name in expected if "/start_adapter/" in name]) == 2 * 3
    assert killed.total() > len(states) > 5
    for folder in states:
        train_run(described(files, folder), [])
        same(finished(folder), expected, f"killed at {folder.name}")
        shutil.rmtree(folder)


METRICS = ("exact_memorization", "extraction_strength", "forget_Q_A_Prob")


def measure(folder: Path) -> list[str]:
    """What a suite does, without a model: (the metrics that were kept)."""
    digests = {name: f"{number}" * 64 for number, name in enumerate(METRICS)}
    store = SuiteResults(
        folder / "evals", "TOFU", digests, "m" * 64, {name: {} for name in METRICS}
    )
    kept = [name for name in METRICS if store.saved_record(name) is not None]
    for number, name in enumerate(METRICS):
        if name not in kept:
            store.add(name, {"agg_value": number / 4, "value_by_index": {"0": {"prob": 0.5}}})
    return kept


def test_results_of_a_suite_killed_anywhere(tmp_path: Path) -> None:
    """Both files say the same in the end, whenever it was killed."""
    _, states = killed_while(measure, tmp_path, every=1)
    names = ("TOFU_EVAL.json", "TOFU_SUMMARY.json")
    expected = {name: (tmp_path / "live/evals" / name).read_bytes() for name in names}
    kept = set()
    for folder in states:
        kept.add(len(measure(folder)))
        for name in names:
            assert (folder / "evals" / name).read_bytes() == expected[name], (folder.name, name)
    assert kept == {0, 1, 2, 3}


def attack(folder: Path) -> None:
    add_part(folder / "attacks.json", "relearn", {"model": "m", "rows": "r", "curves": {}})
    add_part(folder / "attacks.json", "quantize", {"model": "m", "rows": "r", "values": {}})


def test_an_attack_killed_anywhere(tmp_path: Path) -> None:
    _, states = killed_while(attack, tmp_path, every=1)
    expected = (tmp_path / "live/attacks.json").read_bytes()
    for folder in states:
        if (folder / "attacks.json").exists():
            documents.read_object(folder / "attacks.json")
        attack(folder)
        assert json.loads((folder / "attacks.json").read_bytes()) == json.loads(expected)
