"""Ranks that a run's rows choose (r=auto, rank_by=data): by the gradients that torch's own autograd makes, by
how much there is to learn, within what memory allows; resumed bit for bit. Dtype float32.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lorry.adapters.attach import get_bank
from lorry.config import RunConfig, build_settings
from lorry.config.schema.lora import LoraConfig
from lorry.errors import ConfigError
from lorry.runs.read import read_run
from lorry.runs.summary import describe_run_subject
from lorry.tasks import ranks
from lorry.tasks.ranks import ChosenRanks
from lorry.train.monitoring.events import StepRecord
from lorry.train.session import train_run
from tests.support.mortal import World, finished, same, state_of
from tests.support.mortal import world as world
from tests.support.tinyrun import Heard, quick  # noqa: F401 - a fixture

GRID = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64]


class Stop(Exception):
    """The run ends here, as a kill would have it."""


class StopAt(Heard):
    def step(self, record: StepRecord) -> None:
        if record["step"] == 6:
            raise Stop


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ChosenRanks]]:
    """(the batch, what was chosen) of every time that ranks are chosen."""
    seen = list[tuple[Any, ChosenRanks]]()
    whole = ranks.ranks_of_rows

    def choose(model: Any, bank: Any, adapter: Any, batch: Any, supervised: int) -> ChosenRanks:
        chosen = whole(model, bank, adapter, batch, supervised)
        seen.append((batch, chosen))
        return chosen

    monkeypatch.setattr(ranks, "ranks_of_rows", choose)
    return seen


def directions(gradient: torch.Tensor) -> int:
    squares = np.linalg.svd(gradient.double().numpy(), compute_uv=False) ** 2
    return int(np.searchsorted(np.cumsum(squares) / squares.sum(), 0.9) + 1)


def test_each_module_has_the_rank_of_its_first_gradient(
    world: World, tmp_path: Path, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # else what the rows say is more than these small matrices' first directions hold
    monkeypatch.setattr(ranks, "_supervised_tokens", lambda job: 7)
    heard = Heard()
    result = train_run(world.run(tmp_path, r="auto"), [], [heard])
    ((batch, chosen),) = asked
    # transformers' model, row by row, as torch differentiates it
    plain = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32)
    losses = []
    for start, stop in pairwise(batch.starts.tolist()):
        tokens, weights = batch.tokens[start:stop], batch.weights[start:stop]
        scores = plain(tokens[None]).logits[0].log_softmax(-1)
        # a token's score is at the place before it
        picked = scores[:-1].gather(1, tokens[1:, None])[:, 0]
        losses.append(-(picked * weights[1:]).sum())
    loss = torch.stack(losses).sum() / batch.weights.sum()
    loss.backward()
    adapter = get_bank(result.model)[result.adapter]
    found = {path: slot.A.shape[0] for path, slot in adapter.slots.items()}
    assert len(set(found.values())) > 1
    for path, rank in found.items():
        gradient = plain.get_submodule(path).weight.grad
        wanted = directions(gradient)
        assert chosen.directions[path] == wanted
        assert rank == min(next(r for r in GRID if r >= wanted), *gradient.shape)
        assert adapter.slots[path].scale == pytest.approx(2.0)
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) | {config["r"]} == set(found.values())
    subject = describe_run_subject(read_run(tmp_path / "run"))["adapter"]
    assert subject.startswith(f"rank {min(found.values())} to {max(found.values())}, on ")
    (note,) = [note for note in heard.notes if "by the gradients of the first step" in note]
    assert f"ranks {min(found.values())} to {max(found.values())}" in note
    assert "the largest that is tried would have given r=64" in note
    assert chosen.bits == pytest.approx(7 * float(loss.detach()) / math.log(2), rel=1e-4)
    assert chosen.capacity == 1


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"lora.train": ["B"]},
        {"lora.init_lora_weights": "mica"},
        {"lora.init_lora_weights": "pissa"},
        {"lora.use_rslora": True},
    ],
)
def test_it_resumes_bit_for_bit_with_the_ranks_that_it_has(
    more: dict[str, Any], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_run(world.run(tmp_path / "whole", r="auto", **more), [])
    with pytest.raises(Stop):
        train_run(world.run(tmp_path / "killed", r="auto", **more), [], [StopAt()])

    def asked_again(*args: Any) -> None:
        raise AssertionError("a resumed run chose its ranks again")

    monkeypatch.setattr(ranks, "ranks_of_rows", asked_again)
    train_run(world.run(tmp_path / "killed", r="auto", **more), [])
    same(finished(tmp_path / "killed"), finished(tmp_path / "whole"), "r=auto")


def test_a_run_of_another_scale_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a rule by which lora_alpha was twice the largest rank, whatever it is divided by."""
    settings: dict[str, Any] = {"r": "auto", "lora.use_rslora": True}
    with monkeypatch.context() as patch:
        patch.setattr(LoraConfig, "alpha_at", lambda lora, bound: 2 * bound)
        with pytest.raises(Stop):
            train_run(world.run(tmp_path, **settings), [], [StopAt()])
    before = state_of(tmp_path)
    with pytest.raises(ConfigError, match='lora_alpha of default "128" -> "64"'):
        train_run(world.run(tmp_path, **settings), [])
    assert state_of(tmp_path) == before


