"""Several jobs in one pass: each is, loss for loss, the run it would be alone; and what such a run
leaves behind.
"""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorry.backends.optim import ParameterSetOptimizer
from lorry.config import RunConfig, parse_settings
from lorry.errors import ConfigError, ContractError
from lorry.models.loading.open import open_model
from lorry.train import artifacts, checks
from lorry.train.checks import ContractChecks
from lorry.train.session import TrainResult, train_run
from tests.support import tinyrun
from tests.support.tinyrun import quick  # noqa: F401 - a fixture

Lines = list[dict[str, Any]]
# What differs: rank, scale, targets, rate, seed, dropout, decay, clip, schedule, rows, batch and
# accumulation, steps, early end.
JOBS: dict[str, dict[str, Any]] = {
    "small": {"r": 2},
    "wide": {
        "r": 5,
        "lora_alpha": 3,
        "lora_dropout": 0.2,
        "learning_rate": 3e-3,
        "seed": 7,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "data": "other",
        "target_modules": ["q_proj", "down_proj"],
        "use_rslora": True,
    },
    "short": {
        "r": 3,
        "lora_dropout": 0.1,
        "seed": 0,
        "max_steps": 4,
        "max_grad_norm": 0.05,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "loraplus_lr_ratio": 4.0,
        "warmup_steps": 2,
        "init_lora_weights": "gaussian",
    },
    "wild": {
        "r": 4,
        "learning_rate": 0.3,
        "early_stopping_patience": 1,
        "lr_scheduler_type": "constant",
    },
}
PLAIN: dict[str, Any] = {
    "eval": None,
    "eval_steps": None,
    "load_best_model_at_end": None,
    "max_steps": 3,
}
SHARED = {"max_steps": 9, "eval_steps": 1, "load_best_model_at_end": True, "save_steps": 3}


class World:
    """A model, two data sets, held-out rows; runs of several jobs and of one."""

    def __init__(self, root: Path) -> None:
        self.root, self.model = root, tinyrun.model_directory(root / "model")
        made = {
            "data": tinyrun.rows(10),
            "other": tinyrun.rows(7, start=20),
            "held": tinyrun.rows(4, start=40),
        }
        self.files = {
            name: tinyrun.write_rows(root / f"{name}.jsonl", rows) for name, rows in made.items()
        }

    def run(self, out: str, **settings: Any) -> RunConfig:
        given = {"eval": str(self.files["held"]), **SHARED, **settings}
        data = self.files[given.pop("data", "data")]
        return tinyrun.described(
            self.model, data, self.root / out, **{k: v for k, v in given.items() if v is not None}
        )

    def together(self, out: str, jobs: dict[str, dict[str, Any]], **settings: Any) -> RunConfig:
        listed = [{"name": name, **job} for name, job in jobs.items()]
        for job in listed:
            if "data" in job:
                job["data"] = {"path": str(self.files[job["data"]])}
        return self.run(out, jobs=listed, **settings)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def joint(world: World) -> TrainResult:
    return train_run(world.together("joint", JOBS), [])


@pytest.fixture(scope="module")
def alone(world: World) -> Callable[[str], TrainResult]:
    made: dict[str, TrainResult] = {}

    def get(name: str) -> TrainResult:
        if name not in made:
            made[name] = train_run(world.run(f"alone-{name}", **{**SHARED, **JOBS[name]}), [])
        return made[name]

    return get


