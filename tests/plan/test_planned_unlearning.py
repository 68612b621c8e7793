"""What a plan counts of an unlearning run: both row sets, what is asked of the start, the frozen
adapters; held to the methods' own batches and to the files of a run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from lorry.config import UnlearnConfig, build_settings, dump_settings, parse_settings
from lorry.config.guide import format_help
from lorry.config.settings import PlanSettings, UnlearnPlanSettings
from lorry.config.unlearning.unlearn import UNLEARN_METHODS, UnlearnRunConfig
from lorry.data.batch import TokenizedExample, collate
from lorry.errors import ConfigError
from lorry.models.scoring.score import TokenScore
from lorry.plan import machine, rates
from lorry.plan.configs import find_config
from lorry.tasks.unlearn.methods.method import StartModel
from lorry.tasks.unlearn.methods.registry import METHOD_CLASSES, make_method
from lorry.tasks.unlearn.pairing import ALTERNATE, FORGET, RETAIN
from lorry.train.session import train_run
from lorry.verbs.plan import own_unlearning
from lorry.verbs.planning.build import build_plan
from tests.support import tinyrun
from tests.support.tinyrun import quick  # noqa: F401 - a fixture

WORDS = ["model=smollm2-135m", "dtype=float32", "device=cpu", "max_length=256"]
ROWS = ["forget=f.jsonl", "retain=r.jsonl"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate that nobody has to measure."""
    monkeypatch.setenv("LORRY_HOME", str(tmp_path / "home"))
    measured = rates.RateMeasurement(
        rate=1e12, at="2026-01-01T10:00:00+00:00", repeats=40, load=0.5, waited=0.0
    )
    rates.keep_matrix_rate(machine.machine_identity("cpu", "float32", None), measured)


def planned(*words: str) -> dict[str, Any]:
    settings = parse_settings(PlanSettings, [*WORDS, *words], print)
    return build_plan(settings, find_config(settings.model.name)).as_json()


def unlearned(*words: str) -> dict[str, Any]:
    return planned(*ROWS, *words)


CASES: list[dict[str, Any]] = [
    *({"method": name} for name in UNLEARN_METHODS),
    *({"method": name, "alpha": 0.0} for name in ("NPO", "DPO", "IdkAP", "JensUn", "RMU")),
    {"method": "UNDIAL", "alpha": 1.0},
    *({"method": "NPO", "retain_loss": kind} for kind in ("KL", "EMBED")),
    *({"method": "SimNPO", "retain_loss": kind} for kind in ("KL", "EMBED")),
    {"method": "RMU", "retain_loss": "NLL"},
    {"method": "RMU", "retain_loss": "NLL", "adaptive": True},
    {"method": "PDU", "retain_loss": "KL", "retain_loss_eps": 0.1},
]


@pytest.mark.parametrize("given", CASES, ids=lambda given: "-".join(map(str, given.values())))
def test_reads_are_those_of_the_method(given: dict[str, Any]) -> None:
    """The sequences of the batch that the method makes of one row of each set, and its questions."""
    more = {"alternates": "a.json"} if given["method"] == "AltPO" else {}
    rows = {"forget": "f.jsonl", "retain": "r.jsonl", "reference": "live"}
    config = UnlearnConfig.model_validate({**rows, **given, **more})
    own = {**config.settings(), "retain_loss_eps": 0.1} if given["method"] == "PDU" else None
    made = make_method(config.method, [own or config.settings()], StartModel(8))
    roles = [(FORGET, 0), *[(ALTERNATE, 0)] * METHOD_CLASSES[config.method].needs_alternates]
    if made.retains:
        other = METHOD_CLASSES[config.method].needs_retain_alternates
        roles += [(RETAIN, 1), *[(ALTERNATE, 1)] * other]
    batch = made.prepare(
        collate(
            [
                TokenizedExample([1, 2, 3], [0.0, 1.0, 1.0], key=key, role=role, group=group)
                for key, (role, group) in enumerate(roles)
            ]
        )
    )
    asked = made.reference_wants(batch).values()
    kinds = {"scores" if isinstance(want, TokenScore) else "hidden" for want in asked}
    reads = config.step_reads
    assert reads.together == reads.passes == len(batch)
    # where both are asked, the wider counts
    assert reads.asks_start == (min(kinds) if kinds else None)
    assert reads.highest_layer == made.highest_layer


