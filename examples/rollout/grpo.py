"""GRPO with answers from vLLM: 20 steps on word problems, the adapter sent and proved at each.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True python -m vllm.entrypoints.openai.api_server \\
        --model ~/.cache/lorry/models/smollm2-135m-instruct-* --enable-lora --max-lora-rank 16 ...
    python examples/rollout/grpo.py SVAMP.json --url http://127.0.0.1:8000 --output runs/grpo

Trainer and engine are two programs that share a directory of versions. A step: sample a group of answers
to each question from the version that the engine was just shown to hold; reward an answer whose
number is right; advantages within each group, (r - mean) / (std + 1e-4) (Shao et al. 2024); one
optimizer step; push the adapter. `GrpoTask` is Lorry's seam: batches and a pure loss.

Equal rewards in all groups leave no gradient: then nothing has to move, and the push is told so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lorry
from lorry.adapters.mix import Mix
from lorry.adapters.peft.files import adapter_files
from lorry.backends.local import LocalBackend
from lorry.backends.optim import OptimSettings
from lorry.backends.protocol import LossTerms, ScoringBackend, StepStats
from lorry.data.batch import Batch, BatchExtra, TokenizedExample, collate
from lorry.evaluate.metrics.number import final_number, number_match
from lorry.generation.request import Completion
from lorry.generation.sampling import SamplingParams
from lorry.integrations.rollout import (
    AdapterSync,
    GreedyProbe,
    RolloutEngine,
    SyncReport,
    VersionPublisher,
    VllmServer,
    score_answers,
)
from lorry.models.scoring.score import TokenScore, Want, log_prob

POLICY = "policy"
ASK = "Answer with the number only."  # the system's message, in place of the template's longer one
OPENING = "The answer is"  # of every answer: a small model would else tell the story again


@dataclass(frozen=True)
class Question:
    """A prompt as token ids, and the number that answers it."""

    prompt: list[int]
    answer: str


@dataclass(frozen=True)
class Settings:
    """``rows``: questions of a step; ``group``: answers to each; the rest as in TRL's GRPOConfig.
    ``ratio_cap``: importance weights between engine and trainer are cut there."""

    steps: int = 20
    rows: int = 2
    group: int = 4
    max_new_tokens: int = 4
    learning_rate: float = 2e-4
    temperature: float = 1.0
    ratio_cap: float = 2.0
    seed: int = 0


def read_questions(path: Path, tokenizer: Any) -> list[Question]:
    """The problems of SVAMP.json, in the chat template's words, each with the answer begun."""
    opening = tokenizer.encode(OPENING, add_special_tokens=False)
    questions = []
    for row in json.loads(path.read_text()):
        turns = [
            {"role": "system", "content": ASK},
            {"role": "user", "content": f"{row['Body'].rstrip('. ')}. {row['Question']}"},
        ]
        prompt = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        questions.append(Question([*prompt, *opening], f"{row['Answer']:g}"))
    return questions


def reward(text: str, answer: str) -> float:
    """1 for the right number, and 0.2 for saying a number and nothing else."""
    said = text.strip().rstrip(".")
    bare = final_number(said) is not None and all(c in "0123456789.,$" for c in said)
    return number_match(text, answer) + 0.2 * bare


def group_advantages(rewards: Sequence[float], group: int) -> list[float]:
    """(r - mean) / (std + 1e-4) within each run of ``group`` rewards; std with n - 1."""
    values = torch.tensor(rewards, dtype=torch.float64).view(-1, group)
    centred = values - values.mean(1, keepdim=True)
    return (centred / (values.std(1, keepdim=True) + 1e-4)).flatten().tolist()


class GrpoTask:
    """GRPO's loss with one optimizer step for each batch of rollouts: the ratio to the old policy is
    1, so its gradient is that of -A log p, averaged over the tokens of the step (TRL's
    loss_type="dapo"). Tokens are weighted by p(trainer) / p(engine), cut at ``ratio_cap``: the two
    round differently (truncated importance sampling). ``gap`` is reported: |log p(engine) - log p|.
    """

    reported: Collection[str] = ("gap",)
    adapters: Sequence[str] = (POLICY,)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.total_steps = settings.steps
        self.batches: list[Batch] = []

    def collect(
        self,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Completion],
        advantages: Sequence[float],
    ) -> None:
        """Rollouts for the next step, one sequence each."""
        rows = []
        for row, (prompt, answer, advantage) in enumerate(
            zip(prompts, answers, advantages, strict=True)
        ):
            weights = [0.0] * len(prompt) + [1.0] * len(answer.tokens)
            said = [0.0] * len(prompt) + list(answer.logprobs or [])
            rows.append(
                TokenizedExample(
                    [*prompt, *answer.tokens],
                    weights,
                    key=row,
                    extra={
                        "advantage": BatchExtra(torch.tensor([advantage] * len(weights)), "token"),
                        "rollout_logprob": BatchExtra(torch.tensor(said), "token"),
                    },
                )
            )
        batch = collate(rows)
        tokens = batch.count("token", 1)
        self.batches = [batch.with_terms(policy=tokens, gap=tokens)]

    def wants(self, batch: Batch) -> Mapping[str, Want]:
        return {"logprob": TokenScore(log_prob)}

    def step_batches(self, step: int, models: Mapping[str, ScoringBackend]) -> list[Batch]:
        return self.batches

    def eval_batches(self) -> list[Batch]:
        return []

    def loss(self, got: Mapping[str, Tensor], batch: Batch) -> LossTerms:
        """Sums over the sampled tokens of each sequence, [S]."""
        logprob, said = got["logprob"], batch.extra["rollout_logprob"].values
        apart = (logprob.detach() - said) * batch.weights
        ratio = apart.exp().clamp(max=self.settings.ratio_cap)
        gain = ratio * batch.extra["advantage"].values * logprob
        return {
            "policy": batch.sum_by_sequence(-gain * batch.weights),
            "gap": batch.sum_by_sequence(apart.abs()),
        }

    def after_step(self, stats: StepStats) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class StepRecord:
    """What one step did. ``reward``, ``accuracy``: means over its rollouts; ``varied``: groups whose
    rewards differ; ``rollout_gap``: mean |log p(engine) - log p(trainer)| of the sampled tokens;
    ``sync``: of the version that came of it."""

    step: int
    adapter: str
    reward: float
    accuracy: float
    varied: int
    tokens: int
    rollout_gap: float
    grad_norm: float
    sync: SyncReport


