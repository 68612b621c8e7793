"""examples/rollout/grpo.py: its rewards and advantages by hand, its gradient against transformers and
PEFT (float32), and two steps of it against a server."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorry.adapters.attach import get_bank
from lorry.generation.request import Completion
from lorry.integrations.rollout import AdapterSync, VersionPublisher, VllmServer
from tests.support.rollout_policy import PROMPTS, Policy
from tests.support.rollout_server import RolloutServer
from tests.support.tiny import LETTERS, one_thread

__all__ = ["one_thread"]
EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "rollout" / "grpo.py"


@pytest.fixture(scope="module")
def grpo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rollout_grpo_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


def test_rewards_and_advantages(grpo: ModuleType) -> None:
    cases = {"51": 1.2, " 51. ": 1.2, "It is 51.": 1.0, "7": 0.2, "seven": 0.0, "": 0.0}
    assert {text: grpo.reward(text, "51") for text in cases} == cases
    # (r - mean) / (std with n - 1 + 1e-4); equal rewards teach nothing
    std = (2 / 3 * 0.5) ** 0.5
    got = grpo.group_advantages([1.0, 0.0, 1.0, 0.0, 0.3, 0.3, 0.3, 0.3], 4)
    assert got == pytest.approx([0.5 / (std + 1e-4) * s for s in (1, -1, 1, -1)] + [0.0] * 4)


def test_questions_are_read_with_their_numbers(grpo: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "SVAMP.json"
    path.write_text('[{"Body": "Tom has 8 pens", "Question": "How many?", "Answer": 8.0}]')
    asked: list[Any] = []
    tokenizer = SimpleNamespace(
        apply_chat_template=lambda turns, **_: asked.append(turns) or [1, 2],
        encode=lambda text, **_: [len(text)],
    )
    (question,) = grpo.read_questions(path, tokenizer)
    assert (question.prompt, question.answer) == ([1, 2, 13], "8")
    assert [turn["content"] for turn in asked[0]] == [
        "Answer with the number only.",
        "Tom has 8 pens. How many?",
    ]


def test_the_gradient_is_that_of_grpo(policy: Policy, tmp_path: Path, grpo: ModuleType) -> None:
    """-mean over all tokens of min(p/p_engine, cap) A log p, by autograd through PEFT."""
    version = VersionPublisher(tmp_path / "out").publish(policy.step())
    answers = [[3, 1, 4, 1], [5, 9], [2, 6, 5], [3]]
    advantages = [1.0, -0.5, 0.25, 0.0]
    said = [[-1.0] * 4, [-9.0, -0.1], [-2.0, -3.0, -1.5], [-0.7]]
    trainer = grpo.GrpoTrainer(policy.model, None, None, None, grpo.Settings())
    rows = [Completion(a, "length", s) for a, s in zip(answers, said, strict=True)]
    trainer.task.collect(PROMPTS, rows, advantages)
    stats = trainer.backend.forward_backward(trainer.task.step_batches(0, {}), trainer.task, 0)
    theirs: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(policy.base, dtype=torch.float32),
        version.path,
        is_trainable=True,
    )
    loss, gap = torch.zeros(()), 0.0
    for prompt, answer, advantage, old in zip(PROMPTS, answers, advantages, said, strict=True):
        logits = theirs(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        logprob = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        apart = logprob.detach() - torch.tensor(old)
        loss = loss - (apart.exp().clamp(max=2.0) * advantage * logprob).sum()
        gap += float(apart.abs().sum())
    (loss / 10).backward()
    assert stats.loss["policy"] == pytest.approx(loss.item() / 10, rel=1e-5)
    assert stats.terms["gap"]["policy"] == pytest.approx(gap / 10, rel=1e-5)
    adapter = get_bank(policy.model)["policy"]
    ours = adapter.split_like(adapter.grads)
    for name, param in theirs.named_parameters():
        if param.grad is not None:
            path, _, side = name.removeprefix("base_model.model.").rpartition(".lora_")
            torch.testing.assert_close(
                ours[f"{path}.lora_{side[0]}"], param.grad, rtol=1e-4, atol=5e-6
            )


def test_two_steps_against_a_server(policy: Policy, tmp_path: Path, grpo: ModuleType) -> None:
    tokenizer = SimpleNamespace(
        eos_token_id=27, decode=lambda tokens, **_: "".join(LETTERS[t] for t in tokens)
    )
    questions = [grpo.Question(prompt, "1") for prompt in PROMPTS]
    settings = grpo.Settings(steps=2, rows=2, group=2, max_new_tokens=3)
    with RolloutServer(policy.base) as server:
        engine = VllmServer(server.url)
        sync = AdapterSync(VersionPublisher(tmp_path / "out"), [engine], policy.probe())
        trainer = grpo.GrpoTrainer(policy.model, tokenizer, engine, sync, settings)
        first, second = trainer.run(questions)
        asked = [body["model"] for path, body in server.asked if path == "/v1/completions"]
    assert (first.adapter, second.adapter) == ("lora_v000001", "lora_v000002")
    assert second.sync.version.name == "lora_v000003"
    # words earn nothing: equal rewards, no gradient, and the push does not ask for another adapter
    assert (first.varied, first.grad_norm, first.reward) == (0, 0.0, 0.0)
    assert first.rollout_gap < 1e-4
    # the probe of each version, and four rollouts from each that was trained on
    assert asked.count("lora_v000002") == 5