def test_a_micro_batch_holds_both_row_sets_and_the_start_costs_a_forward() -> None:
    npo, sft = unlearned("method=NPO"), planned("data=f.jsonl")
    twice = planned("data=f.jsonl", "per_device_train_batch_size=16")
    assert npo["setup"]["tokens"] == 2 * sft["setup"]["tokens"] == 2 * 8 * 256
    for name, size in twice["memory"].items():
        if name not in ("margin", "total"):
            assert npo["memory"][name] == size
    assert npo["memory"]["start"] == 4 * 2 * 8 * 256  # a float32 a token
    flops = npo["flops_per_token"]
    # a third of a step: twice a forward are its backward
    assert flops["reference"] == pytest.approx(flops["step"] / 3, rel=0.07)
    more = npo["speed"]["seconds_per_step"] / sft["speed"]["seconds_per_step"]
    assert more == pytest.approx(2 * flops["step"] / sft["flops_per_token"]["step"])
    # remembered, the start costs nothing in a step; simnpo asks none
    assert unlearned("method=NPO", "reference=cached")["flops_per_token"]["reference"] == 0
    assert unlearned("method=SimNPO")["flops_per_token"] == sft["flops_per_token"]
    kept = unlearned("method=NPO", "retain_loss=KL", "gradient_accumulation_steps=3")["memory"]
    assert kept["start"] == 3 * 2 * 8 * 256 * 576 * 4  # hidden states of all micro-batches


def test_parted_gradients() -> None:
    """sam and gru run the row sets one after the other, and hold another buffer."""
    plain = unlearned("method=NPO")
    for kind, cost in {"sam": 3, "gru": 2}.items():
        made = unlearned("method=NPO", f"gradient={kind}")
        assert made["setup"]["tokens"] == 8 * 256
        assert (
            made["memory"]["optimizer"] - plain["memory"]["optimizer"]
            == 4 * plain["adapter_parameters"]
        )
        more = made["speed"]["seconds_per_step"] / plain["speed"]["seconds_per_step"]
        assert more == pytest.approx(cost / 2)


def test_rmu_runs_nothing_above_its_layer() -> None:
    made, npo = unlearned("method=RMU", "layer=7"), unlearned("method=NPO")
    layers = ["data=f.jsonl", "layers_to_transform=0,1,2,3,4,5,6,7"]
    assert made["adapter_parameters"] == planned(*layers)["adapter_parameters"]
    # 8 of 30 layers, all of which have adapters
    assert made["memory"]["activations"] == pytest.approx(
        npo["memory"]["activations"] * 8 / 30, abs=1
    )
    assert made["memory"]["base weights"] == npo["memory"]["base weights"]
    assert made["flops_per_token"]["head"] == 0
    steps = made["flops_per_token"], npo["flops_per_token"]
    assert steps[0]["step"] - steps[0]["reference"] < 8 / 30 * steps[1]["step"]


@pytest.mark.parametrize("word", ["subjects", "jobs"])
def test_subjects_are_jobs(word: str) -> None:
    made = planned(
        "retain=r.jsonl",
        f"{word}=[{{name: a, forget: a.jsonl, r: 4}}, {{name: b, forget: b.jsonl, r: 8}}]",
    )
    assert [(job["name"], job["rank"]) for job in made["jobs"]] == [("a", 4), ("b", 8)]
    assert made["setup"]["tokens"] == 2 * 8 * 256
    alone = [unlearned(f"r={rank}") for rank in (4, 8)]
    assert made["adapter_parameters"] == sum(one["adapter_parameters"] for one in alone)
    seconds = sum(one["speed"]["seconds_per_step"] for one in alone)
    assert made["speed"]["seconds_per_step"] == pytest.approx(seconds)
    assert made["memory"]["start"] == 2 * alone[0]["memory"]["start"]


def test_numbers_to_compare_are_jobs() -> None:
    assert [job["rank"] for job in unlearned("beta=0.1,0.5")["jobs"]] == [16, 16]


