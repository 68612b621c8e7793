"""`lorry report`: the tables and where the page is; one run, or several side by side."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.verbworld import STEPS, World, lorry

pytestmark = pytest.mark.usefixtures("charts")


@pytest.fixture
def runs(world: World, tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(world.run, tmp_path / name)) for name in ("first", "second")]


def test_one_run(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    page = runs[0] / "report.html"
    page.unlink()
    assert lorry("report", runs[0]) == 0
    out, err = capsys.readouterr()
    assert out == f"{page}\n"
    assert "last loss" in err
    assert "✓ held" in err
    text = page.read_text()
    assert "<svg" in text
    assert not any(outside in text for outside in ("http://", "https://", "<script src", "<link"))
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_several_runs(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lorry("report", *runs) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'comparison.html'}\n"
    assert "Final figures" in err
    page = (tmp_path / "comparison.html").read_text()
    assert "first" in page
    assert "second" in page
    assert lorry("report", *runs, f"output_dir={tmp_path / 'elsewhere'}") == 0
    assert (tmp_path / "elsewhere" / "report.html").read_text() == page


@pytest.mark.parametrize("harm", ["missing", "model", "damaged"])
def test_what_is_no_run(
    harm: str, runs: list[Path], world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs[0] / "report.html").unlink()
    (runs[0] / "run.yaml").write_text("a: [")
    path, message = {
        "missing": (runs[0] / "nope", "no such run directory"),
        "model": (world.base, "not a run directory"),
        "damaged": (runs[0], "run.yaml:1: not YAML"),
    }[harm]
    assert lorry("report", runs[1], path) == 3
    out, err = capsys.readouterr()
    assert message in err
    # a damaged run hides no other: the page shows the sound one, and says of this one that it is
    # damaged
    page = runs[0].parent / "comparison.html"
    assert out == (f"{page}\n" if harm == "damaged" else "")
    assert page.exists() == (harm == "damaged")
    assert not (runs[0] / "report.html").exists()


def test_no_run_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert lorry("report") == 2
    assert "runs is missing" in capsys.readouterr().err


def test_it_counts_the_steps(
    world: World, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert lorry("report", runs[0]) == 0
    assert f"over {STEPS} steps" in capsys.readouterr().err
