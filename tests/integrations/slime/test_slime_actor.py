"""A whole training actor of slime's with the plugin: its reference stays the base through training, a
resume and another teacher; and at tensor and pipeline parallel 2 its scores are those of one process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

pytest.importorskip(
    "megatron.core", reason="megatron-core is an extra: pip install 'lorry[megatron]'"
)

from tests.support.ranks import run_ranks
from tests.support.slime_ranks import LAYOUTS, TOKENS, arguments
from tests.support.slime_runs import (
    IS_REAL,
    add_paths,
    process_ends,
    slime_paths,
    start_actor,
    training_process,
)

if IS_REAL:
    pytest.skip("slime's own forward needs a GPU", allow_module_level=True)
add_paths()
pytestmark = pytest.mark.timeout(600)

DATA = {"tokens": TOKENS, "advantages": torch.ones(3, 7)}


@pytest.fixture
def process() -> Iterator[None]:
    with training_process():
        yield


def expected(base: Path, adapter: Path | None = None) -> Tensor:
    """[rows, length - 1] in float32, by PEFT and transformers."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        logits = model(TOKENS).logits
    return logits[:, :-1].log_softmax(-1).gather(2, TOKENS[:, 1:, None]).squeeze(2)


def close(got: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(got, wanted, atol=1e-5, rtol=0)


def rollout(actor: Any, number: int) -> dict[str, Tensor]:
    """The scores of one rollout, which is trained on."""
    data = dict(DATA)
    actor.train(number, data)
    return data


@pytest.mark.usefixtures("process")
def test_the_reference_is_the_base_through_training_and_a_resume(
    models: Path, tmp_path: Path
) -> None:
    base = expected(models / "llama")
    words = ["--use-kl-loss", "--kl-loss-coef", "0.1", "--save", tmp_path]
    actor = start_actor(arguments(models / "llama", *words), with_ref=True)
    first, second = rollout(actor, 0), rollout(actor, 1)
    # new adapters change nothing; a step later the policy is another one
    assert close(first["log_probs"], base)
    assert close(first["ref_log_probs"], base)
    assert close(second["ref_log_probs"], base)
    assert not close(second["log_probs"], base)
    actor.save_model(1)
    trained = actor.compute_log_prob(TOKENS)["log_probs"]

    process_ends()
    again = arguments(models / "llama", *words, "--load", tmp_path)
    resumed = rollout(start_actor(again, with_ref=True), 2)
    assert close(resumed["log_probs"], trained)
    assert close(resumed["ref_log_probs"], base)


@pytest.mark.usefixtures("process")
def test_without_the_hook_a_resumed_reference_would_be_the_trained_policy(
    models: Path, tmp_path: Path
) -> None:
    words = ["--use-kl-loss", "--kl-loss-coef", "0.1", "--save", tmp_path]
    actor = start_actor(arguments(models / "llama", *words), with_ref=True)
    rollout(actor, 0)
    actor.save_model(0)
    process_ends()
    again = arguments(models / "llama", *words, "--load", tmp_path)
    with mock.patch("lorry.integrations.slime.before_log_prob", return_value=None):
        resumed = rollout(start_actor(again, with_ref=True), 1)
    assert torch.equal(resumed["ref_log_probs"], resumed["log_probs"])


@pytest.mark.usefixtures("process")
def test_a_teacher_is_its_own_weights_without_the_adapter(models: Path, tmp_path: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(models / "llama")
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    teacher.save_pretrained(tmp_path / "teacher")
    words = ["--use-opd", "--opd-type", "megatron", "--opd-teacher-load", tmp_path / "teacher"]
    words += ["--lora-adapter-path", models / "llama-canonical"]
    actor = start_actor(arguments(models / "llama", *words), with_opd_teacher=True)
    scores = rollout(actor, 0)
    assert close(scores["teacher_log_probs"], expected(tmp_path / "teacher"))
    assert close(scores["log_probs"], expected(models / "llama", models / "llama-canonical"))


@pytest.fixture(scope="module")
def ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found, by layout and rank."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "model.json").write_text(json.dumps(str(models / "qwen3")))
    path = os.pathsep.join([*slime_paths(), *sys.path])
    run_ranks("tests.support.slime_ranks", folder, PYTHONPATH=path)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_at_every_layout_are_those_of_peft(models: Path, ranks: Path, layout: str) -> None:
    base, policy = (
        expected(models / "qwen3"),
        expected(models / "qwen3", models / "qwen3-canonical"),
    )
    found = [load_file(ranks / f"{layout}-{rank}.safetensors") for rank in (0, 1)]
    # the last stage of a pipeline has them
    for scores in found if layout.startswith("tp") else found[1:]:
        assert close(scores["log_probs"], policy)
        assert close(scores["ref_log_probs"], base)
        assert close(scores["after/ref_log_probs"], base)
        assert not close(scores["after/log_probs"], policy)
