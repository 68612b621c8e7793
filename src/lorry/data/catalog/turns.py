"""An item as a conversation: what training learns and generation answers, with worked examples
before it.

Try: ``item_conversation(item, shots=[other]).plain`` is the running text for a tokenizer that has no
chat template.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorry.data.catalog.item import NamedSetItem
from lorry.data.reading.content import ChatMessage, Conversation


def item_conversation(item: NamedSetItem, shots: Sequence[NamedSetItem] = ()) -> Conversation:
    """Chat turns, the shots first as earlier turns; ``plain`` is (blocks of text that close with
    the cue, " answer").
    """
    turns = [
        message
        for shot in shots
        for message in (ChatMessage("user", shot.prompt), ChatMessage("assistant", shot.answer))
    ]
    # one space before an answer: where a word's space belongs to its token
    blocks = [f"{prompt_with_cue(shot)} {shot.answer}" for shot in shots]
    messages = (*turns, ChatMessage("user", item.prompt), ChatMessage("assistant", item.answer))
    return Conversation(
        messages, ("\n\n".join([*blocks, prompt_with_cue(item)]), f" {item.answer}")
    )


def prompt_with_cue(item: NamedSetItem) -> str:
    """The prompt as running text, closed by its cue."""
    return f"{item.prompt}\n{item.cue}" if item.cue else item.prompt
