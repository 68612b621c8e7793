"""Every verb that writes: somebody's file where its output would go is refused before any work, or
moved to previous/N.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorry.config import SweepSettings, parse_settings
from lorry.config.settings import CompareSettings, DemoSettings
from lorry.runs import ownership
from lorry.verbs import demo
from tests.support.foreign import everything, strange
from tests.support.verbworld import TRAIN, World, lorry, train


@pytest.fixture
def run(world: World, tmp_path: Path) -> Path:
    """A finished run to write beside."""
    return Path(shutil.copytree(world.run, tmp_path / "people"))


def put(*paths: Path) -> dict[bytes, Path]:
    """Somebody's files there."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(strange(path.name))
    return {strange(path.name): path for path in paths}


def refused(before: dict[bytes, Path], capsys: pytest.CaptureFixture[str], *argv: object) -> None:
    """The command ends with 2, names a file, and every one is where it was."""
    assert lorry(*argv) == 2
    err = capsys.readouterr().err
    assert "which Lorry did not write and would overwrite; nothing was changed" in err
    assert any(path.name in err for path in before.values())
    assert "Traceback" not in err
    assert {path: path.read_bytes() for path in before.values()} == {
        path: content for content, path in before.items()
    }


@pytest.mark.parametrize("name", ["page.html", "page.png"])
def test_report_to_a_place_of_its_own(
    run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = put(tmp_path / "site" / name)
    refused(mine, capsys, "report", run, f"output_dir={tmp_path / 'site' / 'page.html'}")
    (tmp_path / "site" / name).unlink()
    for _ in range(2):  # the second replaces the first
        assert lorry("report", run, f"output_dir={tmp_path / 'site' / 'page.html'}") == 0
    assert sorted(p.name for p in (tmp_path / "site").iterdir()) == ["page.html", "page.png"]


def test_report_of_several_beside_somebodys(
    run: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    refused(put(tmp_path / "comparison.html"), capsys, "report", run, other)


def test_report_in_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(run / "report.html", run / "report.png")
    for _ in range(2):
        assert lorry("report", run) == 0
    assert everything(run)[strange("report.html")] == ["previous/1/report.html"]
    assert everything(run)[strange("report.png")] == ["previous/1/report.png"]
    assert ownership.is_report_page(run / "report.html")
    assert ownership.is_report_picture(run / "report.png")
    assert [p.name for p in (run / "previous").iterdir()] == ["1"]


@pytest.mark.parametrize("name", ["out.json", "folder/results.json"])
def test_eval_of_rows(
    world: World, run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = put(tmp_path / name)
    output = tmp_path / name if name == "out.json" else (tmp_path / name).parent
    words = ("eval", run, f"data={world.rows}", "limit=1", f"output_dir={output}")
    refused(mine, capsys, *words)
    (tmp_path / name).unlink()
    for _ in range(2):
        assert lorry(*words) == 0
    assert ownership.recognise_keys("model", "sides")(tmp_path / name)


def test_eval_knows_no_run_by_its_name(world: World, tmp_path: Path) -> None:
    """A run.yaml of another tool makes a model directory no run of ours: nothing is written into
    it.
    """
    base = Path(shutil.copytree(world.base, tmp_path / "base"))
    (base / "run.yaml").write_text("job: 7\nimage: cuda\n")
    before = everything(base)
    assert lorry("eval", base, f"data={world.rows}", "limit=1") == 0
    assert everything(base) == before


@pytest.mark.parametrize("name", ["lora.yaml", "compare.json", "full/README.md"])
def test_compare(
    world: World, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = put(tmp_path / "out" / name)
    words = (
        f"model={world.base}",
        f"data={world.rows}",
        f"output_dir={tmp_path / 'out'}",
        "ways=[lora,full]",
        "max_steps=1",
    )
    refused(mine, capsys, "compare", *words)
    assert (
        parse_settings(CompareSettings, [str(word) for word in words], print).output_dir
        == tmp_path / "out"
    )


@pytest.mark.parametrize("name", ["sweep.json", "pass-2/README.md"])
def test_sweep_of_several_passes(
    world: World, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        f"model={world.base}",
        f"data={world.rows}",
        f"output_dir={tmp_path / 'out'}",
        "r=2,3",
        "jobs_per_pass=1",
    ]
    assert len(parse_settings(SweepSettings, words, print).passes()) == 2
    refused(put(tmp_path / "out" / name), capsys, "sweep", *words)
    assert not (tmp_path / "out" / "pass-1").exists()


def test_a_run_in_the_background(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("log.txt", "background.yaml", "README.md"):
        mine = put(tmp_path / name / name)
        words = (
            f"model={world.base}",
            f"data={world.rows}",
            f"output_dir={tmp_path / name}",
            *TRAIN,
        )
        refused(mine, capsys, "sft", *words, "background=true")
        assert [p.name for p in (tmp_path / name).iterdir()] == [name]


def test_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reached: list[Path] = []

    def stop(run: object, *_: object) -> None:
        reached.append(tmp_path)
        raise KeyboardInterrupt

    monkeypatch.setattr("lorry.train.session.train_run", stop)
    refused(put(tmp_path / "README.md"), capsys, "demo", f"output_dir={tmp_path}", "fast=true")
    (tmp_path / "README.md").unlink()
    put(tmp_path / "data" / "train.jsonl")
    for _ in range(2):
        assert lorry("demo", f"output_dir={tmp_path}", "fast=true") == 130
    assert len(reached) == 2
    assert everything(tmp_path)[strange("train.jsonl")] == ["previous/1/data/train.jsonl"]
    assert (tmp_path / demo.TRAIN_FILE).is_file()
    assert (
        demo.demo_settings(DemoSettings(output_dir=tmp_path), tmp_path)["resume_from_checkpoint"]
        == "auto"
    )


Words = Callable[[Path, Path], tuple[object, ...]]
WRITERS: dict[str, Words] = {
    "merge": lambda run, out: ("merge", run, f"output_dir={out}"),
    "export hf": lambda run, out: ("export", run, "to=hf", f"output_dir={out}"),
    "export peft": lambda run, out: ("export", run, "to=peft", f"output_dir={out}"),
}


@pytest.mark.parametrize("verb", WRITERS)
def test_whole_directories(
    run: Path, tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    put(out / "README.md")
    assert lorry(*WRITERS[verb](run, out)) == 2
    assert "already exists and is not empty" in capsys.readouterr().err
    assert everything(out) == {strange("README.md"): ["README.md"]}
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("people", "out")] == []


def test_unmerge(
    world: World, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lorry("merge", run, f"output_dir={tmp_path / 'merged'}") == 0
    put(tmp_path / "out" / "README.md")
    assert lorry("unmerge", tmp_path / "merged", f"output_dir={tmp_path / 'out'}") == 2
    assert everything(tmp_path / "out") == {strange("README.md"): ["README.md"]}


def test_a_report_that_appeared_while_a_run_went(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`lorry sft` makes the report last: somebody's report.html, put there meanwhile, is not
    written over.
    """
    from lorry.train import session

    write = session.artifacts.write_json

    def also(folder: Path, name: str, value: object) -> None:
        write(folder, name, value)
        if name == "receipt.json":
            put(folder / "report.html")

    monkeypatch.setattr(session.artifacts, "write_json", also)
    folder = train(tmp_path / "run", world.base, world.rows, steps=1)
    assert everything(folder)[strange("report.html")] == ["previous/1/report.html"]
