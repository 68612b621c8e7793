"""Whole runs of an adapter that tokens invoke: its contracts hold, packed as alone, resumed bitwise, and
rows without those tokens are said or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorry.errors import ConfigError, DataError
from lorry.train.monitoring.events import StepRecord
from lorry.train.session import train_run
from tests.support.mortal import World, finished, same
from tests.support.mortal import world as world
from tests.support.tinyrun import Heard, quick  # noqa: F401 - a fixture


class Stop(Exception):
    """The run ends here, as a kill would have it."""


class StopAtSix(Heard):
    """Ends a run behind the checkpoint of step 4."""

    def step(self, record: StepRecord) -> None:
        if record["step"] == 6:
            raise Stop


def ids_of(world: World, text: str) -> list[int]:
    """The tokens of a text."""
    ids: list[int] = AutoTokenizer.from_pretrained(world.model)(text, add_special_tokens=False)[
        "input_ids"
    ]
    return ids


@pytest.mark.parametrize("packing", [False, True])
def test_it_trains_and_resumes_bit_for_bit(world: World, tmp_path: Path, packing: bool) -> None:
    settings: dict[str, Any] = {
        "alora_invocation_tokens": ids_of(world, "<|im_start|>assistant"),
        "packing": packing,
    }
    heard = Heard()
    result = train_run(world.run(tmp_path / "whole", **settings), [], [heard])
    assert {c["status"] for c in result.contracts} == {"held"}
    assert not [n for n in heard.notes if "do not hold" in n]
    config = json.loads((result.path / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == settings["alora_invocation_tokens"]
    with pytest.raises(Stop):
        train_run(world.run(tmp_path / "stopped", **settings), [], [StopAtSix()])
    train_run(world.run(tmp_path / "stopped", **settings), [])
    same(finished(tmp_path / "stopped"), finished(tmp_path / "whole"), "resumed")


def test_beside_plain_jobs(world: World, tmp_path: Path) -> None:
    ids = ids_of(world, "<|im_start|>assistant")
    jobs = [{"name": "plain"}, {"name": "called", "lora": {"alora_invocation_tokens": ids}}]
    result = train_run(world.run(tmp_path, jobs=jobs, load_best_model_at_end=False), [])
    assert {c["status"] for c in result.contracts} == {"held"}


def test_rows_without_the_tokens_are_said_or_refused(world: World, tmp_path: Path) -> None:
    heard = Heard()
    ids = ids_of(world, " again")
    run = world.run(tmp_path / "some", alora_invocation_tokens=ids, max_steps=2, warmup_steps=0)
    train_run(run, [], [heard])
    (note,) = [n for n in heard.notes if "do not hold the invocation tokens" in n]
    assert "of 16 rows" in note
    with pytest.raises(DataError, match="none of the 16 rows holds the invocation tokens"):
        train_run(world.run(tmp_path / "none", alora_invocation_tokens=[5, 5, 5]), [])
    with pytest.raises(ConfigError, match="names the token 100000"):
        train_run(world.run(tmp_path / "far", alora_invocation_tokens=[100000]), [])
    for settings, message in (
        ({"alora_invocation_tokens": []}, "alora_invocation_tokens is empty"),
        ({"alora_invocation_tokens": [1], "use_dora": True}, "does not go with DoRA"),
    ):
        with pytest.raises(ConfigError, match=message):
            world.run(tmp_path, **settings)
