"""What engines are asked and what they answer, in their words and in ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lorry.generation.request import Completion
from lorry.generation.sampling import SamplingParams
from lorry.integrations.rollout.engine import EngineError


def row_seeds(seed: int, rows: int) -> list[int]:
    """A seed for each prompt of a call, 31 bits: with one for all, equal prompts get equal answers."""
    return [(seed * 1_000_003 + row) % (1 << 31) for row in range(rows)]


def vllm_sampling(params: SamplingParams, seed: int) -> dict[str, Any]:
    """The settings of one answer as vLLM names them, in process and over HTTP, with the
    log-probability of the chosen token alone."""
    return {
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": 1.0 if params.top_p is None else params.top_p,
        "top_k": params.top_k or 0,
        "repetition_penalty": params.repetition_penalty,
        "seed": seed,
        "stop_token_ids": sorted(params.stop_token_ids),
        "logprobs": 0,
    }


def sglang_sampling(params: SamplingParams, seed: int) -> dict[str, Any]:
    """The same as SGLang names them."""
    return {
        "max_new_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": 1.0 if params.top_p is None else params.top_p,
        "top_k": params.top_k or -1,
        "repetition_penalty": params.repetition_penalty,
        "sampling_seed": seed,
        "stop_token_ids": sorted(params.stop_token_ids),
    }


def read_completion(tokens: Iterable[Any], logprobs: Iterable[Any], reason: object) -> Completion:
    """An answer from what an engine gave. ``reason``: why it ended; "length" where it was cut. Raises
    TypeError or ValueError where the lists are none, or unlike in length."""
    ids, values = [int(token) for token in tokens], [float(value) for value in logprobs]
    if len(ids) != len(values):
        raise ValueError(f"{len(ids)} tokens with {len(values)} log-probabilities")
    return Completion(ids, "length" if reason == "length" else "stop", values)


def check_all_answered(
    label: str, completions: list[Completion], prompts: Sequence[Sequence[int]]
) -> list[Completion]:
    """The answers, one to each prompt. Raises EngineError."""
    if len(completions) != len(prompts):
        raise EngineError(f"{label}: {len(completions)} answers to {len(prompts)} prompts")
    return completions
