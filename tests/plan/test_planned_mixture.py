"""A mixture in a plan: the experts' run or runs, then a router over them, held and frozen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lorry.adapters.router import RoutingRule, TokenRouter
from lorry.config import build_settings, parse_settings
from lorry.config.settings import MoePlanSettings, PlanSettings
from lorry.errors import ConfigError
from lorry.notes import ignore_note
from lorry.plan import machine, rates
from lorry.plan.configs import find_config
from lorry.verbs.planning.build import build_plan
from lorry.verbs.planning.mixture import build_mixture_plans

MLP = ["gate_proj", "up_proj", "down_proj"]
EXPERTS: list[dict[str, Any]] = [
    {"name": "a", "data": "a.jsonl", "r": 4},
    {"name": "b", "data": "b.jsonl", "r": 16, "max_length": 128},
]
SETTINGS: dict[str, Any] = {
    "model": "smollm2-135m",
    "dtype": "float32",
    "device": "cpu",
    "max_length": 256,
    "target_modules": MLP,
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate that nobody has to measure."""
    monkeypatch.setenv("LORRY_HOME", str(tmp_path / "home"))
    measured = rates.RateMeasurement(
        rate=1e12, at="2026-01-01T10:00:00+00:00", repeats=40, load=0.5, waited=0.0
    )
    rates.keep_matrix_rate(machine.machine_identity("cpu", "float32", None), measured)


def planned(**more: Any) -> dict[str, Any]:
    given = {"experts": EXPERTS, **SETTINGS, **more}
    if "lora" in more:  # which no setting of an adapter may stand beside
        del given["target_modules"]
    made = build_settings(MoePlanSettings, given, ignore_note)
    plans = build_mixture_plans(made, find_config(made.model.name))
    return {stage: plan.as_json() for stage, plan in plans.items()}


def planned_alone(**more: Any) -> dict[str, Any]:
    made = build_settings(PlanSettings, {**SETTINGS, **more}, ignore_note)
    return build_plan(made, find_config(made.model.name)).as_json()


def test_experts_are_jobs_and_their_router_holds_them_frozen() -> None:
    plans = planned(router={"train": {"per_device_train_batch_size": 3}})
    assert list(plans) == ["experts", "router"]
    jobs = [{k: v for k, v in one.items() if k != "data"} for one in EXPERTS]
    assert plans["experts"]["memory"] == planned_alone(jobs=jobs)["memory"]
    router = plans["router"]
    # a matrix [2, 576] of each of 30 layers, as the one that trains
    own = TokenRouter(["a", "b"], RoutingRule(), layers=30, width=576)
    assert router["adapter_parameters"] == own.num_parameters()
    values = sum(planned_alone(r=r)["adapter_parameters"] for r in (4, 16))
    assert router["memory"]["frozen adapters"] == 4 * values
    # a row of each domain beside each other
    assert router["setup"]["tokens"] == 3 * 2 * 256
    trained = planned(router={"train_experts": True})["router"]
    assert trained["adapter_parameters"] == own.num_parameters() + values
    assert trained["memory"].get("frozen adapters", 0) == 0
    both = planned(router={"input": "both"})["router"]
    assert both["adapter_parameters"] == 2 * own.num_parameters()


def test_experts_in_turn_are_planned_alone() -> None:
    plans = planned(together=False, router={"kind": "uniform"})
    assert list(plans) == ["expert a", "expert b"]
    assert plans["expert b"]["memory"] == planned_alone(r=16, max_length=128)["memory"]


