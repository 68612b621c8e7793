"""A tokenizer's chat template, rendered in the sandbox, and what Lorry learns about it from a few
probing renderings.

    template = ChatTemplate.of(tokenizer)
    template.render([{"role": "user", "content": "hi"}], add_generation_prompt=True).text

What is learnt, once per template: the *header* that opens an assistant turn, the *end of turn* that
the assistant has to write to be heard no more, and whether system messages are taken.
``lorry.data.encoding.chat`` finds the answers with it. A row's tools go to the template as
transformers' ``apply_chat_template(messages, tools=...)`` gives them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import jinja2
from jinja2.sandbox import SecurityError

from lorry.data.encoding.chat_template.frame import (
    TEMPLATE_FAULTS,
    TemplateFrame,
    find_template_frame,
)
from lorry.data.encoding.chat_template.sandbox import (
    GENERATION_CLOSE,
    GENERATION_OPEN,
    LONGEST_SOURCE,
    TemplateSandbox,
)
from lorry.data.reading.content import ChatMessage
from lorry.errors import ModelError

# shapes without a frame after which no more are tried: the template looks at texts
PROBE_ATTEMPTS = 8
SHAPES_KEPT = 256  # shapes of conversations whose frames are kept
# stands in for a message while its place is looked for; a Unicode noncharacter, never real text
PROBE_CHARACTER = "\ufdd0"
RESERVED_CHARACTERS = re.compile(f"[{PROBE_CHARACTER}{GENERATION_OPEN}{GENERATION_CLOSE}]")

# For a tokenizer without a template: headed paragraphs that need no special token but the end of
# text.
PLAIN_TEMPLATE = (
    "{{ opening }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n{% elif m.role == 'user' %}"
    "### Instruction:\n{{ m.content }}\n\n{% else %}### Response:\n{{ m.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)


class TemplateRefusedError(Exception):
    """The template does not render this conversation; the message is the template's own reason."""


@dataclass(frozen=True)
class RenderedTemplate:
    """Text, and the (start, end) characters of its {% generation %} blocks (none when the template
    has no such block).
    """

    text: str
    blocks: tuple[tuple[int, int], ...] = ()