def lines(folder: Path, adapter: str | None = None) -> tuple[Lines, Lines]:
    """(steps, evaluations) of a run, or of one adapter of a run of several, each with its step."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if adapter is not None:
        read = [
            {"step": line["step"], **line["adapters"][adapter]}
            for line in read
            if adapter in line["adapters"]
        ]
    return [line for line in read if "loss" in line], [line for line in read if "eval_loss" in line]


# --- each is the run alone


@pytest.mark.parametrize("name", JOBS)
def test_each_job_is_the_run_alone(
    name: str, joint: TrainResult, alone: Callable[[str], TrainResult]
) -> None:
    """Losses, norms, rates, tokens, epochs, evaluations, where it ended, and the adapter itself."""
    single = alone(name)
    (mine, held), (theirs, held_alone) = lines(joint.path, name), lines(single.path)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    assert [line["step"] for line in held] == [line["step"] for line in held_alone]
    assert len(held) > 1
    for a, b in zip(mine, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert (a["learning_rate"], a["tokens"], a["epoch"]) == (
            b["learning_rate"],
            b["tokens"],
            b["epoch"],
        )
    for a, b in zip(held, held_alone, strict=True):
        assert a["eval_loss"] == pytest.approx(b["eval_loss"], abs=1e-5)
    ours, whole = joint.outcome.jobs[name], single.outcome
    assert (ours.steps, ours.best_step, ours.stopped_early) == (
        whole.steps,
        whole.best_step,
        whole.stopped_early,
    )
    assert ours.last_evaluation["eval_loss"] == pytest.approx(
        whole.last_evaluation["eval_loss"], abs=1e-5
    )
    trained, truth = (
        load_file(f / "adapter_model.safetensors") for f in (joint.path / name, single.path)
    )
    assert trained.keys() == truth.keys()
    assert all(torch.allclose(trained[key], truth[key], atol=1e-4) for key in truth)
    moved = [key for key in truth if "lora_B" in key]
    assert max(float(truth[key].abs().max()) for key in moved) > 1e-3


def test_the_jobs_end_where_they_should(joint: TrainResult) -> None:
    ended = {name: (o.steps, o.stopped_early) for name, o in joint.outcome.jobs.items()}
    assert ended["small"] == ended["wide"] == (9, False)
    assert ended["short"] == (4, False)
    assert ended["wild"][1]
    assert ended["wild"][0] < 9
    steps = [
        json.loads(line)
        for line in (joint.path / "metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert [len(line["adapters"]) for line in steps] == [
        sum(n >= step for n, _ in ended.values()) for step in range(1, 10)
    ]
    assert joint.outcome.steps == 9


def test_seeds_alone_make_different_jobs(world: World) -> None:
    """Same data, rank and rate: another seed is another start, another order and other dropout; the
    same seed is the same job.
    """
    jobs = {
        name: {"seed": seed, "lora_dropout": 0.3}
        for name, seed in (("a", 1), ("b", 2), ("again", 1))
    }
    result = train_run(world.together("seeds", jobs, max_steps=4), [])
    curves = {name: [line["loss"] for line in lines(result.path, name)[0]] for name in jobs}
    assert curves["a"] == pytest.approx(curves["again"], abs=1e-6)
    assert curves["a"] != pytest.approx(curves["b"], abs=1e-3)


def test_which_jobs_share_a_pass_changes_nothing(world: World, joint: TrainResult) -> None:
    """Every job alone in its micro-batches, and two by two."""
    for room in (1, 300):
        apart = train_run(world.together(f"room-{room}", JOBS, joint_tokens=room), [])
        for name in JOBS:
            mine, together = (
                [line["loss"] for line in lines(run.path, name)[0]] for run in (apart, joint)
            )
            assert mine == pytest.approx(together, abs=1e-5)


def test_streamed_and_packed_jobs(world: World) -> None:
    """A streamed source beside one in memory; packing fills each job's own micro-batch."""
    settings: dict[str, Any] = {**PLAIN, "max_steps": 5, "packing": True}
    jobs: dict[str, dict[str, Any]] = {
        "stored": {"r": 2},
        "streamed": {"data": {"path": str(world.files["other"]), "streaming": True}, "seed": 5},
    }
    run = world.run("mixed", jobs=[{"name": name, **job} for name, job in jobs.items()], **settings)
    result = train_run(run, [])
    for name, own in jobs.items():
        single = {
            **settings,
            **own,
            "data": "data" if name == "stored" else "other",
            "streaming": name == "streamed",
        }
        truth = lines(train_run(world.run(f"mixed-{name}", **single), []).path)[0]
        assert [line["loss"] for line in lines(result.path, name)[0]] == pytest.approx(
            [t["loss"] for t in truth], abs=1e-5
        )


# --- what it leaves


def test_the_run_directory_has_a_peft_adapter_per_job(world: World, joint: TrainResult) -> None:
    base = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32)
    ids = torch.tensor([[5, 9, 200, 31, 7, 8, 300]])
    opened = open_model(world.run("x").model.model_copy(update={"name": str(joint.path)}), print)
    assert sorted(opened.adapters) == sorted(JOBS)
    for name in JOBS:
        folder = joint.path / name
        assert {p.name for p in folder.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "lorry_adapter.json",
        }
        model = PeftModel.from_pretrained(base, folder)
        theirs = model(ids).logits
        base = model.unload()
        single = open_model(world.run("x").model.model_copy(update={"name": str(folder)}), print)
        torch.testing.assert_close(single.model(ids).logits, theirs, atol=1e-4, rtol=1e-4)
    assert not (joint.path / "adapter_config.json").exists()


def test_receipt_contracts_samples_and_card_cover_every_job(joint: TrainResult) -> None:
    assert [c["status"] for c in joint.contracts] == ["held"] * 8
    assert "zero-initialised matrices of 4 adapters" in joint.contracts[2]["detail"]
    assert "values of 4 adapters" in joint.contracts[4]["detail"]
    receipt = json.loads((joint.path / "receipt.json").read_text())
    assert (
        receipt["adapters"].keys()
        == receipt["data"].keys()
        == receipt["seed"].keys()
        == JOBS.keys()
    )
    assert receipt["seed"]["wide"] == 7
    assert (
        receipt["data"]["small"]["sha256"]
        == receipt["data"]["short"]["sha256"]
        != receipt["data"]["wide"]["sha256"]
    )
    groups = [row["group"] for row in json.loads((joint.path / "samples.json").read_text())]
    assert {g.split(": ")[0] for g in groups if "held-out" in g} == set(JOBS)
    # each data set once
    assert {g for g in groups if g.endswith("training")} == {
        "small: training",
        "wide: training",
    }
    card = (joint.path / "README.md").read_text()
    assert "4 LoRA adapters, trained in one pass" in card
    assert "| wide: rank | 5 |" in card


