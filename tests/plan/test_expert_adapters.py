"""A plan's adapters on mixtures of experts are those that are attached."""

from __future__ import annotations

from typing import Any

import pytest

from lorry.adapters.attach import attach, detach
from lorry.adapters.spec import LoraSpec
from lorry.config.schema.lora import LoraConfig
from lorry.errors import ConfigError
from lorry.plan.adapters import plan_adapter
from lorry.plan.flops import count_flops
from lorry.plan.memory import MemorySetup
from lorry.plan.shapes import read_model_shape
from tests.support import expert_models

TARGETS: list[dict[str, Any]] = [
    {},
    {"target_modules": "all-linear"},
    {"exclude_modules": ["experts"]},
    {"target_parameters": ["mlp.gate.weight"]},
    {"target_parameters": []},
    {
        "target_modules": ["q_proj", "down_proj", "gate"],
        "rank_pattern": {"experts.down_proj": 6},
    },
    {"target_modules": ["gate_proj", "up_proj"]},
    {"target_modules": r".*\.1\..*proj.*"},
]


@pytest.mark.parametrize("kind", expert_models.UNFUSED)
def test_as_many_values_as_are_attached(kind: str) -> None:
    config, model = expert_models.MODELS[kind], expert_models.model(kind)
    shape = read_model_shape({**model.config.to_dict(), **config})
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    for targets in TARGETS:
        adapter = attach(model, LoraSpec(r=4, **targets))
        planned = plan_adapter(shape, LoraConfig.model_validate({"r": 4, **targets}), 4)
        assert planned.parameters == adapter.num_parameters(), targets
        detach(model)


def test_a_token_passes_the_experts_that_it_visits() -> None:
    """FLOPs of the adapter: 2 of 4 experts."""
    shape = read_model_shape(expert_models.model("mixtral").config.to_dict())
    setup = MemorySetup(tokens=8, length=8)
    lora = LoraConfig(r=4, target_modules=["experts.down_proj"])
    adapter = plan_adapter(shape, lora, 4)
    assert adapter.passed == adapter.parameters // 2
    assert count_flops(shape, adapter, setup).adapter == 6 * adapter.passed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout does not work on fused experts"),
        ({"target_parameters": ["mlp.experts.w1"]}, "names 'mlp.experts.w1', which matches no"),
    ],
)
def test_what_a_run_refuses_is_not_planned(settings: dict[str, Any], message: str) -> None:
    shape = read_model_shape(expert_models.model("mixtral").config.to_dict())
    with pytest.raises(ConfigError, match=message):
        plan_adapter(shape, LoraConfig.model_validate({"r": 4, **settings}), 4)
