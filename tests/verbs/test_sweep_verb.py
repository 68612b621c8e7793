"""`lorry sweep`: a grid trains in one pass, is ranked by held-out loss and written down; several
passes are ranked together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorry.config.schema.run import RunConfig
from lorry.errors import DataError
from lorry.runs.read import read_readable_runs
from lorry.train import session
from lorry.train.session import TrainResult
from tests.support.verbworld import World, lorry

SETTINGS = (
    "max_steps=4",
    "per_device_train_batch_size=2",
    "dtype=float32",
    "threads=1",
    "max_length=64",
    "target_modules=q_proj",
)


def sweep(world: World, out: Path, *more: str) -> int:
    return lorry(
        "sweep", f"model={world.base}", f"data={world.rows}", f"output_dir={out}", *SETTINGS, *more
    )


def ranking(out: Path) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = json.loads((out / "sweep.json").read_text())["jobs"]
    return jobs


@pytest.mark.usefixtures("charts")
def test_a_grid_in_one_pass(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid"
    assert (
        sweep(world, out, "r=2,4", "learning_rate=1e-2,1e-5", f"eval={world.rows}", "eval_steps=2")
        == 0
    )
    jobs = ranking(out)
    assert {job["name"] for job in jobs} == {"r2-lr0.01", "r4-lr0.01", "r2-lr1e-5", "r4-lr1e-5"}
    losses = [job["eval_loss"] for job in jobs]
    assert losses == sorted(losses)
    # a rate of 1e-5 learns nothing in four steps
    assert {job["name"][3:] for job in jobs[:2]} == {"lr0.01"}
    assert jobs[0]["settings"]["train.learning_rate"] == 0.01
    assert all((Path(job["path"]) / "adapter_model.safetensors").is_file() for job in jobs)
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == jobs[0]["path"]
    assert "sweep, by held-out loss" in shown.err
    places = [shown.err[: shown.err.index("\ntake ")].rindex(job["name"]) for job in jobs]
    assert places == sorted(places)
    logged = read_readable_runs([out])[0][0].log
    assert logged.adapters() == [*(f"r{r}-lr{lr}" for r in (2, 4) for lr in ("0.01", "1e-5"))]
    for job in jobs:
        assert logged.series("eval_loss", job["name"])[1][-1] == job["eval_loss"]
    page = (out / "report.html").read_text()
    assert "Held-out loss of each adapter" in page
    assert all(f">{job['name']}</th>" in page for job in jobs)
    assert "Held-out loss by learning rate" in page
    assert page.count("is the highest that was tried") == 1
    document = json.loads((out / "sweep.json").read_text())
    assert [one["seeds"] for one in document["combinations"]] == [1] * 4
    assert (
        "is the highest that was tried: a better one may lie beyond it; try 0.03 too" in shown.err
    )
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    # which of them are the run's own values makes no difference
    assert all({"lora.r", "train.learning_rate"} <= job["settings"].keys() for job in jobs)


@pytest.mark.usefixtures("charts")
def test_seeds_give_intervals_and_a_base_is_a_pass_of_its_own(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, grid = tmp_path / "seeds", ("seeds=2", "quantize=null,int8", "r=2,4", "test_size=2")
    assert sweep(world, out, *grid) == 0
    document = json.loads((out / "sweep.json").read_text())
    assert [one["seeds"] for one in document["combinations"]] == [2] * 4
    names = {f"{base}/r{rank}" for base in ("none", "int8") for rank in (2, 4)}
    assert {one["name"] for one in document["combinations"]} == names
    for one in document["combinations"]:
        mine = [
            job["eval_loss"]
            for job in document["jobs"]
            if f"{job['base']}/{job['name'].partition('-')[0]}" == one["name"]
        ]
        assert one["mean"] == pytest.approx(sum(mine) / 2)
        # 12.706: Student's t of one degree of freedom at 97.5%
        assert one["half_width"] == pytest.approx(12.706 * abs(mine[0] - mine[1]) / 2, rel=1e-3)
    runs = [read_readable_runs([out / base])[0][0] for base in ("none", "int8")]
    # the same rows were held out under both seeds
    for run in runs:
        assert run.log.adapters() == ["r2-seed0", "r2-seed1", "r4-seed0", "r4-seed1"]
    shown = capsys.readouterr()
    assert Path(shown.out.splitlines()[-1]).is_dir()
    assert "+-" in shown.err


@pytest.mark.usefixtures("charts")
def test_several_passes_are_ranked_together(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "passes", tmp_path / "sweep.yaml"
    file.write_text("sweep: {seed: [0, 1, 2]}\njobs_per_pass: 2\n")
    assert (
        lorry(
            "sweep",
            str(file),
            f"model={world.base}",
            f"data={world.rows}",
            f"output_dir={out}",
            *SETTINGS,
        )
        == 0
    )
    jobs = ranking(out)
    assert (
        json.loads((out / "sweep.json").read_text())["ranked_by"]
        == "last training loss (nothing held out)"
    )
    assert [job["loss"] for job in jobs] == sorted(job["loss"] for job in jobs)
    # a pass of one job has the page of the whole sweep, too
    for number in (1, 2):
        assert 'id="sweep"' in (out / f"pass-{number}" / "report.html").read_text()
    # and both together one page, with the sweep once
    assert lorry("report", str(out)) == 0
    assert (out / "report.html").read_text().count("nothing was held out") == 1
    assert {job["name"]: str(Path(job["path"]).relative_to(out)) for job in jobs} == {
        "seed0": "pass-1/seed0", "seed1": "pass-1/seed1", "seed2": "pass-2",
    }  # fmt: skip
    assert all((Path(job["path"]) / "adapter_config.json").is_file() for job in jobs)
    assert "pass 2 of 2: seed2" in capsys.readouterr().err


def test_a_sweep_that_dies_late_has_the_pages_of_what_has_trained(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its second pass here, in a directory that holds an earlier sweep: the page of the first shows none of
    that one's ranking."""
    out, more = tmp_path / "late", ("seeds=2", "jobs_per_pass=1", "max_steps=1")
    assert sweep(world, out, "r=2", *more) == 0
    earlier = (out / "sweep.json").read_bytes()
    train = session.train_run

    def train_run(run: RunConfig, **listeners: Any) -> TrainResult:
        if run.output_dir.name == "pass-2":
            raise DataError("rows.jsonl:3: gone")
        return train(run, **listeners)

    monkeypatch.setattr(session, "train_run", train_run)
    assert sweep(world, out, "r=4", *more) == DataError.exit_code
    page = (out / "pass-1" / "report.html").read_text()
    assert 'id="sweep"' not in page
    assert not (out / "sweep.json").exists()
    assert (out / "previous" / "1" / "sweep.json").read_bytes() == earlier
    assert f"report  {out / 'pass-1' / 'report.html'}" in capsys.readouterr().err


