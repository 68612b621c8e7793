"""An item as a conversation: what training learns and generation answers, with worked examples before it.

Try: ``conversation(item, shots=[other]).plain`` is the running text for a tokenizer that has no chat template.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorry.data.catalog.item import Item
from lorry.data.reading.content import Conversation, Message


def conversation(item: Item, shots: Sequence[Item] = ()) -> Conversation:
    """Chat turns, the shots first as earlier turns; ``plain`` is (blocks of text that close with the cue, " answer")."""
    turns = [message for shot in shots for message in (Message("user", shot.prompt), Message("assistant", shot.answer))]
    blocks = [f"{cued(shot)} {shot.answer}" for shot in shots]
    messages = (*turns, Message("user", item.prompt), Message("assistant", item.answer))
    return Conversation(messages, ("\n\n".join([*blocks, cued(item)]), f" {item.answer}"))


def cued(item: Item) -> str:
    """The prompt as running text, closed by its cue."""
    return f"{item.prompt}\n{item.cue}" if item.cue else item.prompt