def test_r_and_memory_are_bounds_and_jobs_have_each_their_own(
    world: World, tmp_path: Path, asked: Any
) -> None:
    few = train_run(world.run(tmp_path / "few", r=3, rank_by="data", max_steps=2), [])
    assert max(asked[-1][1].ranks.values()) == 3
    heard = Heard()
    run = world.run(tmp_path / "memory", r="auto", memory_budget="2GiB", max_steps=2)
    result = train_run(run, [], [heard])
    # whatever would have fitted, the scale is that of the default rank
    for one in (few, result):
        slots = get_bank(one.model)[one.adapter].slots.values()
        assert {round(slot.scale, 6) for slot in slots} == {2.0}
    assert any("memory_budget=2GiB would have given r=" in note for note in heard.notes)
    heard = Heard()
    train_run(
        world.run(
            tmp_path / "plain", r="auto", rank_by="memory", memory_budget="2GiB", max_steps=2
        ),
        [],
        [heard],
    )
    assert not any("gradients of the first step" in note for note in heard.notes)
    jobs = [{"name": "one", "r": "auto"}, {"name": "two", "r": 2}]
    more = {"load_best_model_at_end": False, "max_steps": 2}
    result = train_run(world.run(tmp_path / "jobs", jobs=jobs, **more), [])
    bank = get_bank(result.model)
    assert {slot.A.shape[0] for slot in bank["two"].slots.values()} == {2}
    assert {slot.A.shape[0] for slot in bank["one"].slots.values()} == {16}


def test_what_is_to_be_learnt_sets_the_least_rank(
    world: World, tmp_path: Path, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard()
    train_run(world.run(tmp_path / "some", r="auto", max_steps=2), [], [heard])
    chosen = asked[-1][1]
    config = json.loads((world.model / "config.json").read_text())
    wide, inner = config["hidden_size"], config["intermediate_size"]
    values = wide + config["num_attention_heads"] * config["head_dim"] + inner + wide
    # two bits for each value of the two modules' A and B
    assert 2 * values * chosen.capacity >= chosen.bits
    assert chosen.capacity == next(r for r in GRID if 2 * values * r >= chosen.bits) > 1
    monkeypatch.setattr(ranks, "_supervised_tokens", lambda job: 10**9)
    train_run(world.run(tmp_path / "many", r="auto", max_steps=2), [], [heard])
    chosen = asked[-1][1]
    assert chosen.capacity == chosen.bound == 64
    assert set(chosen.ranks.values()) == {16}
    assert any("by the amount of data" in note for note in heard.notes)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"target_modules": ["embed_tokens", "q_proj"]},
            "is for linear layers, and .* is none",
        ),
    ],
)
def test_what_has_no_ranks_to_choose_is_refused(
    more: dict[str, Any], message: str, world: World, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train_run(world.run(tmp_path, r="auto", max_steps=2, save_steps=2, **more), [])
    assert not (tmp_path / "run" / "receipt.json").exists()


def test_eva_chooses_its_own() -> None:
    with pytest.raises(ConfigError, match=r"eva moves ranks between modules itself"):
        build_settings(RunConfig, {"data": "d", "r": "auto", "init_lora_weights": "eva"}, print)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"streaming": True}, "reads rows before training"),
        ({"use_dora": True}, "use_dora with r=auto .* the ranks of low-rank terms alone"),
        ({"variant": "dora"}, "use_dora with r=auto"),
        ({"variant": "adalora"}, "r=auto does not go with variant=adalora; give init_r"),
        ({"bias": "all"}, "bias with r=auto"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens with r=auto"),
        ({"jobs": [{"name": "a"}, {"name": "b", "use_dora": True}]}, "job 'b': .*use_dora with"),
    ],
)
def test_what_has_no_ranks_to_choose_is_refused_before_a_weight_is_read(
    more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_settings(RunConfig, {"data": "d", "r": "auto", **more}, print)
    # r=N of memory's choice is another thing
    if "jobs" not in more:
        build_settings(RunConfig, {"data": "d", "r": 12, **more}, print)


def test_memory_alone_needs_a_budget() -> None:
    with pytest.raises(ConfigError, match="rank_by=memory needs a memory budget"):
        build_settings(RunConfig, {"data": "d", "r": "auto", "rank_by": "memory"}, print)
