"""A suite of unlearning asked while a run trains: the numbers are those of padded transformers, the
files those of `lorry eval`, training goes on as without it, and a killed run has them all.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from lorry.config import RunConfig, UnlearnRunConfig, build_settings
from lorry.errors import ConfigError, LorryError
from lorry.evaluate.unlearning import suite as suites
from lorry.train.session import TrainResult, train_run
from tests.support import tinyrun
from tests.support.padded import PaddedModel
from tests.support.tinyrun import quick  # noqa: F401
from tests.support.tofuworld import read_json, tofu_rows, write_tofu
from tests.support.verbworld import World, lorry
from tests.support.verbworld import world as world  # instead of this folder's

STEPS = 5
SCORED = "metrics=[forget_Q_A_Prob,forget_Q_A_ROUGE,extraction_strength,forget_truth_ratio]"
DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "max_length": 160,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "r": 4,
    "lora_dropout": 0.2,
    "max_steps": STEPS,
    "save_steps": 2,
}
SUITE: dict[str, Any] = {
    "suite": "tofu",
    "metrics": ["forget_Q_A_Prob", "forget_Q_A_ROUGE", "extraction_strength", "forget_truth_ratio"],
    "max_new_tokens": 6,
    "limit": 2,
    "eval_steps": 2,
    "eval_on_start": True,
}


@pytest.fixture(scope="module")
def tofu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = tofu_rows()
    plain = [{k: row[k] for k in ("question", "answer")} for row in rows["forget05_perturbed"]]
    rows |= {"forget05": plain, "retain95": rows["holdout05"][1:]}
    return write_tofu(tmp_path_factory.mktemp("tofu"), rows)


def sft(world: World, tofu: Path, out: Path, **settings: Any) -> TrainResult:
    given = {
        "model": {"name": str(world.base)},
        "data": {"path": "tofu:forget05"},
        "local": {"tofu": str(tofu)},
        "output_dir": str(out),
        **DEFAULTS,
        **settings,
    }
    return train_run(build_settings(RunConfig, given, print))


def described(world: World, tofu: Path, out: Path, **settings: Any) -> UnlearnRunConfig:
    given = {
        "model": {"name": str(world.run)},
        "forget": "tofu:forget05",
        "retain": "tofu:retain95",
        "local": {"tofu": str(tofu)},
        "output_dir": str(out),
        **DEFAULTS,
        **settings,
    }
    return build_settings(UnlearnRunConfig, given, print)


@pytest.fixture(scope="module")
def asked(world: World, tofu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuning run that asks the suite."""
    out = tmp_path_factory.mktemp("asked") / "run"
    sft(world, tofu, out, forget_split="forget05", **SUITE)
    return out


def evaluations(run: Path) -> dict[int, dict[str, Any]]:
    """{step: its line}."""
    lines = [line for line in tinyrun.lines(run) if "loss" not in line]
    return {line["step"]: line for line in lines}


def timeless(run: Path) -> list[dict[str, Any]]:
    skipped = ("seconds", "peak_memory_bytes")
    return [{k: v for k, v in line.items() if k not in skipped} for line in tinyrun.lines(run)]


def records_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / "TOFU_EVAL.json")


def probability(model: PaddedModel) -> float:
    """Mean over the forget rows of exp(-mean loss)."""
    rows = tofu_rows()["forget05_perturbed"]
    found = model.answers([(row["question"], row["answer"]) for row in rows])
    return sum(math.exp(float(one["logp"].mean())) for one in found) / len(found)


def test_the_numbers_are_those_of_transformers_at_the_start_and_at_the_end(
    world: World, asked: Path
) -> None:
    found = evaluations(asked)
    assert sorted(found) == [0, 2, 4, 5]  # the last as well, which eval_steps does not divide
    key = "eval_forget_q_a_prob"
    assert found[0][key] == pytest.approx(probability(PaddedModel(world.base, None)), rel=2e-4)
    assert found[5][key] == pytest.approx(probability(PaddedModel(world.base, asked)), rel=2e-4)
    assert found[5][key] > found[0][key]
    assert {"eval_extraction_strength", "eval_forget_truth_ratio"} <= found[5].keys()


def test_every_evaluation_has_its_files_and_limit_is_of_generation_alone(asked: Path) -> None:
    folders = sorted(path.name for path in (asked / "evals").glob("step-*"))
    assert folders == [f"step-{step:08d}" for step in (0, 2, 4, 5)]
    for step, line in evaluations(asked).items():
        found = records_of(asked / f"evals/step-{step:08d}")
        assert line["eval_forget_truth_ratio"] == found["forget_truth_ratio"]["agg_value"]
        assert len(found["forget_Q_A_ROUGE"]["value_by_index"]) == 2
        assert len(found["forget_truth_ratio"]["value_by_index"]) == 3