def test_nothing_to_sweep(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(world, tmp_path / "none", "r=8") == 2
    assert (
        "nothing to sweep; give several values of a setting, such as r=8,16"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "none").exists()


def test_sft_shows_each_job(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "jobs"
    jobs = "jobs=[{name: small, lora_alpha: 4}, {name: brief, lora_alpha: 6, max_steps: 2}]"
    assert (
        lorry(
            "sft", f"model={world.base}", f"data={world.rows}", f"output_dir={out}", jobs, *SETTINGS
        )
        == 0
    )
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == str(out)
    assert "2 in one pass: small, brief" in shown.err
    assert "step 2/4  lr " in shown.err
    assert [line.split()[:1] for line in shown.err.splitlines() if "lora_alpha" in line] == [
        ["small"],
        ["brief"],
    ]
    assert lorry("doctor", str(out)) == 0
    assert "2 intact" in capsys.readouterr().out


@pytest.mark.usefixtures("charts")
def test_combinations_of_other_settings_in_other_passes(world: World, tmp_path: Path) -> None:
    """Every row has all that is tried, whatever its pass has: seeds of one combination are one, and one
    without a rate of its own has the run's in the chart, where it was a KeyError after all had trained."""
    tried, out = "sweep=[{learning_rate: 1e-2, r: 2}, {r: 4}]", tmp_path / "passes"
    more = ("seeds=2", "jobs_per_pass=3", "learning_rate=1e-3", "max_steps=1")
    assert sweep(world, out, tried, *more) == 0
    written = json.loads((out / "sweep.json").read_text())
    assert [one["seeds"] for one in written["combinations"]] == [2, 2]
    rates = {one["settings"]["train.learning_rate"] for one in written["combinations"]}
    assert rates == {1e-2, 1e-3}
    assert (out / "sweep.png").is_file()