def test_the_description_written_is_the_run_again(world: World, joint: TrainResult) -> None:
    assert parse_settings(RunConfig, [str(joint.path / "run.yaml")], print) == world.together(
        "joint", JOBS
    )
    again = parse_settings(
        RunConfig, [str(joint.path / "run.yaml"), f"output_dir={world.root / 'again'}"], print
    )
    train_run(again, [])
    for name in JOBS:
        one, two = (
            (folder / name / "adapter_model.safetensors").read_bytes()
            for folder in (joint.path, again.output_dir)
        )
        assert one == two


def test_an_earlier_run_of_several_is_set_aside_with_its_adapters(world: World) -> None:
    settings = {**PLAIN, "max_steps": 2}
    first = train_run(world.together("aside", {"a": {}, "b": {"r": 3}}, **settings), []).path
    kept = (first / "b" / "adapter_model.safetensors").read_bytes()
    train_run(world.together("aside", {"a": {}, "c": {"r": 3}}, **settings), [])
    assert (first / "previous" / "1" / "b" / "adapter_model.safetensors").read_bytes() == kept
    assert not (first / "b").exists()
    assert (first / "c" / "adapter_config.json").is_file()


def test_moments_are_gone_before_the_adapters_are_written(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is written and read back lay beside them, and was the peak of a run of short rows."""
    moments, alive = list[weakref.ref[torch.Tensor]](), list[int]()
    make, write = ParameterSetOptimizer.__init__, artifacts.write_adapters

    def made(self: ParameterSetOptimizer, *args: Any) -> None:
        make(self, *args)
        moments.extend(weakref.ref(moment) for moment in self.moments())

    def written(*args: Any) -> dict[str, str]:
        alive.append(sum(moment() is not None for moment in moments))
        return write(*args)

    monkeypatch.setattr(ParameterSetOptimizer, "__init__", made)
    monkeypatch.setattr(artifacts, "write_adapters", written)
    train_run(world.together("lean", {"small": {"r": 2}, "wide": {"r": 5}}, **PLAIN), [])
    assert len(moments) == 4
    assert alive == [0]


def test_one_job_in_a_list_is_a_plain_run(world: World) -> None:
    """Files, metrics and adapter as without the list, but for the name."""
    single = train_run(world.run("plain", r=3, max_steps=3), []).path
    listed = train_run(world.together("listed", {"default": {"r": 3}}, max_steps=3), []).path
    assert {p.name for p in single.iterdir()} == {p.name for p in listed.iterdir()}
    assert (single / "adapter_model.safetensors").read_bytes() == (
        listed / "adapter_model.safetensors"
    ).read_bytes()
    assert "adapters" not in json.loads((listed / "metrics.jsonl").read_text().splitlines()[0])


# --- what stops it


def test_a_model_with_an_adapter_is_refused(
    world: World, alone: Callable[[str], TrainResult]
) -> None:
    run = world.together("refused", {"a": {}, "b": {}}).model_copy()
    on_run = run.model_copy(
        update={"model": run.model.model_copy(update={"name": str(alone("small").path)})}
    )
    with pytest.raises(ConfigError, match="already has an adapter, and jobs start with new ones"):
        train_run(on_run, [])


def test_contract_3_asks_every_job(world: World) -> None:
    """The second job's warm-up outlasts it: nothing of it ever moved, and the first one's proof is
    not its own.
    """
    jobs = {"a": {}, "b": {"max_steps": 1, "warmup_steps": 1}}
    with pytest.raises(ContractError, match="adapter 'b' had no step with a learning rate above 0"):
        train_run(world.together("stuck", jobs, **PLAIN), [])


def first_calls(patch: pytest.MonkeyPatch, owner: Any, name: str, at: int) -> list[Any]:
    """What a function is given as its argument number ``at``, call by call."""
    given, original = list[Any](), getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        given.append(args[at])
        return original(*args, **kwargs)

    patch.setattr(owner, name, watched)
    return given


def test_contract_4_looks_for_leaks_between_jobs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sequences it compares have neighbours of other jobs."""
    seen = first_calls(monkeypatch, checks, "packing_leak", 0)
    train_run(
        world.together(
            "leak", {"a": {"per_device_train_batch_size": 2}, "b": {"r": 3}, "c": {}}, **PLAIN
        ),
        [],
    )
    (packed,) = seen
    adapters = packed.batch.adapter.tolist()
    assert adapters[:3] == [0, 1, 2]
    assert all(one != other for one, other in itertools.pairwise(adapters))
    # and each job's is scored alone
    assert {example.adapter for example in packed.alone} == {0, 1, 2}


def test_contract_4_asks_for_each_jobs_own_end(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Plain text need not end; answers must, also beside plain text."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": row["answer"]}) + "\n" for row in tinyrun.rows(5)))
    ends = first_calls(monkeypatch, ContractChecks, "first_batches", 3)
    jobs = [{"name": "chat"}, {"name": "text", "data": str(text)}]
    assert train_run(world.run("ends", jobs=jobs, **PLAIN), []).contracts[3]["status"] == "held"
    assert [bool(own) for own in ends[0]] == [True, False]