def test_the_last_one_is_what_lorry_eval_finds_measured(
    asked: Path, tofu: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(asked, tmp_path / "run"))
    before = (run / "evals/TOFU_EVAL.json").read_bytes()
    assert records_of(run / "evals") == records_of(run / "evals/step-00000005")
    words = ("suite=tofu", "forget_split=forget05", "limit=2", "max_new_tokens=6", "dtype=float32")
    assert lorry("eval", run, *words, f"local.tofu={tofu}", SCORED, "threads=1") == 0
    assert "6 of 6 metrics were measured before" in capfd.readouterr().err
    assert (run / "evals/TOFU_EVAL.json").read_bytes() == before


def test_a_run_that_ends_once_more_with_other_bits_keeps_its_steps(
    world: World, tofu: Path, asked: Path, tmp_path: Path
) -> None:
    """The receipt is of an adapter that other code has made: what was measured of it moves away."""
    run = Path(shutil.copytree(asked, tmp_path / "run"))
    receipt = read_json(run / "receipt.json")
    receipt["adapters"] = dict.fromkeys(receipt["adapters"], "0" * 64)
    (run / "receipt.json").write_text(json.dumps(receipt))
    before = records_of(run / "evals")
    before_moving = {**before, "exact_memorization": before["extraction_strength"]}
    (run / "evals/TOFU_EVAL.json").write_text(json.dumps(before_moving, indent=1))
    sft(world, tofu, run, forget_split="forget05", resume_from_checkpoint="auto", **SUITE)
    assert records_of(run / "evals") == before
    assert "exact_memorization" in records_of(run / "previous/1/evals")
    assert len(list((run / "evals").glob("step-*"))) == 4


def test_training_goes_on_as_without_it(
    world: World, tofu: Path, asked: Path, tmp_path: Path
) -> None:
    sft(world, tofu, tmp_path / "run")
    plain = [line for line in timeless(tmp_path / "run") if "loss" in line]
    assert plain == [line for line in timeless(asked) if "loss" in line]
    name = "adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (asked / name).read_bytes()


