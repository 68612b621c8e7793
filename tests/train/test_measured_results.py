"""What was measured of a run's adapter (evaluation.json, evals/) never stands beside another one: it
moves with the run it was measured of, and nothing of anybody else's does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorry.evaluate.unlearning.results import SuiteResults
from lorry.train.session import train_run
from lorry.verbs.attack import add_part
from tests.support import tinyrun
from tests.support.tinyrun import quick  # noqa: F401 - a fixture

JOBS = [{"name": "a"}, {"name": "b", "seed": 5}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tinyrun.model_directory(folder / "model")
    tinyrun.write_rows(folder / "data.jsonl", tinyrun.rows(6))
    return folder


def train(world: Path, out: Path, **settings: Any) -> None:
    given = {"max_steps": 2, "save_steps": 2, **settings}
    train_run(tinyrun.described(world / "model", world / "data.jsonl", out, **given), [])


def write_suite(folder: Path) -> None:
    """As `lorry eval suite=tofu` does."""
    store = SuiteResults(
        folder, "TOFU", {"exact_memorization": "d" * 64}, "m" * 64, {"exact_memorization": {}}
    )
    store.add("exact_memorization", {"agg_value": 0.5})


def measure(run: Path, *, suites: tuple[str, ...] = ("evals",)) -> None:
    for place in suites:
        write_suite(run / place)
    entry = {"name": "held", "metrics": {}}
    (run / "evaluation.json").write_text(json.dumps([entry]))


def test_a_new_run_begins_without_them(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(world, run)
    measure(run)
    (run / "evals" / "mine.txt").write_text("beside them")
    before = (run / "evals/TOFU_EVAL.json").read_bytes()
    train(world, run, seed=4)
    assert not (run / "evals").exists()
    assert not (run / "evaluation.json").exists()
    # with the adapter that it was measured of, and whatever lay in that folder
    aside = run / "previous/1"
    assert (aside / "evals/TOFU_EVAL.json").read_bytes() == before
    assert (aside / "evals/mine.txt").read_text() == "beside them"
    assert (aside / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("place", ["evals/weight0.5", "evals/a", "evals/weight0.5/a"])
def test_attacks_and_other_weights_are_found(place: str, world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(world, run)
    add_part(run / place / "attacks.json", "quantize", {"model": "m", "rows": "r"})
    train(world, run, seed=4)
    assert not (run / "evals").exists()
    assert (run / "previous/1" / place / "attacks.json").is_file()


def test_somebodys_folder_of_that_name_stays(world: Path, tmp_path: Path) -> None:
    """Also one with files of open-unlearning's own, whose records have no digest."""
    run = tmp_path / "run"
    train(world, run)
    (run / "evals").mkdir()
    (run / "evals/TOFU_EVAL.json").write_text('{\n "forget_quality": {"agg_value": 0.5}\n}')
    train(world, run, seed=4)
    assert [path.name for path in (run / "evals").iterdir()] == ["TOFU_EVAL.json"]


@pytest.mark.parametrize("jobs", [None, JOBS])
def test_a_run_that_ends_once_more(jobs: Any, world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    own: dict[str, Any] = {"jobs": jobs} if jobs else {}
    places = ("evals", "a/evals") if jobs else ("evals",)
    train(world, run, **own)
    measure(run, suites=places)
    # made again as it was: the numbers are still those of this adapter
    train(world, run, resume_from_checkpoint="auto", **own)
    for name in ("evaluation.json", *places):
        assert (run / name).exists(), name
    # other code, or another machine, has trained it to other bits since
    receipt = json.loads((run / "receipt.json").read_text())
    receipt["adapters"] |= {next(iter(receipt["adapters"])): "0" * 64}
    (run / "receipt.json").write_text(json.dumps(receipt))
    train(world, run, resume_from_checkpoint="auto", **own)
    for name in ("evaluation.json", *places):
        assert not (run / name).exists(), name
        assert len(list((run / "previous").glob(f"*/{name}"))) == 1, name
