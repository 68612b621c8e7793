"""Several jobs of one pass in a plan: one base, every adapter's bytes, the largest micro-batch; held
to the adapters that a run makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorry.config import RunConfig, build_settings, runs_by_adapter
from lorry.config.schema.lora import LoraConfig
from lorry.config.settings import PlanSettings
from lorry.errors import ConfigError, ModelError
from lorry.plan import machine, rates
from lorry.plan.choices import JobSettings, combine_adapters, joint_setup, list_planned_jobs
from lorry.plan.configs import find_config
from lorry.plan.known import KNOWN_CONFIGS
from lorry.plan.memory import estimate_memory
from lorry.plan.shapes import read_model_shape
from lorry.train.session import train_run
from lorry.verbs.planning.build import build_plan
from lorry.verbs.planning.table import plan_verdict
from tests.support import tinyrun
from tests.support.tinyrun import quick  # noqa: F401 - a fixture

SHAPE = read_model_shape(KNOWN_CONFIGS["smollm2-135m"])
JOBS: list[dict[str, Any]] = [
    {"name": "a", "r": 4, "per_device_train_batch_size": 1},
    {"name": "b", "r": 8, "target_modules": ["q_proj", "down_proj"]},
    {"name": "c", "r": 64, "layers_to_transform": [28, 29], "max_length": 512},
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate that nobody has to measure."""
    monkeypatch.setenv("LORRY_HOME", str(tmp_path / "home"))
    measured = rates.RateMeasurement(
        rate=1e12, at="2026-01-01T10:00:00+00:00", repeats=40, load=0.5, waited=0.0
    )
    rates.keep_matrix_rate(machine.machine_identity("cpu", "float32", None), measured)


def planned(model: str = "smollm2-135m", **settings: Any) -> dict[str, Any]:
    given = {"model": model, "dtype": "float32", "device": "cpu", "max_length": 256, **settings}
    made = build_settings(PlanSettings, given, print)
    return build_plan(made, find_config(made.model.name)).as_json()


def test_one_base_every_adapter_and_the_largest_micro_batch() -> None:
    together = planned(jobs=JOBS)
    alone = {job["name"]: planned(**{k: v for k, v in job.items() if k != "name"}) for job in JOBS}
    for held in ("adapter", "optimizer"):
        assert together["memory"][held] == sum(one["memory"][held] for one in alone.values())
    for once in ("libraries", "runtime", "base weights", "vocabulary"):
        assert together["memory"][once] == alone["a"]["memory"][once]
    # 8 rows of 512 tokens: those of c, with the low-rank terms of the layers that it leaves alone
    assert together["setup"]["tokens"] == 8 * 512
    assert together["memory"]["activations"] >= alone["c"]["memory"]["activations"]
    assert together["adapter_parameters"] == sum(
        one["adapter_parameters"] for one in alone.values()
    )
    assert [(job["name"], job["rank"], job["length"]) for job in together["jobs"]] == [
        ("a", 4, 256), ("b", 8, 256), ("c", 64, 512),
    ]  # fmt: skip
    seconds = [one["speed"]["seconds_per_step"] for one in alone.values()]
    assert together["speed"]["seconds_per_step"] == pytest.approx(sum(seconds))


@pytest.mark.parametrize(
    ("rows", "joint", "tokens"),
    [(1, None, 3 * 256), (4, None, 1024), (1, 600, 600), (8, None, 2048)],
)
def test_small_micro_batches_share_a_pass(rows: int, joint: int | None, tokens: int) -> None:
    """Up to 1024 tokens on a CPU, or `joint_tokens`; never fewer than one job's own."""
    run = build_settings(
        RunConfig,
        {
            "data": "x.jsonl",
            "max_length": 256,
            "per_device_train_batch_size": rows,
            "joint_tokens": joint,
            "jobs": [{"name": name, "r": 4} for name in "abc"],
        },
        print,
    )
    settings = {
        name: JobSettings(one.lora or LoraConfig(), one.train, one.data.max_length, 4)
        for name, one in runs_by_adapter(run).items()
    }
    jobs = list_planned_jobs(settings, SHAPE)
    setup = joint_setup(jobs, "float32", "cpu", attention="none", joint_tokens=run.joint_tokens)
    assert setup.tokens == tokens
    # a token passes one adapter's terms, whoever is beside it
    one = estimate_memory(SHAPE, jobs[0].adapter, setup)
    three = estimate_memory(SHAPE, combine_adapters(jobs), setup)
    # without the margin, which is a share of all of it
    assert three.above_imports - one.above_imports == 16 * 2 * jobs[0].adapter.parameters


def test_the_values_are_those_of_the_run(tmp_path: Path) -> None:
    """Ranks and targets of each job's own, and the directory that the run left."""
    model = tinyrun.model_directory(tmp_path / "model", num_hidden_layers=2)
    data = tinyrun.write_rows(tmp_path / "data.jsonl", tinyrun.rows(6))
    jobs = [{"name": "a", "r": 2}, {"name": "b", "r": 5, "target_modules": ["q_proj"]}]
    own = {
        k: v for k, v in tinyrun.DEFAULTS.items() if k not in ("r", "max_length", "dtype", "device")
    }
    train_run(tinyrun.described(model, data, tmp_path / "run", jobs=jobs, max_steps=1), [])
    trained = json.loads((tmp_path / "run/receipt.json").read_text())["trainable_parameters"]
    made = planned(str(model), jobs=jobs, **own)
    assert made["adapter_parameters"] == trained
    finished = planned(str(tmp_path / "run"))
    assert [(job["name"], job["rank"]) for job in finished["jobs"]] == [("a", 2), ("b", 5)]
    assert any("2 adapters, counted as jobs of one pass" in note for note in finished["notes"])


def test_adapters_of_several_bases(tmp_path: Path) -> None:
    for name, base in {"a": "gpt2", "b": "pythia-160m"}.items():
        (tmp_path / name).mkdir()
        config = {"base_model_name_or_path": base, "r": 8}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"for several base models \(a for gpt2, b for pythia-160m\); name"
    ):
        find_config(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"memory_budget": "3GiB"}, "memory_budget cannot be used with several jobs yet"),
        (
            {"backend": "megatron", "processes": 2, "device": "cuda"},
            "several jobs cannot be planned on it; give backend=ddp or fsdp",
        ),
    ],
)
def test_what_is_not_planned(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        planned(jobs=JOBS, **settings)


def test_the_verdict_says_what_they_need_together() -> None:
    made = build_settings(
        PlanSettings,
        {"model": "smollm2-135m", "dtype": "float32", "device": "cpu", "jobs": JOBS},
        print,
    )
    plan = build_plan(made, find_config("smollm2-135m"))
    assert plan_verdict(plan).startswith("needs ")
    assert plan.trainable
