"""A whole training actor of slime's with the plugin: its reference stays the base through training, a
resume and another teacher; and at tensor and pipeline parallel 2 its scores are those of one process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from argparse import Namespace
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

from lorry.errors import ContractError
from lorry.integrations.slime import compare_rollout
from lorry.integrations.slime.sync.rollouts import KEPT
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


ANSWER = 4  # tokens of a row that an engine made
COMPARED = ["--offload-train", "--rollout-data-postprocess-path"]
COMPARED += ["lorry.integrations.slime.compare_rollout"]


def doubled(adapter: Path, folder: Path) -> Path:
    """The adapter at twice its scale: what an engine has that merged it, and adds it."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("policy", ""),
        (
            "base",
            r"rollout 0, the policy: .*(from the trainer's on average|of the adapter's effect)",
        ),
        (
            "doubled",
            r"rollout 0, the policy: .*(from the trainer's on average|of the adapter's effect)",
        ),
    ],
)
def test_where_memory_is_given_up_a_rollout_s_own_scores_are_compared_before_its_step(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str, message: str
) -> None:
    adapter = models / "llama-canonical"
    adapters = {"policy": adapter, "base": None, "doubled": doubled(adapter, tmp_path / "twice")}
    said = expected(models / "llama", adapters[engine])[:, -ANSWER:]
    words = [*COMPARED, "--lora-adapter-path", adapter]
    actor = start_actor(arguments(models / "llama", *words))
    before = actor.compute_log_prob(TOKENS)["log_probs"]
    data = {**DATA, "response_lengths": [ANSWER] * len(said), "rollout_log_probs": list(said)}
    if message:
        with pytest.raises(ContractError, match=message):
            actor.train(0, data)
        # no step was made on them
        assert torch.equal(actor.compute_log_prob(TOKENS)["log_probs"], before)
        return
    actor.train(0, data)
    assert not torch.equal(actor.compute_log_prob(TOKENS)["log_probs"], before)
    found = re.search(
        r"rollout 0: engines' log-probabilities of 12 tokens are (\S+) nats", out(capsys)
    )
    assert found is not None
    assert float(found[1]) < 1e-5
    # at another temperature than 1, the engine's and the trainer's
    actor.args.rollout_temperature = 0.5
    with pytest.raises(ContractError, match="rollout 1, the policy: "):
        actor.train(1, data)


def out(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_what_of_a_rollout_is_kept() -> None:
    args = Namespace(lora_check_every=2)
    rows = {"tokens": [torch.arange(9)] * 3, "response_lengths": [4, 2, 3]}
    values = [torch.zeros(4), torch.zeros(1), torch.zeros(3)]
    compare_rollout(args, 1, {**rows, "rollout_log_probs": values})
    assert not hasattr(args, KEPT)
    compare_rollout(args, 2, {**rows, "rollout_log_probs": values})
    # the second has a part of its values alone; the others, the shortest prompt first
    assert [row.answer for row in getattr(args, KEPT)] == [[5, 6, 7, 8], [6, 7, 8]]
    for nothing in (None, {}, rows):
        with pytest.raises(
            ContractError, match="hands --rollout-data-postprocess-path no rollout_log"
        ):
            compare_rollout(args, 2, nothing)
    compare_rollout(Namespace(lora_check_every=0), 2, None)


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
