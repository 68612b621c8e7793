"""A request to generate: what was asked, what has been answered so far, and what comes back.

The words are vLLM's. A request is answered under a mix of adapters that is the same for all of its
tokens: none, one, or several with constant weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from lorry.adapters.attach import get_bank
from lorry.adapters.mix import Mix
from lorry.errors import ConfigError
from lorry.generation.sampling import SamplingParams

FinishReason = Literal["stop", "length"]
# the answer so far -> whether it ends here
StoppingCriterion = Callable[[Sequence[int]], bool]


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt. ``tokens``: the new ones, with the stop token or stop sequence that
    ended it, if any; ``finish_reason``: "stop", it ended by itself, or "length", at
    ``max_new_tokens``; ``logprobs``: log p of each token under the plain model (temperature 1,
    nothing penalised or cut off), when asked for.
    """

    tokens: list[int]
    finish_reason: FinishReason
    logprobs: list[float] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A finished request: the id that `GenerationEngine.add_request` gave it, and its answer."""

    request_id: int
    completion: Completion


@dataclass(eq=False)
class Request:
    """A prompt and what has been answered so far. ``mix``: of the prompt, ``answering``: of what comes
    behind it (other than that where tokens invoke an adapter); ``generator``: its own random numbers;
    ``seen``: the tokens of prompt and answer, which a repetition penalty is for."""

    request_id: int
    prompt: list[int]
    params: SamplingParams
    mix: Mix
    generator: random.Random
    stopping_criterion: StoppingCriterion | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    seen: set[int] = field(init=False)
    answering: Mix = field(init=False)

    def __post_init__(self) -> None:
        self.seen, self.answering = set(self.prompt), self.mix

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longest answer."""
        return len(self.prompt) + self.params.max_new_tokens

    def append_token(self, token: int) -> None:
        """One more token of the answer, which may end it."""
        self.tokens.append(token)
        self.seen.add(token)
        # an answer that ends by itself with its last possible token has stopped
        if self._stops(token):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.params.max_new_tokens:
            self.finish_reason = "length"

    def _stops(self, token: int) -> bool:
        return (
            token in self.params.stop_token_ids
            or any(tuple(self.tokens[-len(stop) :]) == stop for stop in self.params.stop)
            or (self.stopping_criterion is not None and self.stopping_criterion(self.tokens))
        )

    def completion(self) -> Completion:
        """The answer of a finished request."""
        assert self.finish_reason is not None
        logprobs = self.logprobs if self.params.logprobs else None
        return Completion(self.tokens, self.finish_reason, logprobs)


def resolve_constant_mix(model: nn.Module, adapter: Mix | str | None) -> Mix:
    """A mix that is the same for every token (with its router, of the layers or of the sequence,
    where it has one), of a name, a mix, or None: the model's active one.
    Raises ConfigError for an adapter that is not there and for a mix that differs between tokens,
    which means nothing for the tokens to come.
    """
    bank = get_bank(model, create=True)
    if adapter is None:
        mix = bank.active
    else:
        mix = Mix.one(adapter) if isinstance(adapter, str) else adapter
    for term in mix.terms:
        bank[term.adapter]
        # a router of the layers makes its gates of each token as it comes
        if term.rows is not None or isinstance(term.gate, Tensor):
            raise ConfigError(
                "this Mix has gates for the tokens of one batch; give one that is "
                "the same for all: a name or Mix.constants({name: weight})"
            )
    return mix
