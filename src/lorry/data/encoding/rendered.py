"""Text that the chat template has rendered already: recognised by how it begins, and taken as it is.

    rendered = RenderedTextDetector(tokenizer, template, notes)
    rendered.split_rendered(conversation, system=None)      # (prompt, answer), or None for plain turns

A second chat around such a text would teach a model turns inside of turns, and no loss would show
it. A control token in the middle says nothing: people ask about them. What cannot be told apart for
certain is refused with TemplateRefusedError, which becomes a bad row.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

from lorry.data.encoding.chat_template.template import (
    ChatTemplate,
    TemplateRefusedError,
    special_token_texts,
)
from lorry.data.reading.content import ChatMessage, Conversation

ALREADY_RENDERED = "the prompt is rendered by the chat template already"
AS_MESSAGES = "give plain text or messages instead"


class RenderedTextDetector:
    """What ``template``, a tokenizer's own, writes around turns, and where a text holds it already.
    ``template_is_own`` False: the tokenizer has none, so nothing can be rendered. ``notes`` counts
    what was adjusted, in words; ``control_tokens`` finds the tokenizer's special tokens in a text.
    """

    def __init__(
        self, tokenizer: Any, template: ChatTemplate, notes: Counter[str], *, template_is_own: bool, opener: str
    ) -> None:  # fmt: skip
        self.has_template, self.template, self.notes = template_is_own, template, notes
        self._eos = tokenizer.eos_token
        specials = special_token_texts(tokenizer)
        # the longest first: one may begin as another does
        self.control_tokens = re.compile(
            "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or "(?!)"
        )
        self._bos = [bos for bos in (opener.strip(), tokenizer.bos_token) if bos]
        # of an opening only the first line: what follows it may be a default system message, or
        # today's date
        starts = {
            (self._without_bos(start).splitlines() or [""])[0].strip()
            for start in self.template.openings
        }
        self._openings = (
            tuple(sorted(start for start in starts if start)) if self.has_template else ()
        )
        # no other character begins a rendered text
        self._begins = {start[0] for start in (*self._bos, *self._openings)}
        self._header = self.template.written_header.strip()
        self._header_is_control = self.has_template and bool(
            self.control_tokens.search(self._header)
        )

    def begins_rendered(self, text: str, closed: bool) -> bool:
        """Whether a text begins as the chat template begins a chat, white space and BOS aside.

        A control token in the middle says nothing: people ask about them. An opening without a
        control token (``[INST]`` as plain text) counts only with ``closed``: the assistant's header
        stands where it belongs.
        """
        if text.lstrip()[:1] not in self._begins:
            return False
        begun = self._without_bos(text)
        return any(
            begun.startswith(start) and (closed or self.control_tokens.search(start))
            for start in self._openings
        )

    def split_rendered(
        self, conversation: Conversation, system: str | None
    ) -> tuple[str, str] | None:
        """(prompt up to the assistant's header, answer) of a question that the chat template has
        rendered already, else None. ``system``: a message that would go before it.

        It is known by how it begins. Raises TemplateRefusedError where a system message, tools or
        marks of what is learnt would have to go into it, where its last question does not end, and
        where a format's own column stands behind it.
        """
        turns = [message for message in conversation.messages if message.role != "system"]
        header, question = self.template.written_header.strip(), self.template.question_header
        if not self.has_template or [turn.role for turn in turns] != ["user", "assistant"]:
            return None
        prompt, answer = turns[0].content, self.without_header(turns[1]).content
        if not self.begins_rendered(prompt, bool(header) and prompt.rstrip().endswith(header)):
            return None
        if system or conversation.tools or len(turns) < len(conversation.messages):
            raise TemplateRefusedError(
                "the prompt is rendered by the chat template already, so no system message and no tools can be put into it; "
                "leave them out, or give the prompt as plain text or messages"
            )
        if any(turn.unlearnt or not turn.learnt for turn in turns):
            raise TemplateRefusedError(
                f"{ALREADY_RENDERED}, so its turns' weight, train or train_detail "
                f"cannot be applied; {AS_MESSAGES}"
            )
        self._refuse_further_turns(answer)
        at = prompt.rfind(header) if header else len(prompt)
        # or the answer brought it
        missing = bool(header) and at <= (prompt.rfind(question) if question else -1)
        if missing and not prompt.rstrip().endswith(self.template.question_end):
            raise TemplateRefusedError(
                f"{ALREADY_RENDERED}, but the end of its last question is missing; {AS_MESSAGES}"
            )
        # of several columns, as alpaca's
        composed = conversation.plain is not None and conversation.plain[0] != prompt
        if composed and not missing and prompt[at:].removeprefix(header).strip():
            raise TemplateRefusedError(
                f"{ALREADY_RENDERED}, and another column follows the assistant's "
                f"header; {AS_MESSAGES}"
            )
        self.notes[
            "prompts are rendered by the chat template already; the template was not applied again"
        ] += 1
        if missing:
            prompt, at = f"{prompt}{self.template.written_header}", len(prompt)
            answer = answer.lstrip("\n") if self.template.written_header.endswith("\n") else answer
        # white space behind the header as the template has it
        if not prompt[at:].removeprefix(header).strip():
            prompt = prompt[:at] + self.template.written_header.lstrip()
        return prompt, self._bare(answer)

    def without_header(self, message: ChatMessage) -> ChatMessage:
        """An answer without the assistant's header that it brings itself: the template writes it.
        Raises TemplateRefusedError.
        """
        header = self._header
        if message.role != "assistant" or not self._header_is_control:
            return message
        if not (text := self._without_bos(message.content)).startswith(header):
            return message
        if message.unlearnt:
            raise TemplateRefusedError(
                "an answer with train_detail holds the chat template's header; remove the header"
            )
        self.notes[
            ("answers hold the chat template's header; it was removed, since the template adds it")
        ] += 1
        text = text.removeprefix(header)
        return replace(
            message,
            content=text.lstrip("\n") if self.template.written_header.endswith("\n") else text,
        )

    def without_end(self, message: ChatMessage) -> ChatMessage:
        """An answer that already ends with the end of turn or of text would end twice."""
        if self.control_tokens.search(message.content):
            for end in (self.template.end_of_turn, self._eos):
                if end and message.role == "assistant" and message.content.rstrip().endswith(end):
                    return self.without_end(
                        replace(message, content=message.content.rstrip().removesuffix(end))
                    )
            self.notes[
                "messages hold control tokens of the tokenizer as text; they are read as control tokens"
            ] += 1
        return message

    def refuse_rendered(self, message: ChatMessage) -> None:
        """Raise TemplateRefusedError for a turn that would get a second turn around it."""
        if not self.has_template:
            return
        if message.role == "assistant":
            self._refuse_further_turns(message.content)
            return
        closed = self._header_is_control and message.content.rstrip().endswith(self._header)
        if closed or self.begins_rendered(message.content, closed):
            raise TemplateRefusedError(
                f"a turn of the {message.role} is rendered by the chat template already; {AS_MESSAGES}"
            )

    def _refuse_further_turns(self, answer: str) -> None:
        """Raise TemplateRefusedError for an answer in which the rendered chat goes on: its questions
        would be learnt.
        """
        question, turn = self.template.question_header, self.template.end_of_turn
        if question and turn and question in answer.partition(turn)[2]:
            raise TemplateRefusedError(
                f"the answer contains another rendered question; {AS_MESSAGES}"
            )

    def _bare(self, answer: str) -> str:
        """An answer without the ends of turn and of text behind it. Raises TemplateRefusedError when
        nothing is left.
        """
        ends = [end for end in (self.template.end_of_turn, self._eos) if end]
        while end := next((end for end in ends if answer.rstrip().endswith(end)), ""):
            answer = answer.rstrip().removesuffix(end)
        if not answer.strip():
            raise TemplateRefusedError(
                "the answer is only an end of turn, so there is nothing to train on"
            )
        return answer

    def _without_bos(self, text: str) -> str:
        text = text.lstrip()
        while bos := next((bos for bos in self._bos if text.startswith(bos)), ""):
            text = text.removeprefix(bos).lstrip()
        return text
