"""Named sets asked during training: logged at every evaluation, able to choose the best step,
refused where they would leak.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.verbworld import World, lorry, write_rows

ROWS = [
    {"question": f"is {name} a town", "passage": f"{name} is a town.", "answer": n % 2 == 0}
    for n, name in enumerate(("Oslo", "Lima", "Kyoto", "Ghent", "Rome", "Bonn"))
]
TRAIN = (
    "r=4",
    "learning_rate=1e-2",
    "per_device_train_batch_size=2",
    "dtype=float32",
    "save_strategy=no",
    "threads=1",
)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    return (
        f"data.local.bool_q.train={write_rows(tmp_path / 'a.jsonl', ROWS[:4])}",
        f"data.local.bool_q.validation={write_rows(tmp_path / 'b.jsonl', ROWS[4:])}",
    )


def test_metrics_of_sets_are_logged_and_choose_the_best(
    world: World, files: tuple[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    argv = (
        f"model={world.base}",
        "data.mix=[bool_q]",
        *files,
        "eval_tasks=[bool_q]",
        "eval_steps=2",
        "max_steps=4",
        *TRAIN,
    )
    best = (
        "metric_for_best_model=bool_q_accuracy",
        "greater_is_better=true",
        "load_best_model_at_end=true",
    )
    assert lorry("sft", *argv, *best, f"output_dir={run}") == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    asked = [line for line in lines if "eval_bool_q_accuracy" in line]
    assert [line["step"] for line in asked] == [2, 4]
    assert all(
        {"eval_bool_q_accuracy_sum", "eval_bool_q_ece", "eval_bool_q_perplexity"} <= set(line)
        for line in asked
    )
    assert (
        lorry(
            "eval",
            run,
            "tasks=[bool_q]",
            f"local.bool_q={tmp_path / 'b.jsonl'}",
            f"output_dir={tmp_path / 'o.json'}",
        )
        == 0
    )
    sides = json.loads((tmp_path / "o.json").read_text())["sets"]["bool_q"]["sides"]
    value = next(side for name, side in sides.items() if name != "base")["metrics"]["accuracy"][
        "value"
    ]
    assert value == max(line["eval_bool_q_accuracy"] for line in asked)


def test_rows_that_are_learnt_are_not_asked(
    world: World, files: tuple[str, str], tmp_path: Path, capsys: object
) -> None:
    shared = f"data.local.bool_q={tmp_path / 'a.jsonl'}"
    argv = (
        f"model={world.base}",
        "data.mix=[bool_q]",
        shared,
        "eval_tasks=[bool_q]",
        "max_steps=2",
        *TRAIN,
    )
    assert lorry("sft", *argv, f"output_dir={tmp_path / 'run'}") == 2
    assert "the evaluation set is the training set" in capsys.readouterr().err  # type: ignore[attr-defined]
    assert not (tmp_path / "run").exists()


def test_sets_alone_need_no_loss_and_choose_the_best_step(
    world: World, files: tuple[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    argv = (
        f"model={world.base}",
        "data.mix=[bool_q]",
        *files,
        "eval_tasks=[bool_q]",
        "eval_steps=1",
        "max_steps=2",
        *TRAIN,
    )
    assert lorry("sft", *argv, f"output_dir={run}") == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("eval_bool_q_accuracy" in line for line in lines) == 2
    assert "metric_for_best_model: eval_bool_q_accuracy" in (run / "run.yaml").read_text()


@pytest.mark.parametrize("learnt", ["data={a}", "data.mix=[boolq_long]"])
def test_rows_are_known_by_where_they_lie_and_not_by_name(
    world: World,
    files: tuple[str, str],
    tmp_path: Path,
    learnt: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    a = tmp_path / "a.jsonl"
    local = (f"data.local.bool_q={a}", f"data.local.boolq_long={a}")
    argv = (
        f"model={world.base}",
        learnt.format(a=a),
        *local,
        "eval_tasks=[bool_q]",
        "max_steps=2",
        *TRAIN,
    )
    assert lorry("sft", *argv, f"output_dir={tmp_path / 'run'}") == 2
    assert "bool_q: the evaluation set is the training set" in capsys.readouterr().err


def test_rows_that_any_job_learns_are_not_asked(
    world: World, files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = tmp_path / "jobs.yaml"
    described.write_text(
        f"jobs:\n- {{name: one, r: 2}}\n- {{name: two, r: 2, data: {{local: {{bool_q.train: {tmp_path / 'b.jsonl'}}}}}}}\n"
    )
    argv = (
        described,
        f"model={world.base}",
        "data.mix=[bool_q]",
        *files,
        "eval_tasks=[bool_q]",
        "max_steps=1",
        *TRAIN[1:],
    )
    assert lorry("sft", *argv, f"output_dir={tmp_path / 'run'}") == 2
    assert "the evaluation set is the training set" in capsys.readouterr().err


def test_what_is_asked_is_the_same_for_all_jobs(
    world: World, files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = tmp_path / "jobs.yaml"
    described.write_text("jobs:\n- {name: one, r: 2}\n- {name: two, r: 2, eval_tasks: [bool_q]}\n")
    assert (
        lorry(
            "sft",
            described,
            f"model={world.base}",
            "data.mix=[bool_q]",
            *files,
            f"output_dir={tmp_path / 'run'}",
        )
        == 2
    )
    assert "train.eval_tasks is the same for all jobs" in capsys.readouterr().err
