"""What is cut when an example is longer than max_length: the oldest turns, then the left of
prompts. Never an answer.

Of a prompt that is far longer only both ends are ever tokenised (``cut_text_middle``); the tokens
that are kept are the same.
"""

from __future__ import annotations

import re
from dataclasses import replace

from lorry.data.encoding.chat import locate_message
from lorry.data.encoding.chat_template.template import ChatTemplate
from lorry.data.encoding.tokens import MarkedTokens, TextTokenizer
from lorry.data.reading.content import ChatMessage

# characters of a tail per token that may be kept; words have about five, runs of white space more
CUT_REACH = 64
CUT_WINDOW = 4096  # characters within which two readings of a text have to meet
# where every tokenizer begins a new word: a space between a letter or mark and a letter
ACROSS = re.compile(r"\S\s+\S")
WORD_START = re.compile(r"(?<=\S) (?=[^\W\d_])")


def split_text_tokens(ids: list[int], max_length: int) -> list[list[int]]:
    """Cut a text; each piece repeats the last token of the one before, so that every token but the
    first is learnt once.
    """
    return [ids[start : start + max_length] for start in range(0, len(ids) - 1, max_length - 1)]


def cut_prompt_tokens(marked: MarkedTokens, head: int, over: int) -> MarkedTokens | None:
    """Without ``over`` tokens of the prompt, taken behind the first ``head`` (the BOS); None when
    that is not enough.

    One token has to stand before the answer for it to be learnt whole.
    """
    if over > marked.learnt.index(True) - max(head, 1):
        return None
    return MarkedTokens(
        marked.ids[:head] + marked.ids[head + over :],
        marked.learnt[:head] + marked.learnt[head + over :],
    )


def cut_text_middle(tokens: TextTokenizer, text: str, max_length: int) -> tuple[str, int]:
    """A text that is far longer than ``max_length`` tokens without a middle whose tokens nobody
    will keep, and the characters that went: its last ``max_length`` tokens, and those at its
    beginning, are those of the whole text.

    The text as it is, and 0, where it is not far longer and where that cannot be shown: two tails
    that begin at different words must have the same tokens from ``CUT_WINDOW`` characters behind
    the later beginning on. A tokenizer reads words from left to right, so two readings that meet
    stay together; one whose pieces reach further (a single word of megabytes) does not pass.
    """
    reach = max_length * CUT_REACH + 3 * CUT_WINDOW
    head = WORD_START.search(text, CUT_WINDOW // 8, CUT_WINDOW) if len(text) >= 2 * reach else None
    first = WORD_START.search(text, len(text) - reach) if head else None
    second = (
        WORD_START.search(text, first.start() + CUT_WINDOW // 8, first.start() + CUT_WINDOW)
        if first
        else None
    )
    if head is None or first is None or second is None:
        return text, 0
    shown = text[: head.start()] + text[first.start() :]
    longer, shorter = tokens.ids_and_ends(shown), tokens.ids_and_ends(text[second.start() :])
    counted = sum(end > CUT_WINDOW for end in shorter[1])
    if counted < max_length or counted > len(longer[0]):
        return text, 0
    starts = [0, *longer[1][:-1]]
    if any(ACROSS.search(shown[start:end]) for start, end in zip(starts, longer[1], strict=True)):
        return (
            text,
            0,
            # tokens longer than a word can keep two readings out of step for as long as the text
            # repeats itself
        )
    shift = len(shown) - (len(text) - second.start())
    alike = longer[0][-counted:] == shorter[0][-counted:]
    if not alike or longer[1][-counted:] != [end + shift for end in shorter[1][-counted:]]:
        return text, 0
    return shown, len(text) - len(shown)


def cut_longest_middle(
    tokens: TextTokenizer, messages: tuple[ChatMessage, ...], max_length: int
) -> tuple[tuple[ChatMessage, ...], int]:
    """The messages, of the longest that is no answer without the middle that ``cut_longest`` would
    cut anyway; and the characters that went. As they are where another one could be cut as well."""
    prompts = [at for at, message in enumerate(messages) if message.role != "assistant"]
    longest = max(prompts, key=lambda at: len(messages[at].content), default=-1)
    if longest < 0 or messages[longest].unlearnt:
        return messages, 0
    text, skipped = cut_text_middle(tokens, messages[longest].content, max_length)
    others = sum(len(message.content) for at, message in enumerate(messages) if at != longest)
    if not skipped or others >= len(text):
        return messages, 0
    return (
        *messages[:longest],
        replace(messages[longest], content=text),
        *messages[longest + 1 :],
    ), skipped


def drop_oldest_exchange(messages: tuple[ChatMessage, ...]) -> tuple[ChatMessage, ...]:
    """Without the first exchange (a system message stays); the same messages when only one exchange
    is left.
    """
    first = 1 if messages[0].role == "system" else 0
    later = [at for at, message in enumerate(messages) if message.role == "user" and at > first]
    return messages[:first] + messages[later[0] :] if later else messages


def cut_longest(
    template: ChatTemplate, tokens: TextTokenizer, messages: tuple[ChatMessage, ...], over: int
) -> tuple[ChatMessage, ...]:
    """Cut ``over`` tokens from the left of the longest message that is no answer (all of it when it
    has fewer).

    The same messages when there is nothing left to cut.
    """
    prompts = [
        at for at, message in enumerate(messages) if message.role != "assistant" and message.content
    ]
    if not prompts:
        return messages
    longest = max(prompts, key=lambda at: len(messages[at].content))
    text = template.render(messages).text
    start, end = locate_message(template, messages, longest, text)
    inside = [edge for edge in tokens.ids_and_ends(text)[1] if start < edge <= end]
    tail = text[inside[over - 1] : end] if over <= len(inside) else ""
    return (*messages[:longest], replace(messages[longest], content=tail), *messages[longest + 1 :])


def end_of_supervised(marked: MarkedTokens) -> int:
    """One behind the last supervised token."""
    return len(marked.learnt) - marked.learnt[::-1].index(True) if any(marked.learnt) else 0