class GrpoTrainer:
    """A policy, the engine that samples from it, and the push between them."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        engine: RolloutEngine,
        sync: AdapterSync,
        settings: Settings,
    ) -> None:
        self.tokenizer, self.engine, self.sync, self.settings = tokenizer, engine, sync, settings
        self.model, self.task = model, GrpoTask(settings)
        self.backend = LocalBackend(model, [POLICY], OptimSettings(), seed=settings.seed)

    def push(self, *, stepped: bool) -> SyncReport:
        """The adapter as it is, to the engine."""
        return self.sync.push(adapter_files(self.model, POLICY), stepped=stepped)

    def sample(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[Completion]:
        """Answers by the version that the engine was last shown to hold."""
        assert self.sync.current is not None
        adapter = self.sync.current.name
        answers = self.engine.generate(prompts, params, adapter=adapter)
        self.sync.check_rollouts(adapter)
        return answers

    def run(self, questions: Sequence[Question]) -> Iterator[StepRecord]:
        """Sample, reward, step and push, ``settings.steps`` times. Raises what `AdapterSync.push`
        raises."""
        if self.sync.current is None:
            self.push(stepped=False)
        for step in range(self.settings.steps):
            yield self.step(step, questions)

    def step(self, step: int, questions: Sequence[Question]) -> StepRecord:
        """One of them, on the next ``settings.rows`` questions."""
        wanted, at = self.settings, step * self.settings.rows
        asked = [questions[(at + i) % len(questions)] for i in range(wanted.rows)]
        rows = [question for question in asked for _ in range(wanted.group)]
        assert self.sync.current is not None
        adapter = self.sync.current.name
        answers = self.sample(
            [question.prompt for question in rows],
            SamplingParams(
                max_new_tokens=wanted.max_new_tokens,
                temperature=wanted.temperature,
                seed=wanted.seed + step,
                stop_token_ids=[self.tokenizer.eos_token_id],
                logprobs=True,
            ),
        )
        texts = [self.tokenizer.decode(a.tokens, skip_special_tokens=True) for a in answers]
        rewards = [reward(text, row.answer) for text, row in zip(texts, rows, strict=True)]
        advantages = group_advantages(rewards, wanted.group)
        self.task.collect([row.prompt for row in rows], answers, advantages)
        stats = self.backend.forward_backward(self.task.step_batches(step, {}), self.task, step)
        norms = self.backend.step({POLICY: wanted.learning_rate}).norms
        varied = sum(
            any(advantages[i : i + wanted.group]) for i in range(0, len(rows), wanted.group)
        )
        return StepRecord(
            step=step + 1,
            adapter=adapter,
            reward=sum(rewards) / len(rewards),
            accuracy=sum(number_match(t, r.answer) for t, r in zip(texts, rows, strict=True))
            / len(rows),
            varied=varied,
            tokens=stats.supervised,
            rollout_gap=stats.terms["gap"][POLICY],
            grad_norm=norms[POLICY],
            # groups of equal rewards have advantage 0: their gradient is exactly 0
            sync=self.push(stepped=norms[POLICY] > 0),
        )


def open_policy(name: str, *, dtype: str = "bfloat16", r: int = 16) -> tuple[Any, Any]:
    """(model with a new adapter on every linear, tokenizer). ``dtype``: best the engine's."""
    model, tokenizer = lorry.load(name, dtype=dtype)
    spec = lorry.LoraSpec(r=r, target_modules="all-linear")
    lorry.attach(model, spec, POLICY)
    return model, tokenizer


def make_probe(
    backend: ScoringBackend, prompts: Sequence[Sequence[int]], **options: Any
) -> GreedyProbe:
    """Greedy answers to fixed prompts, compared with this trainer's policy and base."""
    return GreedyProbe(
        prompts,
        score_answers(backend, Mix.one(POLICY)),
        score_answers(backend, Mix.none()),
        **options,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", type=Path, help="SVAMP.json")
    parser.add_argument("--url", required=True, help="of the vLLM server")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="what the server serves")
    parser.add_argument("--output", type=Path, default=Path("runs/grpo"))
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    model, tokenizer = open_policy(args.model)
    questions = read_questions(args.questions, tokenizer)
    engine = VllmServer(args.url)
    publisher = VersionPublisher(args.output / "versions")
    sync = AdapterSync(publisher, [engine])
    trainer = GrpoTrainer(model, tokenizer, engine, sync, Settings(steps=args.steps))
    sync.probe = make_probe(trainer.backend, [q.prompt for q in questions[-8:]])
    for record in trainer.run(questions[:-8]):
        print(
            f"step {record.step}: reward {record.reward:.3f}, right {record.accuracy:.3f}, "
            f"gradient norm {record.grad_norm:.3f}; {record.sync}"
        )
    lorry.save_adapter(model, args.output / "adapter", POLICY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
