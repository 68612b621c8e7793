"""What has to be true of a version before rollouts are taken from it; each that is not is an error
that names the tensor or the prompt.

`check_moved`: it is a new one. `check_same_tensors`, `check_held`: what an engine holds is what was
sent. `GreedyProbe`: the engine computes with it, once: greedy answers to fixed prompts have the
trainer's log-probabilities.

The last is within rounding only: engine and trainer compute in bfloat16 by other kernels, and one
step of training moves log-probabilities by less than that. So it also takes the trainer's
log-probabilities under the base, and estimates how much of the adapter's effect the engine shows
(``share``): 0 is the base, 1 this policy, 2 an adapter over weights into which it was merged.
bfloat16 loses of a small adapter what is below the rounding of a layer's output, so against a trainer
in float32 it begins near 0.4 (docs/rollout.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lorry.errors import ContractError
from lorry.generation.request import Completion
from lorry.generation.sampling import SamplingParams
from lorry.integrations.rollout.engine import LoraReceiver, PromptAnswerer
from lorry.integrations.rollout.versions import AdapterVersion, Version

# (prompts, answers) as token ids -> log p of every token of each answer
ScoreAnswers = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], list[list[float]]]
# between these `share` has to be, two standard errors aside: below lies the base, above twice
SHARE_BOUNDS = (0.2, 1.5)


def check_moved(version: Version, previous: Version | None, *, stepped: bool) -> None:
    """Compare a version with the one before it (None: the first). ``stepped``: an optimizer step with
    a gradient was made in between; then values must have changed, and no lora_B may be zero. Raises
    ContractError, which names a tensor.
    """
    where = f"{version.name} ({version.path})"
    if previous is not None:
        if version.number <= previous.number:
            raise ContractError(f"{where} does not come after {previous.name}")
        for name in sorted(set(version.tensors) ^ set(previous.tensors)):
            which = "has no" if name in previous.tensors else "has a new"
            raise ContractError(
                f"{where} {which} tensor {name}, unlike {previous.name}: it was not gathered whole"
            )
        for name, facts in version.tensors.items():
            if facts.shape != previous.tensors[name].shape:
                raise ContractError(
                    f"{where}: {name} has shape {list(facts.shape)}, and "
                    f"{list(previous.tensors[name].shape)} in {previous.name}: it was not gathered whole"
                )
        same = [n for n, facts in version.tensors.items() if facts == previous.tensors[n]]
        if stepped and len(same) == len(version.tensors):
            raise ContractError(
                f"{where} is {previous.name} again, {same[0]} and all others: a step was made, and "
                "what was sent is not what was trained"
            )
    zero = [name for name, facts in version.tensors.items() if "lora_" in name and facts.zero]
    if stepped and zero:
        raise ContractError(
            f"{where}: {zero[0]} is zero ({len(zero)} such) after a step: its layer answers as the "
            "base does"
        )


def check_same_tensors(sent: Mapping[str, str], held: Mapping[str, str], receiver: str) -> None:
    """Compare {tensor: SHA-256} of what was sent with what a receiver holds. Raises ContractError,
    which names a tensor."""
    for name in sorted(set(sent) | set(held)):
        if name not in held:
            raise ContractError(f"{receiver}: never received {name}")
        if name not in sent:
            raise ContractError(f"{receiver}: holds {name}, which was not sent")
        if sent[name] != held[name]:
            raise ContractError(
                f"{receiver}: {name} is not what was sent (SHA-256 {held[name][:12]}..., sent "
                f"{sent[name][:12]}...)"
            )


def check_held(receiver: LoraReceiver, version: AdapterVersion) -> None:
    """Ask a receiver for a version: it lists it, read it from its directory, and holds the tensors of
    its receipt. Raises ContractError and EngineError."""
    listed = receiver.list_lora_adapters()
    if version.name not in listed:
        raise ContractError(
            f"{receiver.label}: does not hold {version.name}; it holds {', '.join(listed) or 'none'}"
        )
    origin = listed[version.name]
    if origin is not None and origin.resolve() != version.path.resolve():
        raise ContractError(
            f"{receiver.label}: read {version.name} from {origin}, not from {version.path}"
        )
    sent = {name: facts.sha256 for name, facts in version.tensors.items()}
    check_same_tensors(sent, receiver.held_digests(version), f"{receiver.label}, {version.name}")


@dataclass(frozen=True)
class LogProbGap:
    """How far an engine's log-probabilities are from the trainer's, in nats: ``mean`` and ``largest``
    |difference| over ``tokens`` tokens, and where the largest is. ``share``: of the adapter's effect
    that the engine shows, with its standard error; None where nobody scored the base."""

    mean: float
    largest: float
    prompt: int
    token: int
    tokens: int
    share: float | None = None
    share_error: float | None = None


def measure_gap(
    engine: Sequence[Sequence[float]],
    trainer: Sequence[Sequence[float]],
    base: Sequence[Sequence[float]] | None = None,
) -> LogProbGap:
    """Compare log-probabilities of the same tokens, one list per prompt: the engine's, the trainer's
    under the policy and, if given, under its base."""
    places = [(prompt, token) for prompt, row in enumerate(engine) for token in range(len(row))]
    theirs = [value for row in engine for value in row]
    ours = [value for row in trainer for value in row]
    gaps = [abs(a - b) for a, b in zip(theirs, ours, strict=True)]
    # what is not a number is further away than anything
    worst = max(range(len(gaps)), key=lambda at: math.inf if math.isnan(gaps[at]) else gaps[at])
    gap = LogProbGap(sum(gaps) / len(gaps), gaps[worst], *places[worst], len(gaps))
    if base is None:
        return gap
    # least squares: engine - base = share * (policy - base) + noise
    start = [value for row in base for value in row]
    effect = [a - b for a, b in zip(ours, start, strict=True)]
    shown = [a - b for a, b in zip(theirs, start, strict=True)]
    power = sum(x * x for x in effect)
    # a policy that is the base: nothing to see
    if power == 0:
        return gap
    share = sum(x * y for x, y in zip(effect, shown, strict=True)) / power
    noise = sum((y - share * x) ** 2 for x, y in zip(effect, shown, strict=True))
    return replace(gap, share=share, share_error=math.sqrt(noise / max(len(gaps) - 1, 1) / power))


@dataclass(frozen=True)
class GreedyProbe:
    """Fixed ``prompts`` (token ids) that the engine answers greedily with each version.

    ``score``: the trainer's log-probabilities of those answers under the policy; ``score_base``:
    under its base. The mean gap may be ``mean_bound`` and the largest ``bound``, both in nats: by
    default those of bfloat16 on both sides. ``every``: of so many versions one is asked, 0: none.
    """

    prompts: Sequence[Sequence[int]]
    score: ScoreAnswers
    score_base: ScoreAnswers | None = None
    max_new_tokens: int = 16
    mean_bound: float = 0.1
    bound: float = 1.0
    every: int = 1

    def due(self, number: int) -> bool:
        """Whether a version of this number is asked."""
        return self.every > 0 and number % self.every == 0

    def check(self, engine: PromptAnswerer, adapter: str | None) -> LogProbGap:
        """Ask the engine, and the trainer about its answers. Raises ContractError, which names the
        prompt, and EngineError."""
        params = SamplingParams(max_new_tokens=self.max_new_tokens, logprobs=True)
        answers = engine.generate(self.prompts, params, adapter=adapter)
        return self.compare(answers, engine.label, adapter)

    def compare(
        self, answers: Sequence[Completion], engine: str, adapter: str | None
    ) -> LogProbGap:
        """`check` of answers that are there already, one to each prompt."""
        tokens = [answer.tokens for answer in answers]
        for prompt, answer in enumerate(answers):
            if not answer.tokens or answer.logprobs is None:
                raise ContractError(
                    f"{engine}: answered prompt {prompt} without a token or its log-probability"
                )
        gap = measure_gap(
            [answer.logprobs or [] for answer in answers],
            self.score(self.prompts, tokens),
            None if self.score_base is None else self.score_base(self.prompts, tokens),
        )
        who = f"{engine}, {adapter or 'the base'}"
        # `not <=` also when it is not a number
        if not (gap.mean <= self.mean_bound and gap.largest <= self.bound):
            raise ContractError(
                f"{who}: log-probabilities are {gap.mean:.3g} nats from the trainer's on average "
                f"(bound {self.mean_bound:g}) and {gap.largest:.3g} at token {gap.token} of prompt "
                f"{gap.prompt} (bound {self.bound:g}): the engine answers with another policy"
            )
        if gap.share is not None and gap.share_error is not None:
            sure = gap.share + 2 * gap.share_error, gap.share - 2 * gap.share_error
            if sure[0] < SHARE_BOUNDS[0] or sure[1] > SHARE_BOUNDS[1]:
                raise ContractError(
                    f"{who}: shows {gap.share:.2f} +- {gap.share_error:.2f} of the adapter's effect, "
                    f"furthest off at token {gap.token} of prompt {gap.prompt}: 0 is the base without "
                    "it, 1 this policy, 2 an adapter over weights into which it was merged"
                )
        return gap