def test_a_description_of_a_run_and_its_start(tmp_path: Path) -> None:
    """A run's own file, and its adapter, with the one below it, as the start of another."""
    model = tinyrun.model_directory(tmp_path / "model", num_hidden_layers=2)
    data = tinyrun.write_rows(tmp_path / "data.jsonl", tinyrun.rows(6))
    train_run(tinyrun.described(model, data, tmp_path / "first", max_steps=1), [])
    forget = tinyrun.write_rows(tmp_path / "forget.jsonl", tinyrun.rows(2))
    retain = tinyrun.write_rows(tmp_path / "retain.jsonl", tinyrun.rows(4, start=2))
    settings = {
        **tinyrun.DEFAULTS, "model": str(tmp_path / "first"), "forget": str(forget), "retain": str(retain),
        "r": 3, "max_steps": 1, "output_dir": str(tmp_path / "second"),
    }  # fmt: skip
    train_run(build_settings(UnlearnRunConfig, settings, print), [])
    written = parse_settings(PlanSettings, [str(tmp_path / "second/run.yaml")], print)
    assert isinstance(written, UnlearnPlanSettings)

    def values(run: str) -> int:
        return sum(x.size for x in load_file(tmp_path / run / "adapter_model.safetensors").values())

    made = build_plan(written, find_config(written.model.name)).as_json()
    assert made["adapter_parameters"] == values("second")
    assert made["memory"]["frozen adapters"] == 4 * values("first")
    again = unlearned(f"model={tmp_path / 'second'}", "max_length=32")
    assert again["memory"]["frozen adapters"] == 4 * (values("first") + values("second"))
    assert not any("trained further" in note for note in again["notes"])
    # without any rows it is the run's own, with what is given beside it
    words = [f"model={tmp_path / 'second'}", "device=cpu"]
    notes = list[str]()
    own = own_unlearning(parse_settings(PlanSettings, words, print), notes.append)
    assert isinstance(own, UnlearnPlanSettings)
    assert (own.model.name, own.unlearn.forget) == (str(tmp_path / "first"), str(forget))
    assert own.model_dump(exclude={"model", "format"}) == written.model_dump(
        exclude={"model", "format"}
    )
    assert any("the unlearning that its run.yaml describes" in note for note in notes)
    longer = own_unlearning(parse_settings(PlanSettings, [*words, "r=5"], print), print)
    assert longer.lora is not None
    assert longer.lora.r == 5
    # with rows to train on it is another verb's plan, which is said
    goes_on = planned(f"model={tmp_path / 'second'}", "max_length=32", "data=f.jsonl")
    assert any("is a run of lorry unlearn, and this" in note for note in goes_on["notes"])
    of_sft = planned(f"model={tmp_path / 'first'}", "max_length=32", "data=f.jsonl")
    assert not any("lorry unlearn" in note for note in [*again["notes"], *of_sft["notes"]])
    # the run itself chooses by the same bytes
    budget = settings | {"memory_budget": "500MiB", "output_dir": str(tmp_path / "third")}
    with pytest.raises(ConfigError, match="nothing fits") as told:
        train_run(build_settings(UnlearnRunConfig, budget, print), [])
    plan = build_settings(UnlearnPlanSettings, budget, print)
    with pytest.raises(ConfigError, match="nothing fits") as foretold:
        build_plan(plan, find_config(plan.model.name))
    assert str(told.value) == str(foretold.value)


def test_which_settings_are_meant(tmp_path: Path) -> None:
    """A setting that `lorry unlearn` alone has makes it a plan of one."""
    assert isinstance(parse_settings(PlanSettings, ["r=8"], print), PlanSettings)
    for words in (ROWS, ["--forget", "f.jsonl", "--method", "SimNPO", "alpha=0"]):
        assert isinstance(parse_settings(PlanSettings, list(words), print), UnlearnPlanSettings)
    plain = tmp_path / "plain.yaml"
    plain.write_text("data: f.jsonl\nr: 8\n")
    assert isinstance(parse_settings(PlanSettings, [str(plain)], print), PlanSettings)
    made = parse_settings(PlanSettings, ROWS, print)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_settings(made))
    again = parse_settings(PlanSettings, [str(dumped)], print)
    assert isinstance(made, UnlearnPlanSettings)
    assert isinstance(again, UnlearnPlanSettings)
    assert again.unlearn.model_dump() == made.unlearn.model_dump()
    with pytest.raises(ConfigError, match=r"unlearn.forget"):
        parse_settings(PlanSettings, ["retain=r.jsonl"], print)
    # SmolLM2-135M, all of it: fp32 masters and gradients beside bf16 weights
    assert unlearned("lora=null", "dtype=bfloat16")["memory"]["masters"] == 8 * 134_515_008


def test_the_help_of_plan_lists_them() -> None:
    page = format_help(PlanSettings, "lorry plan", "memory and time")
    assert "unlearn: what is forgotten" in page
    assert "forget " in page


def test_several_adapters_are_no_start(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        config = {"base_model_name_or_path": "gpt2", "r": 8}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="has 2 adapters, and an unlearning run starts from one"):
        unlearned(f"model={tmp_path}")