class ChatTemplate:
    """A compiled template with the variables a tokenizer gives it (bos_token, eos_token ...).

    header: text that ends just where the assistant starts to write; written_header: it from the
    start of a control token of which it holds a part; end_of_turn: what the assistant writes last,
    "" when the template has none; question_header: what opens a user's turn, "" when it holds no
    control token; question_end: what a question ends with before the header; openings: what
    rendered chats begin with; tools: what the template gets as such; takes_system: False when
    system messages are refused or dropped; notes: what a user of this template should know. Raises
    ModelError for a template that does not compile, cannot render a plain exchange, or tries what a
    template must not.
    """

    def __init__(
        self, source: str, variables: Mapping[str, Any], special_tokens: Sequence[str] = ()
    ) -> None:
        self.source, self.variables = source, dict(variables)
        self.notes: list[str] = []
        self.tools: list[Any] | None = None
        self.takes_system, self._forgets_header = True, False
        self._sandbox = TemplateSandbox()
        # roles of the chats seen once; a frame is made for the second one, since many shapes come
        # once
        self._shapes: set[tuple[str, ...]] = set()
        self._frames: dict[tuple[str, ...], TemplateFrame | None] = {}
        # the order matters: each probe below renders with what the ones before it have found
        self._compiled = self._compile(source)
        self.header, self.end_of_turn, self.question_header = self._learn(special_tokens)
        self.takes_system = self._learn_system()
        self.openings, self.written_header, self.question_end = self._learn_question(special_tokens)

    @classmethod
    def of(cls, tokenizer: Any, variables: Mapping[str, Any] | None = None) -> ChatTemplate | None:
        """The tokenizer's own template, or None when it has none; ``variables`` go to the template
        (enable_thinking ...).
        """
        source = getattr(tokenizer, "chat_template", None)
        if isinstance(source, Mapping):
            # Hugging Face keeps several templates by name, the first one for lack of a "default"
            source = source.get("default") or next(iter(source.values()))
        return cls.from_source(source, tokenizer, variables) if source else None

    @classmethod
    def from_source(
        cls, source: str, tokenizer: Any, variables: Mapping[str, Any] | None = None
    ) -> ChatTemplate:
        """A template of this source with the tokenizer's special tokens as variables."""
        special = {
            name: value
            for name, value in tokenizer.special_tokens_map.items()
            if isinstance(value, str)
        }
        return cls(source, special | dict(variables or {}), special_token_texts(tokenizer))

    def with_tools(self, tools: str) -> ChatTemplate:
        """This template with a list of tools (JSON, "" for none) for every rendering."""
        if not tools:
            return self
        # shares what was compiled and learnt; only the tools differ
        bound = copy(self)
        bound.tools = json.loads(tools)
        return bound

    def expect_tools_shown(self, messages: Sequence[ChatMessage]) -> None:
        """Raise TemplateRefusal where the template writes the same without the tools: the model
        would never see them.
        """
        if self.tools is None:
            return
        without = copy(self)
        without.tools = None
        if without.render(messages).text == self.render(messages).text:
            raise TemplateRefusedError(
                "the row has tools, which the chat template does not show; use a template that does"
            )

    def render(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = False
    ) -> RenderedTemplate:
        """The conversation as text. Raises TemplateRefusal (this row) or ModelError (a hostile
        template).
        """
        # the chat is what the template can show, not what it would drop in silence
        if not self.takes_system:
            messages = _fold_system_message(messages)
        if (
            self.tools is None
            and (framed := self._framed(messages, add_generation_prompt)) is not None
        ):
            return (
                _strip_generation_marks(framed)
                if GENERATION_OPEN in framed
                else RenderedTemplate(framed)
            )
        # what a template may spend grows with what it was given
        size = sum(len(message.content) + len(message.reasoning) for message in messages)
        size += len(json.dumps(self.tools)) if self.tools else 0
        self._sandbox.budget.open(size, len(messages))
        try:
            marked = self._compiled.render(
                self.variables,
                messages=[_message_values(m) for m in messages],
                tools=self.tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        # no fault of the row: the next one would be stopped, too
        except (SecurityError, MemoryError) as error:
            raise ModelError(
                f"the chat template was stopped: {error}; train only with a template you trust"
            ) from error
        except TEMPLATE_FAULTS as error:
            raise TemplateRefusedError(
                f"the chat template refuses this conversation: {_refusal_reason(error)}"
            ) from error
        return (
            _strip_generation_marks(marked)
            if GENERATION_OPEN in marked
            else RenderedTemplate(marked)
        )

    def _framed(self, messages: Sequence[ChatMessage], prompting: bool) -> str | None:
        """The same rendering out of the frame of its shape; None where it has to be made."""
        if any(message.name or message.reasoning for message in messages):
            return None
        shape = (*(message.role for message in messages), "prompt" if prompting else "")
        if shape not in self._frames:
            # its first rendering is a real one, which names a hostile template
            if shape not in self._shapes:
                self._shapes |= {shape} if len(self._shapes) < SHAPES_KEPT else set()
                return None
            # a template that has no frames costs a proof a shape; a few failures are enough to know
            if list(self._frames.values()).count(None) >= PROBE_ATTEMPTS:
                return None
            roles = shape[:-1]
            self._frames[shape] = find_template_frame(
                self.source, self.variables, roles, add_generation_prompt=prompting
            )
        frame = self._frames[shape]
        return None if frame is None else frame.fill([message.content for message in messages])

    def framed_span(
        self, messages: Sequence[ChatMessage], index: int, text: str
    ) -> tuple[int, int] | None:
        """The characters of ``text``, a rendering of the messages, that message ``index`` stands
        at, by the frame of their shape; None where there is no frame, the text is not what it
        gives, or the message stands there more than once.
        """
        frame = self._frames.get((*(message.role for message in messages), ""))
        if frame is None or self.tools is not None or not self.takes_system:
            return None
        return frame.span([message.content for message in messages], index, text)

    def prompt(self, messages: Sequence[ChatMessage]) -> str:
        """The text to generate an answer from; ends with the assistant's header, also where the
        template forgets it.
        """
        return self.render(messages, add_generation_prompt=True).text + (
            self.header if self._forgets_header else ""
        )

    def _compile(self, source: str) -> jinja2.Template:
        if len(source) > LONGEST_SOURCE:
            raise ModelError(
                f"the chat template has {len(source)} characters; {LONGEST_SOURCE} are allowed"
            )
        try:
            return self._sandbox.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"the chat template is not valid: line {error.lineno}: {error.message}"
            ) from error
        except (*TEMPLATE_FAULTS, MemoryError) as error:
            raise ModelError(
                f"the chat template does not compile: {_refusal_reason(error)}"
            ) from error

    def _learn(self, special_tokens: Sequence[str]) -> tuple[str, str, str]:
        """Header, end of turn and header of a question, from one question and one answer that are
        the probe character.
        """
        question, answer = ChatMessage("user", "?"), ChatMessage("assistant", PROBE_CHARACTER)
        try:
            prompt = self.render([question]).text
            opened = self.render([question], add_generation_prompt=True).text
            full = self.render([question, answer]).text
        except TemplateRefusedError as error:
            raise ModelError(
                f"the chat template cannot render one question and one answer: {error}"
            ) from error
        at = full.find(PROBE_CHARACTER)
        if at < 0:
            raise ModelError(
                "the chat template does not render the assistant's answers, so it "
                "cannot be used for training"
            )
        header = self._header(prompt, opened, full[:at])
        return (
            header,
            _find_end_of_turn(full[at + 1 :], special_tokens),
            self._question_header(special_tokens),
        )

    def _question_header(self, special_tokens: Sequence[str]) -> str:
        """What the template puts before a second question, from its last control token on; "" where
        there is none.
        """
        exchange = [
            ChatMessage("user", "?"),
            ChatMessage("assistant", "!"),
            ChatMessage("user", PROBE_CHARACTER),
        ]
        try:
            before = self.render(exchange).text.partition(PROBE_CHARACTER)[0]
        except TemplateRefusedError:
            return ""
        # where the last control token begins; of plain text nobody could say that it opens a turn
        starts = [at for token in special_tokens if (at := before.rfind(token)) >= 0]
        header = before[max(starts) :].strip() if starts else ""
        if header in special_tokens:  # Llama 3's and Phi's role stands between or in control tokens
            between = before[: max(starts)]
            earlier = [
                (at, at + len(token))
                for token in special_tokens
                if (at := between.rfind(token)) >= 0
            ]
            if earlier and (role := between[max(earlier)[1] :].strip()) and "!" not in role:
                header = before[max(earlier)[0] :].strip()
        return header

    def _learn_question(self, special_tokens: Sequence[str]) -> tuple[tuple[str, ...], str, str]:
        """What rendered chats begin with, the assistant's header with its first control token
        whole, what stands before it.

        Phi 3's header is found as ``assistant|>``: its opening ``<|`` it has in common with the end
        of text.
        """
        starts, tail = [self.question_header], ""
        for chat in (
            [ChatMessage("user", PROBE_CHARACTER)],
            [ChatMessage("system", PROBE_CHARACTER), ChatMessage("user", "?")],
        ):
            try:
                before, _, after = self.render(chat, add_generation_prompt=True).text.partition(
                    PROBE_CHARACTER
                )
            except TemplateRefusedError:
                continue
            starts.append(before)
            tail = tail or after
        # where the header begins; a control token may reach into it from before
        at = len(tail.removesuffix(self.header))
        cut = [
            begin
            for token in special_tokens
            if (begin := tail.find(token, max(at - len(token) + 1, 0))) in range(at)
        ]
        begin = min(cut, default=at)
        openings = tuple(start.strip() for start in starts if start.strip())
        return openings, tail[begin:at] + self.header, tail[:begin].strip()

    def _header(self, prompt: str, opened: str, before: str) -> str:
        """What stands between the user's turn and the assistant's own words, as far as a generation
        prompt gives it.
        """
        # the part of the training text that inference also gives the model
        written = common_prefix(opened, before)
        if opened == prompt and before[written:].strip():
            self._forgets_header = True
            self.notes.append(
                "the chat template ignores add_generation_prompt; the assistant's "
                "header was found from its turns"
            )
            return before[common_prefix(prompt, before) :]
        if opened[written:]:
            self.notes.append(
                f"the generation prompt ends with {opened[written:]!r}, which training rows lack"
            )
        # what a chat without and one with a generation prompt share is not header
        start = min(common_prefix(prompt, opened), written)
        # a template without a header (Llama 2's "[INST] ? [/INST]") is known by what follows the
        # question
        return before[start:written] or before[before.rfind("?", 0, written) + 1 : written]

    def _learn_system(self) -> bool:
        try:
            shown = self.render(
                [
                    ChatMessage("system", PROBE_CHARACTER),
                    ChatMessage("user", "?"),
                    ChatMessage("assistant", "!"),
                ]
            ).text
        except TemplateRefusedError:
            shown = ""
        if PROBE_CHARACTER not in shown:
            self.notes.append(
                "the chat template has no system message; it is put before the first user message"
            )
        return PROBE_CHARACTER in shown