def test_a_classifier_with_a_lora_of_its_own() -> None:
    """16 of 30 layers run and are adapted, the head never does; experts are held, and no token passes
    them. Without `lora` no run makes a classifier."""
    assert list(planned(router={"kind": "sequence"})) == ["experts"]
    own = planned(router={"kind": "sequence", "lora": {"r": 8}})["router"]
    alone = planned_alone(r=8, target_modules="auto", layers_to_transform=list(range(16)))
    assert own["adapter_parameters"] == alone["adapter_parameters"] + 2 * (576 + 1)
    values = sum(planned_alone(r=r)["adapter_parameters"] for r in (4, 16))
    assert own["memory"]["frozen adapters"] == 4 * values
    # q, k, v, o of 9 and 3 heads of 64, MLP of 1536; a row of each expert, 4 of it; T = 256
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536
    adapter = own["adapter_parameters"]
    attention = 576 * 256
    step = 16 * (4 * layer + 7 * attention) + 6 * adapter
    assert own["flops_per_token"]["step"] == pytest.approx(step, rel=1e-3)
    assert own["setup"]["tokens"] == 4 * 2 * 256
    final = planned(router={"kind": "sequence", "layer": "final", "lora": {"r": 8}})["router"]
    assert final["adapter_parameters"] > 1.8 * own["adapter_parameters"]


def test_experts_that_are_whole_models_train_their_mlps() -> None:
    """Each a run of its own, without a router."""
    jobs = [{k: v for k, v in one.items() if k != "r"} for one in EXPERTS]
    plans = planned(experts=jobs, lora=None)
    assert list(plans) == [f"expert {one['name']}" for one in EXPERTS]
    for plan in plans.values():
        # SmolLM2-135M: 30 layers of three matrices 576 x 1536
        assert plan["adapter_parameters"] == 30 * 3 * 576 * 1536


def test_a_router_for_the_export_alone() -> None:
    """A stock class has no classifier of sequences: a token router is trained for it, at the level
    that the class computes: a token passes its experts' whole MLPs."""
    plans = planned(router={"kind": "sequence"}, export=["hf-moe"])
    assert list(plans) == ["experts", "router of the export"]
    level = {"level": "expert", "top_k": 1, "straight_through": True}
    own = planned(router=level)["router"]
    assert plans["router of the export"]["memory"] == own["memory"]
    two, delta = planned(router={"level": "expert"})["router"], planned()["router"]
    # SmolLM2-135M: 30 layers of three matrices 576 x 1536, once more forward (2) and in dx (2)
    more = two["flops_per_token"]["step"] - delta["flops_per_token"]["step"]
    assert more == 4 * 30 * 3 * 576 * 1536
    assert two["total"] > own["total"] > delta["total"]
    assert list(
        planned(router={"kind": "sequence"}, export=[{"to": "hf-moe", "gate_mode": "hidden"}])
    ) == ["experts"]


def test_an_adapter_that_is_there_counts_by_its_file(tmp_path: Path) -> None:
    save_file({"w": np.zeros((10, 7), np.float32)}, tmp_path / "adapter_model.safetensors")
    experts = [EXPERTS[0], {"name": "c", "adapter": str(tmp_path), "data": "c.jsonl"}]
    plans = planned(experts=experts)
    assert list(plans) == ["expert a", "router"]
    own = planned_alone(r=4)["adapter_parameters"]
    assert plans["router"]["memory"]["frozen adapters"] == 4 * (own + 70)


def test_whose_settings_are_meant(tmp_path: Path) -> None:
    """`lorry plan` reads a mixture's description, ours and the project's; also one whose words other
    verbs have, too."""
    ours, theirs = tmp_path / "experts.yaml", tmp_path / "rmoe.json"
    ours.write_text("experts: [{name: a, data: a.jsonl}, {name: b, data: b.jsonl}]\n")
    theirs.write_text(json.dumps({"method": "rmoe", "gating": {"num_epochs": 2}}))
    for words in ([str(ours)], [str(theirs)]):
        assert isinstance(parse_settings(PlanSettings, words, ignore_note), MoePlanSettings)
    with pytest.raises(ConfigError, match="at least two"):
        parse_settings(PlanSettings, ["r=8", "experts=[{name: a, data: a.jsonl}]"], ignore_note)
    jobs = parse_settings(PlanSettings, ["jobs=[{name: a, r: 8}]"], ignore_note)
    assert not isinstance(jobs, MoePlanSettings)
