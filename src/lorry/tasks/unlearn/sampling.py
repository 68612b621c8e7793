"""Alternates sampled from the start, as AltPO learns them (Mekala et al. 2025, arXiv 2409.13474): the
model itself is shown question and answer and asked for another answer.

    asked = read_questions(open_source("forget.jsonl"), form=None)
    found = sample_alternates(model, encoder, asked, SamplingSettings(n=5), Mix.one("people"), tell)

A sample is a function of (seed, row, which of n, try) and of the model: neither n, nor how many are
sampled at a time, nor the rows behind it change it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lorry.adapters.mix import Mix
from lorry.adapters.seeds import derive_seed
from lorry.config.unlearning.alternates import ALTERNATES_PREFILL, ALTERNATES_PROMPT
from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.reading.content import ChatMessage
from lorry.data.reading.formats import DataExample, RowFormat, read_examples
from lorry.data.reading.sources import DataSource
from lorry.errors import DataError, ModelError
from lorry.generation.engine import GenerationEngine
from lorry.generation.sampling import SamplingParams
from lorry.generation.text import IncrementalDetokenizer, encode_continuation
from lorry.tasks.unlearn.alternates import last_answer, last_question, replace_last_answer

# Draws of one alternate before a question is given up: a model that ends its turn at once nine times
# in ten has given a word by then, with a chance of .88.
MOST_TRIES = 20
# A model without a chat template goes on with a question of its own, which is no part of the answer
NEXT_QUESTION = "\nQuestion:"


@dataclass(frozen=True)
class SamplingSettings:
    """How alternates are sampled: `n` of each question; the rest as in `AlternatesSettings`."""

    n: int = 1
    temperature: float = 1.0
    max_new_tokens: int = 200
    seed: int = 0
    prompt: str = ALTERNATES_PROMPT
    prefill: str = ALTERNATES_PREFILL
    batch_rows: int = 32


@dataclass(frozen=True)
class SampledAlternate:
    """One other answer to a row's question. ``cut``: it ends because it had no more tokens."""

    where: str
    question: str
    answer: str
    alternate: str
    cut: bool

    @property
    def is_the_answer(self) -> bool:
        """Whether it says what the row says, white space aside: then it teaches nothing."""
        return self.alternate.split() == self.answer.split()

    def row(self) -> dict[str, str]:
        """The columns that open-unlearning writes, and `read_alternates` reads."""
        return {"question": self.question, "answer": self.answer, "alternate": self.alternate}


def read_questions(source: DataSource, form: RowFormat | None) -> list[DataExample]:
    """The rows of a source. Raises DataError for none, for a text without a question, and for a chat
    that does not end with an answer.
    """
    rows = list(read_examples(source, form))
    if not rows:
        raise DataError(f"{source.label}: there are no rows")
    for row in rows:
        last_answer(row)
    return rows


def alternate_prompt(
    row: DataExample, encoder: ExampleEncoder, settings: SamplingSettings
) -> list[int]:
    """The tokens that an alternate of a row follows: its conversation with the last question
    replaced by the request, and how the answer begins. Raises DataError for what the chat template
    does not take.
    """
    request = settings.prompt.format(question=last_question(row), answer=last_answer(row))
    if not encoder.has_template:
        return encode_continuation(encoder, f"{request}\n{settings.prefill}")
    # what stands before the question stays; "." is in the place of the answer that is asked for
    conversation = replace_last_answer(row, ".")
    *before, _, answer = conversation.messages
    turns = (*before, ChatMessage("user", request), answer)
    prompt = encoder.prompt(replace(conversation, messages=turns, plain=None))
    return [*prompt, *(encoder.tokens.one(settings.prefill).ids if settings.prefill else [])]


def sample_alternates(
    model: nn.Module,
    encoder: ExampleEncoder,
    rows: Sequence[DataExample],
    settings: SamplingSettings,
    mix: Mix,
    tell: Callable[[str], Any],
) -> list[SampledAlternate]:
    """``settings.n`` alternates of each row, in the order of the rows. An empty one is drawn again,
    up to `MOST_TRIES` times. Raises ModelError where one stays empty, and for a prompt that the
    model's context cannot hold, before anything runs.
    """
    prompts = [alternate_prompt(row, encoder, settings) for row in rows]
    missing = [(row, copy) for row in range(len(rows)) for copy in range(settings.n)]
    alternates = dict[tuple[int, int], SampledAlternate]()
    total = len(missing)
    # a greedy answer is the same however often it is asked for
    for attempt in range(MOST_TRIES if settings.temperature > 0 else 1):
        engine = GenerationEngine(model, batch_rows=settings.batch_rows)
        places = {}
        for row, copy in missing:
            request = engine.add_request(
                prompts[row], _params(encoder, settings, copy, attempt), adapter=mix, row=row
            )
            places[request] = (row, copy)
        while engine.has_unfinished_requests():
            for output in engine.step():
                row, copy = places[output.request_id]
                text = _text(encoder, output.completion.tokens)
                if text:
                    cut = output.completion.finish_reason == "length"
                    alternates[row, copy] = _sampled(rows[row], text, cut)
            tell(f"{len(alternates)} of {total} alternates")
        missing = [place for place in missing if place not in alternates]
        if not missing:
            return [alternates[place] for place in sorted(alternates)]
    first = rows[missing[0][0]]
    raise ModelError(
        f"{first.where}: no alternate of {last_question(first)!r:.80}: the model's "
        f"answers were empty ({len(missing)} of {total} alternates, {attempt + 1} "
        "draws each); give another prompt=, or a higher temperature"
    )


def _params(
    encoder: ExampleEncoder, settings: SamplingSettings, copy: int, attempt: int
) -> SamplingParams:
    # a seed for each copy and try; the row is the engine's, so that all of it names the draw
    return SamplingParams(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=derive_seed("alternates", settings.seed, copy, attempt),
        stop_token_ids=encoder.stop_tokens(),
    )


def _text(encoder: ExampleEncoder, tokens: Sequence[int]) -> str:
    whole = "".join(IncrementalDetokenizer(encoder).decode_all(tokens))
    return whole.partition(NEXT_QUESTION)[0].strip()


def _sampled(row: DataExample, text: str, cut: bool) -> SampledAlternate:
    return SampledAlternate(row.where, last_question(row), last_answer(row), text, cut)