def _fold_system_message(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """A leading system message put in front of the first user message."""
    if messages[0].role != "system":
        return [*messages]
    system, rest = messages[0].content, [*messages[1:]]
    first = next((at for at, message in enumerate(rest) if message.role == "user"), None)
    if first is None:
        raise TemplateRefusedError(
            "the chat template has no system message, and there is no user message to put it before"
        )
    rest[first] = replace(rest[first], content=f"{system}\n\n{rest[first].content}")
    return rest


def special_token_texts(tokenizer: Any) -> list[str]:
    """The texts that the tokenizer reads as control tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return sorted(
        {*tokenizer.all_special_tokens, *(str(token) for token in added.values() if token.special)}
    )


def common_prefix(text: str, other: str) -> int:
    """Characters that both start with."""
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if text[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _message_values(message: ChatMessage) -> dict[str, str]:
    """The message as templates know it, made of plain values only."""
    values = {"role": message.role, "content": message.content}
    if message.name:
        values["name"] = message.name
    return (
        values | {"reasoning_content": message.reasoning, "thinking": message.reasoning}
        if message.reasoning
        else values
    )


def _find_end_of_turn(tail: str, special_tokens: Sequence[str]) -> str:
    """The text up to and with the first special token after the answer; else a single closing word;
    else nothing.
    """
    ends = [tail.find(token) + len(token) for token in special_tokens if token in tail]
    if ends:
        return tail[: min(ends)].lstrip()
    word = tail.strip()
    return word if word and len(word.split()) == 1 else ""


def _strip_generation_marks(marked: str) -> RenderedTemplate:
    """Take the generation marks out and keep where they stood."""
    parts, blocks, at, opened = [], [], 0, 0
    for piece in re.split(f"([{GENERATION_OPEN}{GENERATION_CLOSE}])", marked):
        if piece == GENERATION_OPEN:
            opened = at
        elif piece == GENERATION_CLOSE:
            blocks.append((opened, at))
        else:
            parts.append(piece)
            at += len(piece)
    return RenderedTemplate("".join(parts), tuple(blocks))


def _refusal_reason(error: BaseException) -> str:
    return (
        f"{type(error).__name__}: {error}"
        if not isinstance(error, jinja2.TemplateError)
        else str(error)
    )