@pytest.fixture(scope="module")
def logs(world: World, tofu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of a model that never saw the rows: the base."""
    out = tmp_path_factory.mktemp("oracle")
    words = ("suite=tofu", "forget_split=forget05", "dtype=float32", f"output_dir={out}")
    named = "metrics=[forget_truth_ratio]"
    assert lorry("eval", world.base, *words, f"local.tofu={tofu}", named, "threads=1") == 0
    return out / "TOFU_EVAL.json"


def unlearn_settings(logs: Path) -> dict[str, Any]:
    own = {"metrics": ["forget_quality", "forget_Q_A_ROUGE"], "retain_logs_path": str(logs)}
    jobs = [{"name": "a", "beta": 0.1}, {"name": "b", "beta": 0.5, "max_steps": 3}]
    return {**SUITE, **own, "jobs": jobs}


@pytest.fixture(scope="module")
def jobs(world: World, tofu: Path, logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two jobs that unlearn."""
    out = tmp_path_factory.mktemp("jobs") / "run"
    train_run(described(world, tofu, out, **unlearn_settings(logs)))
    return out


def test_every_job_has_its_own_numbers_and_files(
    tofu: Path, jobs: Path, logs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = evaluations(jobs)
    assert {step: set(line["adapters"]) for step, line in found.items()} == {
        0: {"a", "b"}, 2: {"a", "b"}, 3: {"b"}, 4: {"a"}, 5: {"a"},
    }  # fmt: skip
    for name, step in (("a", 5), ("b", 3)):
        record = records_of(jobs / "evals" / name)
        assert record == records_of(jobs / f"evals/step-{step:08d}" / name)
        value = found[step]["adapters"][name]["eval_forget_quality"]
        assert value == record["forget_quality"]["agg_value"]
        assert "eval_forget_probability" in found[step]["adapters"][name]
    words = (f"local.tofu={tofu}", "forget_split=forget05", f"retain_logs_path={logs}", "limit=2")
    shape = ("max_new_tokens=6", "dtype=float32", "threads=1", "metrics=[forget_quality]")
    run = shutil.copytree(jobs, tmp_path / "run")
    assert lorry("eval", run, "suite=tofu", *words, *shape) == 0
    # the adapter read back over the start read back is the very model that was asked in training
    assert capfd.readouterr().err.count("4 of 4 metrics were measured before") == 2


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [7, 13], ids=["in an evaluation", "in the last one"])
def test_killed_while_it_is_asked_and_resumed(
    at: int, world: World, tofu: Path, jobs: Path, logs: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made: list[int] = []
    plain = suites.SuiteInputs

    def dying(*parts: Any) -> suites.SuiteInputs:
        made.append(1)
        if len(made) == at * 4 // 3:
            raise Killed
        return plain(*parts)

    settings = unlearn_settings(logs) | {"resume_from_checkpoint": "auto"}
    run = described(world, tofu, tmp_path / "run", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(suites, "SuiteInputs", dying)
        with pytest.raises(Killed):
            train_run(run)
    train_run(run)
    assert timeless(tmp_path / "run") == timeless(jobs)
    for file in ("a/adapter_model.safetensors", "b/adapter_model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (jobs / file).read_bytes()
    theirs = sorted(path.relative_to(jobs) for path in jobs.glob("evals/**/*.json"))
    assert theirs == sorted(
        path.relative_to(tmp_path / "run") for path in (tmp_path / "run").glob("evals/**/*.json")
    )
    for file in theirs:
        assert read_json(tmp_path / "run" / file) == read_json(jobs / file)


def test_the_best_adapter_by_a_metric_of_the_suite(
    world: World, tofu: Path, tmp_path: Path
) -> None:
    """And the files beside it are those of its step."""
    own: dict[str, Any] = {**SUITE, "eval_steps": 1, "metrics": ["forget_truth_ratio"]}
    result = train_run(
        described(
            world, tofu, tmp_path / "run", metric_for_best_model="forget_truth_ratio",
            load_best_model_at_end=True, **own,
        )
    )  # fmt: skip
    found = evaluations(tmp_path / "run")
    values = {step: line["eval_forget_truth_ratio"] for step, line in found.items() if step}
    best = max(values, key=values.__getitem__)  # more is better, since it is no loss
    assert result.outcome.best_step == best
    assert records_of(tmp_path / "run/evals") == records_of(tmp_path / f"run/evals/step-{best:08d}")


def test_a_number_without_a_better_direction_chooses_no_adapter_by_itself(
    world: World, tofu: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="none alone decides which adapter is better"):
        sft(world, tofu, tmp_path / "run", **SUITE, load_best_model_at_end=True)
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_weights_that_hardly_move_are_another_model(
    world: World, tofu: Path, tmp_path: Path
) -> None:
    """The base's digest is of a sample in bf16: with lora=null it may stay as it is."""
    own = {**SUITE, "eval_steps": 1, "metrics": ["forget_Q_A_Prob"], "max_steps": 2}
    whole = {
        "lora": None,
        "learning_rate": 1e-7,
        "lr_scheduler_type": "constant",
        "forget_split": "forget05",
    }
    given = {k: v for k, v in DEFAULTS.items() if k not in ("r", "lora_dropout")}
    run = build_settings(
        RunConfig,
        {
            "model": {"name": str(world.base)}, "data": {"path": "tofu:forget05"},
            "local": {"tofu": str(tofu)}, "output_dir": str(tmp_path / "run"), **given, **own, **whole,
        },
        print,
    )  # fmt: skip
    train_run(run)
    digests = {
        records_of(tmp_path / f"run/evals/step-{step:08d}")["forget_Q_A_Prob"]["model"]
        for step in (0, 1, 2)
    }
    assert len(digests) == 3
    assert "eval_forget_q_a_prob" in (tmp_path / "run/run.yaml").read_text()  # the best step's


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ["forget_qualty"]}, "did you mean 'forget_quality'"),
        ({"metrics": ["forget_quality"]}, "retain_logs_path=FILE"),
        ({"metrics": ["forget_truth_ratio"], "retain_logs_path": "none.json"}, "none.json"),
        ({"holdout_split": "nowhere", "metrics": ["mia_loss"]}, "nowhere"),
        ({"suite": None}, "suite=null says that there is none"),
        ({"suite": "muse", "metrics": [], "forget_split": "forget05"}, "is not used by suite=muse"),
    ],
)
def test_bad_settings_are_one_error_before_anything_is_written(
    settings: dict[str, Any], message: str, world: World, tofu: Path, tmp_path: Path
) -> None:
    with pytest.raises(LorryError, match=message):
        sft(world, tofu, tmp_path / "run", **SUITE | {"eval_on_start": False} | settings)
    assert not list((tmp_path / "run").glob("*.jsonl"))
    assert not (tmp_path / "run/evals").exists()


def test_files_of_somebody_else_are_not_touched(world: World, tofu: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "run/evals/step-00000002/TOFU_EVAL.json"
    theirs.parent.mkdir(parents=True)
    theirs.write_text(json.dumps({"forget_quality": {"agg_value": 0.5}}))
    with pytest.raises(ConfigError, match=r"TOFU_EVAL\.json"):
        sft(world, tofu, tmp_path / "run", **SUITE)
    assert read_json(theirs) == {"forget_quality": {"agg_value": 0.5}}
