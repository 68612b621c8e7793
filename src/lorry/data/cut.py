"""What is cut when an example is longer than max_length: the oldest turns, then the left of prompts. Never an answer."""

from __future__ import annotations

from dataclasses import replace

from lorry.data.chat import locate
from lorry.data.content import Message
from lorry.data.template import ChatTemplate
from lorry.data.tokens import Marked, Tokens


def text_pieces(ids: list[int], max_length: int) -> list[list[int]]:
    """Cut a text; each piece repeats the last token of the one before, so that every token but the first is learnt once."""
    return [ids[start : start + max_length] for start in range(0, len(ids) - 1, max_length - 1)]


def prompt_tokens(marked: Marked, head: int, over: int) -> Marked | None:
    """Without ``over`` tokens of the prompt, taken behind the first ``head`` (the BOS); None when that is not enough.

    One token has to stand before the answer for it to be learnt whole.
    """
    if over > marked.learnt.index(True) - max(head, 1):
        return None
    return Marked(marked.ids[:head] + marked.ids[head + over :], marked.learnt[:head] + marked.learnt[head + over :])


def without_oldest(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Without the first exchange (a system message stays); the same messages when only one exchange is left."""
    kept = 1 if messages[0].role == "system" else 0
    later = [at for at, message in enumerate(messages) if message.role == "user" and at > kept]
    return messages[:kept] + messages[later[0] :] if later else messages


def cut_longest(template: ChatTemplate, tokens: Tokens, messages: tuple[Message, ...], over: int) -> tuple[Message, ...]:
    """Cut ``over`` tokens from the left of the longest message that is no answer (all of it when it has fewer).

    The same messages when there is nothing left to cut.
    """
    prompts = [at for at, message in enumerate(messages) if message.role != "assistant" and message.content]
    if not prompts:
        return messages
    longest = max(prompts, key=lambda at: len(messages[at].content))
    text = template.render(messages).text
    start, end = locate(template, messages, longest, text)
    inside = [edge for edge in tokens.ends(text) if start < edge <= end]
    kept = text[inside[over - 1] : end] if over <= len(inside) else ""
    return (*messages[:longest], replace(messages[longest], content=kept), *messages[longest + 1 :])


def last_learnt(marked: Marked) -> int:
    """One behind the last supervised token."""
    return len(marked.learnt) - marked.learnt[::-1].index(True) if any(marked.learnt) else 0
