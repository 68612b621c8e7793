"""From text to text: prompts through the chat template, generation, decoding. Used by
`lorry.generate`, chat, eval and demo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from lorry.adapters.mix import Mix
from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.reading.content import ChatMessage, Conversation
from lorry.errors import ConfigError
from lorry.generation.engine import generate_completions
from lorry.generation.request import Completion
from lorry.generation.sampling import SamplingParams
from lorry.models.causal_lm import CausalLM

# `ModelScorer.generate`: of prompts, parameters, adapters and batch_rows
GenerateFunction = Callable[..., list[Completion]]
# prompts are not cut here: the engine refuses what the context cannot hold
NO_TOKEN_LIMIT = 1 << 20
# what a decoder makes of bytes that are not a whole character yet
REPLACEMENT_CHARACTER = "\ufffd"


def generate_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str | Conversation],
    params: SamplingParams,
    *,
    system: str | None = None,
    chat: bool = True,
    adapters: Mix | Sequence[Mix | str | None] | str | None = None,
    batch_rows: int | None = None,
    generate: GenerateFunction | None = None,
) -> list[str]:
    """The model's continuation of each prompt, as text without special tokens and without the end
    of turn.

    A string is a user's message where the tokenizer has a chat template and ``chat`` is true, else
    plain text to continue (the answer then keeps the white space at its ends); a Conversation is
    answered at its last assistant message, exactly as it would be trained. ``adapters`` and
    ``batch_rows``: see `generation.engine.generate_completions`, in the place of which ``generate``
    may answer.
    """
    if not isinstance(model, CausalLM):
        raise ConfigError(
            f"generate needs a model from lorry.load; a {type(model).__name__} has its own model.generate"
        )
    encoder = ExampleEncoder(
        tokenizer, max_length=NO_TOKEN_LIMIT, system=system, embeddings=model.vocab_size
    )
    ids = [
        encoder.prompt(p) if isinstance(p, Conversation) else _encode_prompt(encoder, p, chat)
        for p in prompts
    ]
    texts = generate_continuations(
        model, encoder, ids, params, adapters=adapters, batch_rows=batch_rows, generate=generate
    )
    turns = [isinstance(p, Conversation) or (chat and encoder.has_template) for p in prompts]
    return [text.strip() if turn else text for text, turn in zip(texts, turns, strict=True)]


def generate_continuations(
    model: nn.Module,
    encoder: ExampleEncoder,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    adapters: Mix | Sequence[Mix | str | None] | str | None = None,
    batch_rows: int | None = None,
    generate: GenerateFunction | None = None,
) -> list[str]:
    """What the model goes on with after each prompt of tokens, as text without special tokens and
    without the end of turn, which ends an answer as ``params.stop_token_ids`` do. ``generate``: see
    `generate_texts`.
    """
    ends = frozenset((*params.stop_token_ids, *encoder.stop_tokens()))
    completions = (generate or partial(generate_completions, model))(
        prompts,
        replace(params, stop_token_ids=ends),
        adapters=adapters,
        batch_rows=batch_rows,
    )
    return [
        "".join(IncrementalDetokenizer(encoder).decode_all(completion.tokens))
        for completion in completions
    ]


def _encode_prompt(encoder: ExampleEncoder, text: str, chat: bool) -> list[int]:
    if chat and encoder.has_template:
        return encoder.prompt(
            Conversation((ChatMessage("user", text), ChatMessage("assistant", ".")))
        )
    return encode_continuation(encoder, text)


def encode_continuation(encoder: ExampleEncoder, text: str) -> list[int]:
    """The tokens of plain text to go on from. Raises DataError for one that the model has no
    embedding of.
    """
    ids = [*encoder.tokens.opening, *encoder.tokens.one(text).ids]
    encoder.expect_known(ids)
    return ids


class IncrementalDetokenizer:
    """Tokens in, text out as soon as it is sure: never half a character, never a part of the end of
    turn.

    ``ended``: an end of turn or of text was heard. The pieces joined are the decoded answer without
    that end, special tokens left out.
    """

    def __init__(self, encoder: ExampleEncoder) -> None:
        self.tokenizer, self.stops = encoder.tokenizer, frozenset(encoder.stop_tokens())
        # as text, where it is several tokens
        self.end = encoder.template.end_of_turn if encoder.has_template else ""
        self.ended = False
        self._tokens: list[int] = []
        # decoded together: what was read last (it decides about spaces) and what is new
        self._start = self._read = 0
        self._held = ""

    def push_token(self, token: int) -> str:
        """The text that this token makes sure; empty while a character or a possible end of turn is
        incomplete.
        """
        if token in self.stops:
            self.ended = True
        if self.ended:
            return ""
        self._tokens.append(token)
        new = self._new()
        if new.endswith(REPLACEMENT_CHARACTER):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        self._held += new
        return self._release()

    def rest(self) -> str:
        """What was held back, once no more tokens come."""
        self._held += self._new()
        self._start = self._read = len(self._tokens)
        text = self._release() + self._held
        self._held = ""
        return text

    def decode_all(self, tokens: Sequence[int]) -> list[str]:
        """The pieces of a whole answer."""
        return [*(self.push_token(token) for token in tokens), self.rest()]

    def _new(self) -> str:
        before = self._decode(self._tokens[self._start : self._read])
        return self._decode(self._tokens[self._start :])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(
            self.tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _release(self) -> str:
        """Let go of everything but a tail that may become the end of turn; cut where the end of
        turn stands.
        """
        if self.end and self.end in self._held:
            self.ended, text, self._held = True, self._held.partition(self.end)[0], ""
            return text
        length = next(
            (n for n in range(len(self.end) - 1, 0, -1) if self._held.endswith(self.end[:n])), 0
        )
        cut = len(self._held) - length
        text, self._held = self._held[:cut], self._held[cut:]
        return text
