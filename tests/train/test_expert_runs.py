"""Whole runs on mixtures of experts through transformers' classes: experts train by default, and by
name; PEFT opens what is left, stopped runs end with the same bits, and the model merges and unmerges."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from test_resume_rules import StopAt, Stopped
from transformers import AutoModelForCausalLM

from lorry.adapters.attach import get_bank
from lorry.adapters.merge import merge, unmerge
from lorry.config.schema.lora import LoraConfig
from lorry.errors import ConfigError
from lorry.plan.adapters import plan_adapter
from lorry.plan.shapes import read_model_shape
from lorry.train.session import train_run
from tests.support import tinyrun
from tests.support.mortal import World, finished, same
from tests.support.tinyrun import Heard, quick  # noqa: F401 - a fixture

SETTINGS: dict[str, Any] = {
    "target_modules": None,  # auto
    "lora_dropout": 0.0,
    "max_steps": 6,
    "save_steps": 2,
    "load_best_model_at_end": False,
    "early_stopping_patience": None,
}
KINDS = ("mixtral", "qwen2_moe", "qwen3_moe")


@pytest.fixture(scope="module", params=KINDS)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world("qwen3_moe", tmp_path_factory.mktemp("qwen"))


def make_world(kind: str, root: Path) -> World:
    data = tinyrun.write_rows(root / "data.jsonl", tinyrun.rows(16))
    held = tinyrun.write_rows(root / "held.jsonl", tinyrun.rows(4, start=40))
    return World(tinyrun.model_directory(root / "model", kind), data, held)


@pytest.mark.filterwarnings("ignore")
def test_experts_train_and_peft_opens_them(mixture: World, tmp_path: Path) -> None:
    heard = Heard()
    result = train_run(mixture.run(tmp_path, **SETTINGS), [], [heard])
    assert {c["id"]: c["status"] for c in result.contracts} == dict.fromkeys(range(1, 9), "held")
    first = next(c["detail"] for c in result.contracts if c["id"] == 1)
    assert "down_proj, " in first
    assert "gate_up_proj" in first
    # what is left out is named: in the contract and to whoever looks on
    assert "not adapted: 1 weights such as model.layers.0.mlp.gate.weight" in first
    assert any("not adapted: 1 weights such as model.layers.0.mlp.gate" in n for n in heard.notes)
    adapter = get_bank(result.model)["default"]
    experts = [path for path in adapter.slots if ".experts." in path]
    assert len(experts) == 2
    moved = [adapter.slots[path].B.view(-1, 4).any(0).sum() for path in experts]
    assert all(int(count) >= 2 for count in moved)  # experts that some token visited
    # the plan counts what trains
    shape = read_model_shape(json.loads((mixture.model / "config.json").read_text()))
    assert not shape.estimate
    assert plan_adapter(shape, LoraConfig(r=2), 2).parameters == adapter.num_parameters()
    receipt = json.loads((tmp_path / "run/receipt.json").read_text())
    assert receipt["trainable_parameters"] == adapter.num_parameters()
    base = AutoModelForCausalLM.from_pretrained(mixture.model, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "run").eval()
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        expected, before = theirs(input_ids=ids).logits, base(input_ids=ids).logits
        got = result.model(input_ids=ids).logits
        assert (got - expected).abs().max() <= 1e-5
        assert (got - before).abs().max() > 1e-2
        merge(result.model)
        assert (result.model(input_ids=ids).logits - expected).abs().max() <= 1e-4
        unmerge(result.model)
        assert torch.equal(result.model(input_ids=ids).logits, got)


def test_stopped_and_resumed_it_ends_with_the_same_bits(qwen: World, tmp_path: Path) -> None:
    settings = {**SETTINGS, "target_parameters": ["mlp.experts.down_proj", "mlp.gate.weight"]}
    train_run(qwen.run(tmp_path / "whole", **settings), [])
    with pytest.raises(Stopped):
        train_run(qwen.run(tmp_path / "again", **settings), [], [StopAt(5)])
    train_run(qwen.run(tmp_path / "again", **settings), [])
    same(finished(tmp_path / "again"), finished(tmp_path / "whole"), "stopped at 5")


def test_jobs_on_different_parameters_are_the_runs_alone(qwen: World, tmp_path: Path) -> None:
    """In fp32: a job's experts and router are those of a run with it alone, to rounding."""
    own: dict[str, dict[str, Any]] = {
        "wide": {"r": 4},
        "gated": {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]},
        "none": {"target_parameters": []},
    }
    jobs = [{"name": name, **settings} for name, settings in own.items()]
    together = train_run(qwen.run(tmp_path / "jobs", **SETTINGS, jobs=jobs), []).model
    targets = {name: {p.rpartition(".")[2] for p in get_bank(together)[name].slots} for name in own}
    assert targets["gated"] == {"q_proj", "gate"}
    assert not targets["none"] & {"gate", "gate_up_proj", "down_proj"}
    for name in ("wide", "gated"):
        alone = train_run(qwen.run(tmp_path / name, **{**SETTINGS, **own[name]}), []).model
        pairs = zip(
            get_bank(together)[name].tensors().items(),
            get_bank(alone)["default"].tensors().values(),
            strict=True,
        )
        for key, (a, b) in ((k, (a, b)) for (k, a), b in pairs):
            assert torch.allclose(a, b, atol=2e-4), key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_parameters": ["mlp.experts.down_proj"], "lora_dropout": 0.1}, "lora_dropout"),
        ({"target_parameters": ["mlp.gate.weight"], "use_dora": True}, "target_parameters"),
        ({"target_parameters": ["mlp.gate.weight"], "lora_bias": True}, "target_parameters"),
    ],
)
def test_refused_before_anything_is_read(
    qwen: World, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, ValidationError), match=message):
        qwen.run(tmp_path, **{**SETTINGS, **settings})


def test_dropout_on_experts_by_default_is_refused_by_name(qwen: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gate_up_proj: lora_dropout does not work at param"):
        train_run(qwen.run(tmp_path, **{**SETTINGS, "lora_dropout": 0.1}), [])
