"""Where in a rendered chat the assistant speaks: the characters that are learnt, found without a {% generation %} block.

The place of an answer is found by rendering the chat once more with the answer replaced by a probe character: what both
renderings share before and after it is not the answer. That stays exact when a template trims, cuts thinking out of
earlier turns or adds to the turn. From there the supervised span grows

* to the left as far as the assistant's header (``<|im_start|>assistant\\n``): at inference the generation prompt ends
  there, so whatever the template writes behind it, such as ``<think>``, the model has to write itself;
* to the right over the end of turn (``<|im_end|>``), which stops generation and therefore must be learnt. A line break
  after it is left out: generation has stopped, the model never writes it.

A template's own {% generation %} blocks, where it has them, decide where a span starts and are checked against the probe.

Some templates write a turn differently once the chat goes on (Qwen3 takes the thoughts out, Mistral moves the system
message). Learning such a turn inside the longer chat would teach what is never generated there, so it is told apart: its
number goes to ``Chat.stale``, and it has to be learnt in a rendering of its own that ends with it.

An answer that is not to be learnt (weight 0) is laid out like any other, so that it is tokenised like any other; its
characters are in ``Chat.unlearnt``, and the encoder gives their tokens weight 0. Where the whole chat is learnt
(completion_only_loss=false) the same holds for every other turn that its row keeps from being learnt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorry.data.encoding.chat_template.template import (
    PROBE_CHARACTER,
    ChatTemplate,
    RenderedTemplate,
    TemplateRefusedError,
    common_prefix,
)
from lorry.data.reading.content import ChatMessage

CharSpan = tuple[int, int]


@dataclass(frozen=True)
class RenderedChat:
    """A rendered chat: ``spans`` are the supervised characters, in order; ``ended``: the last
    answer has its end of turn; ``stale``: numbers of the messages that are answers but were not
    written as they are when they are generated; ``unlearnt``: characters that the row's own marks
    (weight 0, train_detail) keep from being learnt.
    """

    text: str
    spans: tuple[CharSpan, ...]
    ended: bool
    stale: tuple[int, ...] = ()
    unlearnt: tuple[CharSpan, ...] = ()


def render_chat(
    template: ChatTemplate, messages: Sequence[ChatMessage], *, everything: bool = False
) -> RenderedChat:
    """Render a chat and find its answers; with ``everything``, which is then learnt, also other
    turns that are not to be.

    Raises TemplateRefusal when the template or this search does not take the chat.
    """
    rendered = template.render(messages)
    spans: list[CharSpan] = []
    stale: list[int] = []
    unlearnt: list[CharSpan] = []
    ended, used = False, 0
    for index, message in enumerate(messages):
        if message.role != "assistant":
            # a question is never learnt otherwise, so its marks have nothing to change
            if everything and not message.learnt:
                start, end = locate_message(template, messages, index, rendered.text)
                unlearnt.append((start, _with_end_of_turn(template, rendered.text, end)[0]))
            continue
        answer = locate_message(template, messages, index, rendered.text)
        block = _generation_block(rendered, answer)
        # blocks that no answer claims are counted at the end: they would be lost without a word
        used += block is not None
        end, ended = _with_end_of_turn(template, rendered.text, answer[1])
        # the chat up to here is what the model writes; does the longer one still begin with it?
        if index < len(messages) - 1 and not template.render(messages[: index + 1]).text.startswith(
            rendered.text[:end]
        ):
            stale += [index] if message.learnt else []
            unlearnt += (
                _unlearnt_spans(message, rendered.text, answer, (answer[0], end))
                if everything
                else []
            )
            continue
        begin = _answer_start(template, rendered, answer, block, spans[-1][1] if spans else 0)
        if begin is not None:
            spans.append((begin, end))
        # an unmarked turn is learnt only where everything is
        if begin is not None or everything:
            unlearnt += _unlearnt_spans(
                message, rendered.text, answer, (answer[0] if begin is None else begin, end)
            )
    if used != len(rendered.blocks):
        raise TemplateRefusedError(
            "a {% generation %} block of the chat template marks text outside the assistant turns"
        )
    return RenderedChat(rendered.text, tuple(spans), ended, tuple(stale), tuple(unlearnt))


def _unlearnt_spans(
    message: ChatMessage, text: str, answer: CharSpan, whole: CharSpan
) -> list[CharSpan]:
    """The characters of an answer's span that its marks keep from being learnt. Raises
    TemplateRefusal if they cannot be told.
    """
    if not message.learnt:
        return [whole]
    if not message.unlearnt:
        return []
    answer_text = text[answer[0] : answer[1]]
    # a template may trim an answer, which moves the characters that its marks count
    shift = message.content.find(answer_text)
    if shift < 0 or message.content[:shift].strip():
        raise TemplateRefusedError(
            "the chat template changes an answer that has train_detail, so its "
            "characters cannot be located"
        )
    moved = (
        (max(start - shift, 0), min(end - shift, len(answer_text)))
        for start, end in message.unlearnt
    )
    return [(answer[0] + start, answer[0] + end) for start, end in moved if start < end]


def locate_message(
    template: ChatTemplate, messages: Sequence[ChatMessage], index: int, text: str
) -> CharSpan:
    """The characters of ``text`` that come from message ``index``. Raises TemplateRefusal when they
    cannot be told.
    """
    if (known := template.framed_span(messages, index, text)) is not None:
        return known
    changed = [*messages]
    # without the thoughts: a template may move them, and the probe is to stand for all of the turn
    changed[index] = replace(messages[index], content=PROBE_CHARACTER, reasoning="")
    probed = template.render(changed).text
    at = probed.find(PROBE_CHARACTER)
    if at < 0 or probed.count(PROBE_CHARACTER) > 1:
        raise TemplateRefusedError(
            f"the chat template shows message {index + 1} {'more than once' if at >= 0 else 'not at all'}"
        )
    # an answer that opens as the probe's surroundings do would push the common prefix too far
    start = at if text.startswith(probed[:at]) else common_prefix(text, probed)
    tail = probed[at + 1 :]
    if not text.endswith(tail) or len(text) - len(tail) < start:
        raise TemplateRefusedError(
            f"the chat template changes other parts of the chat depending on message {index + 1}"
        )
    return start, len(text) - len(tail)


def _with_end_of_turn(template: ChatTemplate, text: str, end: int) -> tuple[int, bool]:
    """Move the end of an answer behind its end of turn (and the white space before that), if it has
    one.
    """
    if not template.end_of_turn:
        return end, False
    # white space belongs to the answer: the model has to write it before it may stop
    match = re.compile(r"\s*" + re.escape(template.end_of_turn)).match(text, end)
    return (match.end(), True) if match else (end, False)


def _generation_block(rendered: RenderedTemplate, answer: CharSpan) -> CharSpan | None:
    """The {% generation %} block around an answer. Raises TemplateRefusal when a block holds only a
    part of it.
    """
    for start, end in rendered.blocks:
        if start <= answer[0] and answer[1] <= end:
            return start, end
        if start < answer[1] and answer[0] < end:
            raise TemplateRefusedError(
                "a {% generation %} block of the chat template holds only a part of an answer"
            )
    return None


def _answer_start(
    template: ChatTemplate,
    rendered: RenderedTemplate,
    answer: CharSpan,
    block: CharSpan | None,
    after: int,
) -> int | None:
    """Where the assistant's own words start, or None for a turn that the template's author left
    unmarked on purpose.
    """
    if answer[0] == answer[1]:
        raise TemplateRefusedError("the chat template drops an answer")
    if rendered.blocks:
        return block[0] if block else None
    # the last one before the answer: an earlier answer may quote the header
    header = rendered.text.rfind(template.header, after, answer[0])
    if header < 0:
        raise TemplateRefusedError(
            f"the chat template opens an assistant turn without its header {template.header!r}"
        )
    return header + len(template.header)
