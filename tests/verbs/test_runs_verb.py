"""`lorry runs`: the table, the list as JSON, and folders with nothing in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lorry import cli
from lorry.config import parse_settings
from lorry.config.settings import RunsSettings
from lorry.errors import RunFilesError
from lorry.verbs import runs
from tests.support.verbworld import STEPS, World


def listing(*words: object) -> int:
    return runs.main(parse_settings(RunsSettings, [str(word) for word in words], print))


@pytest.fixture
def folder(world: World, tmp_path: Path) -> Path:
    shutil.copytree(world.run, tmp_path / "first")
    shutil.copytree(world.run, tmp_path / "sweep" / "pass-1")
    (tmp_path / "sweep" / "pass-1" / "receipt.json").write_text("{")
    return tmp_path


def test_the_table(folder: Path, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert listing(folder) == 0
    out, err = capsys.readouterr()
    row = next(line for line in out.splitlines() if line.strip().startswith("first"))
    assert row.split()[:3] == ["first", "finished", str(STEPS)]
    assert "base, people.jsonl, rank 8, alpha 16" in row
    assert (
        f"sweep/pass-1  unreadable: {folder / 'sweep' / 'pass-1' / 'receipt.json'}:1:"
        in out.replace("\n", "")
    )
    assert err == ""


def test_json(folder: Path, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert listing(folder, "format=json") == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    last = [json.loads(line) for line in (world.run / "metrics.jsonl").read_text().splitlines()]
    first = found["first"]
    assert (first["state"], first["step"], first["total"], first["eta"], first["pid"]) == (
        "finished",
        STEPS,
        STEPS,
        None,
        None,
    )
    assert first["loss"] == [line["loss"] for line in last if "loss" in line][-1]
    assert first["best"] == {"metric": "eval_loss", "value": last[-1]["eval_loss"], "step": STEPS}
    assert first["data"] == str(world.rows)
    assert found["sweep/pass-1"]["state"] == "unreadable"


def test_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert listing(tmp_path) == 0
    assert capsys.readouterr() == ("", f"no runs in {tmp_path}\n")
    assert listing(tmp_path, "format=json") == 0
    assert capsys.readouterr().out == "[]\n"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunFilesError, match="runs: no such folder"):
        listing()


@pytest.mark.parametrize("command", ["runs", "report", "doctor"])
def test_what_is_wrong_with_a_run_is_explained_on_the_page_of_runs(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """docs/data.md, where rows of data are explained, says nothing of it."""
    monkeypatch.chdir(tmp_path)
    assert cli.main([command, "gone"]) == RunFilesError.exit_code
    error = capsys.readouterr().err
    assert "gone: no such" in error
    assert error.endswith(f"see docs/{RunFilesError.docs}\n")
    assert RunFilesError.docs.startswith("running.md#")
