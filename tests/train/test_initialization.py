"""Runs whose adapters begin from the base or from rows: notes, files, contracts, resuming bit for bit,
several jobs with one start each, and what is refused before a weight is read. Dtype float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lorry.adapters.attach import get_bank
from lorry.errors import ConfigError, ModelError
from lorry.models.loading.open import open_model
from lorry.notes import ignore_note
from lorry.plan.adapters import plan_adapter
from lorry.plan.shapes import read_model_shape
from lorry.tasks import initialization
from lorry.train.monitoring.events import StepRecord
from lorry.train.session import train_run
from tests.support.mortal import World, finished, same
from tests.support.mortal import world as world
from tests.support.tinyrun import Heard, quick  # noqa: F401 - a fixture

TAKES_OFF = ("pissa", "pissa_niter_4", "olora", "milora", "corda", "lora_ga")
EVERY = (*TAKES_OFF, "eva", "orthogonal", "loftq")


class Stop(Exception):
    """The run ends here, as a kill would have it."""


class StopAt(Heard):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def step(self, record: StepRecord) -> None:
        if record["step"] == self.at:
            raise Stop


def settings(init: str, **more: Any) -> dict[str, Any]:
    packed = {"quantize": "nf4"} if init == "loftq" else {}
    rows = {"init_rows": 8} if init in ("eva", "corda", "lora_ga") else {}
    return {"init_lora_weights": init, **rows, **packed, **more}


def test_a_half_that_never_trains_is_made_again(world: World, tmp_path: Path) -> None:
    """EVA with a frozen A (LoRA-FA): no checkpoint has it."""
    given = settings("eva", lora={"train": ["B"]})
    train_run(world.run(tmp_path / "whole", **given), [])
    with pytest.raises(Stop):
        train_run(world.run(tmp_path / "killed", **given), [], [StopAt(6)])
    train_run(world.run(tmp_path / "killed", **given), [])
    same(finished(tmp_path / "killed"), finished(tmp_path / "whole"), "eva, B alone")


@pytest.mark.parametrize("init", EVERY)
def test_a_run_resumes_bit_for_bit(
    init: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, given = Heard(), settings(init)
    train_run(world.run(tmp_path / "whole", **given), [], [heard])
    (note,) = [note for note in heard.notes if "init_lora_weights" in note]
    assert (f"rank {4 if init in TAKES_OFF else 2}" in note) or init not in TAKES_OFF
    assert ("from 8 training rows" in note) == (init in ("corda", "lora_ga", "eva"))
    run = tmp_path / "whole" / "run"
    contracts = {
        one["id"]: one["status"] for one in json.loads((run / "contracts.json").read_text())
    }
    assert contracts == dict.fromkeys(range(1, 9), "held")
    config = json.loads((run / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == (True, 4 if init in TAKES_OFF else 2)

    with pytest.raises(Stop):
        train_run(world.run(tmp_path / "killed", **given), [], [StopAt(6)])

    # what the checkpoint has is not made again
    def made_again(*args: Any, **named: Any) -> None:
        raise AssertionError("a resumed run initialised its adapter")

    monkeypatch.setattr(initialization, "initialize_adapter", made_again)
    train_run(world.run(tmp_path / "killed", **given), [])
    same(finished(tmp_path / "killed"), finished(tmp_path / "whole"), init)


def test_peft_reads_what_a_run_saved(world: World, tmp_path: Path) -> None:
    result = train_run(world.run(tmp_path, **settings("pissa")), [])
    ids = torch.tensor([[5, 17, 40, 8, 3, 60, 21]])
    base = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run").eval()(ids).logits
        ours = result.model(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * float(ours.abs().max()))


def test_jobs_begin_each_in_its_own_way(world: World, tmp_path: Path) -> None:
    """Beside each other on one base; each as it is alone."""
    jobs = [
        {"name": "plain", "seed": 1},
        {"name": "svd", "init_lora_weights": "pissa"},
        {"name": "moved", "init_lora_weights": "eva", "init_rows": 8},
        {"name": "other", "init_lora_weights": "lora_ga", "init_rows": 8, "seed": 5},
    ]
    more = {"lora_dropout": 0.0, "load_best_model_at_end": False, "max_steps": 5, "save_steps": 2}
    with pytest.raises(Stop):
        train_run(world.run(tmp_path / "jobs", jobs=jobs, **more), [], [StopAt(3)])
    train_run(world.run(tmp_path / "jobs", jobs=jobs, **more), [])
    train_run(world.run(tmp_path / "whole", jobs=jobs, **more), [])
    for job in jobs:
        files = [
            tmp_path / k / "run" / str(job["name"]) / "adapter_model.safetensors"
            for k in ("jobs", "whole")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()
    alone = {key: value for key, value in jobs[3].items() if key != "name"}
    train_run(world.run(tmp_path / "alone", **alone, **more), [])
    opened = [
        open_model(
            world.run(tmp_path, **more).model.model_copy(update={"name": str(world.model)}),
            ignore_note,
            adapters=[str(folder)],
        )
        for folder in (tmp_path / "alone" / "run", tmp_path / "whole" / "run" / "other")
    ]
    ids = torch.tensor([[5, 17, 40, 8, 3, 60, 21]])
    with torch.no_grad():
        first, second = (one.model(ids).logits for one in opened)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_keep_residual_and_convert_init(world: World, tmp_path: Path) -> None:
    """PEFT's own form from a run, opened by its folder; a stranger's only when asked."""
    train_run(world.run(tmp_path, **settings("olora", keep_residual=True)), [])
    run = tmp_path / "run"
    config = json.loads((run / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == ("olora", 2)
    given = world.run(tmp_path).model
    own = open_model(given.model_copy(update={"name": str(run)}), ignore_note)
    (run / "lorry_adapter.json").unlink()  # as a stranger's
    foreign = given.model_copy(update={"name": str(world.model), "adapter": str(run)})
    with pytest.raises(ModelError, match="convert_init=true"):
        open_model(foreign, ignore_note)
    asked = open_model(foreign.model_copy(update={"convert_init": True}), ignore_note)
    ids = torch.tensor([[5, 17, 40, 8, 3, 60, 21]])
    with torch.no_grad():
        assert torch.equal(own.model(ids).logits, asked.model(ids).logits)
    base = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base, run).eval()(ids).logits
        ours = own.model(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4 * float(ours.abs().max()))


def test_the_plan_counts_what_is_taken_off(world: World, tmp_path: Path) -> None:
    """Frozen values of an adapter's size, of those that do; measured: what the bank holds."""
    result = train_run(world.run(tmp_path, **settings("milora", max_steps=1)), [])
    adapter = get_bank(result.model)["default"]
    assert adapter.initial is not None
    shape = read_model_shape(json.loads((world.model / "config.json").read_text()))
    for init, frozen in (("milora", adapter.initial.numel()), ("eva", 0), ("gaussian", 0)):
        lora = world.run(tmp_path, init_lora_weights=init).lora
        assert lora is not None
        assert plan_adapter(shape, lora, 2).frozen == frozen


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "odd": ({"init_lora_weights": "orthogonal", "r": 3}, "needs an even rank"),
    "odd pattern": (
        {"init_lora_weights": "orthogonal", "rank_pattern": {"q_proj": 5}},
        "needs an even rank.*r is 5",
    ),
    "loftq": ({"init_lora_weights": "loftq"}, "give model.quantize=nf4"),
    "kept": ({"init_lora_weights": "loftq", "quantize": "keep"}, "give model.quantize=nf4"),
    "streamed": ({"init_lora_weights": "eva", "streaming": True}, "leave data.streaming out"),
    "cut": (
        {"init_lora_weights": "pissa", "backend": "megatron"},
        "with backend=megatron each process has a part",
    ),
    "cut, taken off again": (
        {"init_lora_weights": "pissa", "keep_residual": True, "backend": "fsdp"},
        "a reader takes off the product of whole matrices",
    ),
    "tensor ranks": (
        {"init_lora_weights": "eva", "backend": {"name": "ddp", "tensor_parallel": 2}},
        "with backend.tensor_parallel=2",
    ),
    "raw": ({"init_lora_weights": "corda", "keep_residual": True}, "keep_residual=true writes"),
    "dora": ({"init_lora_weights": "pissa", "use_dora": True}, "does not go with use_dora"),
    "rows": ({"init_rows": 8, "init_lora_weights": "pissa"}, "init_rows says how many rows eva"),
    "EVA's rho": ({"rho": 3.0, "init_lora_weights": "corda"}, "rho is EVA's; add"),
    "one job": (
        {"jobs": [{"name": "a"}, {"name": "b", "init_lora_weights": "loftq"}]},
        "give model.quantize=nf4",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_before_a_weight_is_read(
    case: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorry.train.setup.base.open_model", None)
    given, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        train_run(world.run(tmp_path, **given), [])


def test_refused_with_the_rows(world: World, tmp_path: Path) -> None:
    """What hangs on the base's sides or on how many tokens there are."""
    with pytest.raises(ConfigError, match=r"pissa with r=17: .* is \[16, 16\] and has 16"):
        train_run(world.run(tmp_path / "a", **settings("pissa", r=17)), [])
    short = settings("eva", r=12, init_rows=1, target_modules=["down_proj"])
    run = world.run(tmp_path / "b", **short, rank_pattern={"down_proj": 24})
    with pytest.raises(ConfigError, match=r"eva with r=24 saw \d+ tokens at .* \(init_rows\)"):
        train_run(run, [])
    assert not (tmp_path / "a" / "run" / "checkpoints").exists()
