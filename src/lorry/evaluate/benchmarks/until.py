"""Generation as the lm-evaluation-harness asks for it: what its settings mean, and answers that end
at texts.

A stop string may be tokenised in many ways, so it is looked for in what has been said.

Try: dict(generate_until_stops(model, tokenizer, [[1, 403, 407]], SamplingParams(max_new_tokens=40),
stops=["."]))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lorry.adapters.mix import Mix
from lorry.errors import ConfigError, suggest_nearest
from lorry.generation.engine import GenerationEngine
from lorry.generation.request import resolve_constant_mix
from lorry.generation.sampling import SamplingParams

# tokens looked at beyond those a stop string can take: special ones, and a space that is dropped at
# a text's start
STOP_MARGIN_TOKENS = 4

# the first of them that is given counts
LENGTH_SETTINGS_NAMES = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)
KNOWN_GENERATION_SETTINGS = (
    "until",
    *LENGTH_SETTINGS_NAMES,
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "seed",
)


def parse_generation_kwargs(
    kwargs: Mapping[str, Any], max_gen_toks: int, seed: int
) -> tuple[list[str], SamplingParams]:
    """(stop strings, sampling parameters) of a task's generation settings; greedy unless do_sample
    is true or a temperature above 0 is given without it. Raises ConfigError for a setting that
    would be ignored.
    """
    remaining = dict(kwargs)
    until = remaining.pop("until", None) or []
    lengths = [
        value for name in LENGTH_SETTINGS_NAMES if (value := remaining.pop(name, None)) is not None
    ]
    sample, temperature = remaining.pop("do_sample", None), remaining.pop("temperature", None)
    # as the harness reads them: a temperature alone asks for sampling
    sampled = bool(sample) if sample is not None else bool(temperature)
    sampling_temperature = 1.0 if temperature is None else float(temperature)
    top_k, top_p = remaining.pop("top_k", None), remaining.pop("top_p", None)
    params = SamplingParams(
        max_new_tokens=int(lengths[0]) if lengths else max_gen_toks,
        temperature=sampling_temperature if sampled else 0.0,
        top_k=top_k
        if sampled and top_k and top_k > 0
        else None,  # 0 and -1 are other libraries' words for all
        top_p=top_p if sampled else None,
        repetition_penalty=float(remaining.pop("repetition_penalty", 1.0)),
        seed=int(remaining.pop("seed", seed)),
    )
    if unknown := {
        name: value
        for name, value in remaining.items()
        # num_beams=1 stands in many tasks and asks for nothing
        if value is not None and (name, value) != ("num_beams", 1)
    }:
        name = next(iter(unknown))
        raise ConfigError(
            f"generation_kwargs: {name} is not "
            f"supported{suggest_nearest(name, KNOWN_GENERATION_SETTINGS)}; there "
            f"are {', '.join(KNOWN_GENERATION_SETTINGS)}"
        )
    return [until] if isinstance(until, str) else list(until), params


def generate_until_stops(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    stops: Sequence[str],
    adapters: Mix | str | None = None,
    batch_rows: int | None = None,
) -> Iterator[tuple[int, str]]:
    """(number of the prompt, its answer as text), as answers end. An answer is cut before the first
    stop string in it and holds no special tokens. The rest is as in `generation.engine`."""
    # "" is in every text and would end an answer before it began
    stops = [stop for stop in stops if stop]
    # bytes: a byte-level tokenizer may spend a token on each
    window = max((len(stop.encode()) for stop in stops), default=0) + STOP_MARGIN_TOKENS
    engine, mix = (
        GenerationEngine(model, batch_rows=batch_rows),
        resolve_constant_mix(model, adapters),
    )

    def decode_answer(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    def reached_stop(tokens: Sequence[int]) -> bool:
        """The last tokens are looked at first, which is quick; what they show has to be in the
        whole text too.
        """
        return contains_stop(decode_answer(tokens[-window:]), stops) and (
            len(tokens) <= window or contains_stop(decode_answer(tokens), stops)
        )

    for prompt in prompts:
        engine.add_request(prompt, params, adapter=mix, stopping_criterion=reached_stop)
    while engine.has_unfinished_requests():
        for output in engine.step():
            yield output.request_id, cut_at_stops(decode_answer(output.completion.tokens), stops)


def contains_stop(text: str, stops: Sequence[str]) -> bool:
    """Whether any stop string is in a text."""
    return any(stop in text for stop in stops)


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """The text before the first occurrence of each stop string, one after the other as the harness
    cuts.
    """
    for stop in stops:
        text = text.partition(stop)[0]
    return text
