"""From text to text: prompts through the chat template, generation, decoding. Used by `lorry.generate`, chat, eval and demo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lorry.data.content import Conversation, Message
from lorry.data.encode import Encoder
from lorry.models.generate import generate

LONGEST = 1 << 20  # prompts are not cut here; generate refuses what the context cannot hold


def answer(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str | Conversation],
    *,
    system: str | None = None,
    chat: bool = True,
    max_new_tokens: int = 128,
    **options: Any,
) -> list[str]:
    """The model's continuation of each prompt, as text without special tokens.

    A string is a user's message where the tokenizer has a chat template and ``chat`` is true, else plain text to continue; a
    Conversation is answered at its last assistant message, exactly as it would be trained. ``options`` go to
    `models.generate.generate` (temperature, top_k, top_p, seed, adapters, ...).
    """
    encoder = Encoder(tokenizer, max_length=LONGEST, system=system)
    ids = [encoder.prompt(p) if isinstance(p, Conversation) else _prompt(encoder, p, chat) for p in prompts]
    made = generate(model, ids, max_new_tokens=max_new_tokens, eos=encoder.stop_tokens(), **options)
    texts = [tokenizer.decode(g.tokens, skip_special_tokens=True) for g in made]
    return [text.strip() for text in texts] if chat else texts


def _prompt(encoder: Encoder, text: str, chat: bool) -> list[int]:
    if chat and encoder.has_template:
        return encoder.prompt(Conversation((Message("user", text), Message("assistant", "."))))
    return [*encoder.tokens.opening, *encoder.tokens.one(text).ids]
