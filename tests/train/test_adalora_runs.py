"""Whole runs of AdaLoRA: what is left is plain LoRA that PEFT opens, beside plain jobs, resumed bitwise,
and refused where its schedule does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lorry.adapters.attach import get_bank
from lorry.errors import ConfigError
from lorry.train.monitoring.events import StepRecord
from lorry.train.session import train_run
from tests.support.mortal import World, finished, same
from tests.support.tinyrun import Heard, quick  # noqa: F401 - a fixture

ADALORA: dict[str, Any] = {
    "variant": "adalora",
    "r": 4,
    "target_r": 2,
    "tinit": 2,
    "tfinal": 2,
    "deltaT": 2,
    "orth_reg_weight": 0.1,
}


class Stop(Exception):
    """The run ends here, as a kill would have it."""


class StopAt(Heard):
    """Ends a run at a step, whose checkpoint is written by then or not."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.at = step

    def step(self, record: StepRecord) -> None:
        if record["step"] == self.at:
            raise Stop


def config_of(run: Path) -> dict[str, Any]:
    """adapter_config.json of a run."""
    settings: dict[str, Any] = json.loads((run / "adapter_config.json").read_text())
    return settings


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Heard]:
    folder, heard = tmp_path_factory.mktemp("adalora"), Heard()
    result = train_run(world.run(folder, **ADALORA), [], [heard])
    return folder, result, heard


def test_it_ends_as_plain_lora_of_the_ranks_that_mattered(
    whole: tuple[Path, Any, Heard],
) -> None:
    folder, result, heard = whole
    run = folder / "run"
    config = config_of(run)
    assert config["peft_type"] == "LORA"
    assert set(config["alpha_pattern"]) == set(config["rank_pattern"])
    tensors = load_file(run / "adapter_model.safetensors")
    ranks = {n: t.shape[0] for n, t in tensors.items() if n.endswith("lora_A.weight")}
    assert not [n for n in tensors if "lora_E" in n]
    # two linears: 4 ranks each at first, 2 on average at the end
    assert sum(ranks.values()) == 2 * 2
    (note,) = [n for n in heard.notes if "AdaLoRA left ranks" in n]
    assert "4 of 8 in all" in note
    assert "saved as plain LoRA" in note
    held = {c["id"]: c["status"] for c in result.contracts}
    assert held == dict.fromkeys(range(1, 9), "held")
    receipt = json.loads((run / "receipt.json").read_text())
    assert receipt["trainable_parameters"] == sum(t.numel() for t in tensors.values())
    # the scale of every module stays lora_alpha / init_r
    adapter = get_bank(result.model)["default"]
    assert adapter.spec.adalora is None
    for slot in adapter.slots.values():
        assert slot.scale == pytest.approx(32 / 4)


@pytest.mark.parametrize("step", [4, 7, 10])
def test_stopped_and_resumed_it_ends_with_the_same_bits(
    world: World, whole: tuple[Path, Any, Heard], step: int, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        train_run(world.run(tmp_path, **ADALORA), [], [StopAt(step)])
    train_run(world.run(tmp_path, **ADALORA), [])
    same(finished(tmp_path), finished(whole[0]), f"stopped at {step}")


def test_beside_plain_jobs_and_over_its_own_schedule(world: World, tmp_path: Path) -> None:
    jobs = [
        {"name": "plain", "variant": "lora"},
        {"name": "ranked", "max_steps": 8},
        {"name": "wider", "init_r": 5, "target_r": 3},
    ]
    result = train_run(world.run(tmp_path, **ADALORA, jobs=jobs, load_best_model_at_end=False), [])
    left = {
        name: [slot.A.shape[0] for slot in get_bank(result.model)[name].slots.values()]
        for name in ("plain", "ranked", "wider")
    }
    assert left["plain"] == [4, 4]
    assert sum(left["ranked"]) == 2 * 2
    assert sum(left["wider"]) == 2 * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_r": 4}, "target_r=4 is not below init_r=4"),
        ({"tinit": 8, "tfinal": 3}, "lora.tinit=8 and lora.tfinal=3 leave none of the 11 steps"),
        ({"init_r": 6}, "r=4 and init_r=6 are both the first rank"),
        ({"use_rslora": True}, "use_rslora does not go with variant=adalora"),
        ({"use_dora": True}, "use_dora does not go with variant=adalora"),
        ({"variant": "lora"}, "target_r is AdaLoRA's; add variant=adalora"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern does not go with variant=adalora"),
        ({"backend": {"name": "ddp", "processes": 2, "tensor_parallel": 2}}, "tensor-parallel"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_before_anything_is_read(
    world: World, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        world.run(tmp_path, **{**ADALORA, **settings})


def test_refused_where_the_rows_make_too_few_steps(world: World, tmp_path: Path) -> None:
    run = world.run(tmp_path, **{**ADALORA, "tinit": 40}, max_steps=-1, num_train_epochs=2)
    with pytest.raises(ConfigError, match="tinit=40 and the last tfinal=2 steps, and the run has"):
        train_run(run, [])


def test_a_module_may_lose_all_its_ranks_in_the_first_steps(world: World, tmp_path: Path) -> None:
    """Its E is then what it began as; that it never trained would be another thing."""
    early = {**ADALORA, "target_r": 1, "tinit": 0, "tfinal": 9, "deltaT": 1, "r": 2}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    result = train_run(world.run(tmp_path, **early, target_modules=targets), [])
    assert {c["status"] for c in result.contracts} == {"held"}
    left = config_of(tmp_path / "run")["target_modules"]
    assert 0 < len(left) < len(targets), left


def test_what_lost_its_ranks_at_once_moves_no_matrix_either(world: World, tmp_path: Path) -> None:
    """Without the penalty A and B have a gradient through E alone."""
    schedule = {**ADALORA, "target_r": 1, "tinit": 1, "tfinal": 1, "deltaT": 1}
    schedule["orth_reg_weight"] = 0.0
    heard = Heard()
    run = world.run(tmp_path, **schedule, target_modules="all-linear", max_steps=4)
    result = train_run(run, [], [heard])
    (note,) = [n for n in heard.notes if "AdaLoRA left ranks" in n]
    assert "have none" in note
    assert {c["id"]: c["status"] for c in result.contracts}[3] == "held"
