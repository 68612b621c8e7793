"""Examples to tokens and loss weights: the one place that decides what is learnt and what is cut.

    encoder = ExampleEncoder(tokenizer, max_length=1024)
    encoder.encode(Conversation((ChatMessage("user", "Hi"), ChatMessage("assistant", "Hello"))))    # [EncodedSequence(tokens, weights)]

``weights[t]`` is the weight of token t as a target, so the first is always 0. Of a chat or a prompt
with completion the answers are learnt, each with its end of turn; of a text everything, with the
end of text behind it. The end is learnt because of where it stands, not by its id: a padding token
that is the same id changes nothing. Text that is rendered already: `rendered.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorry.data.encoding.chat import CharSpan, RenderedChat, render_chat
from lorry.data.encoding.chat_template.template import (
    PLAIN_TEMPLATE,
    RESERVED_CHARACTERS,
    ChatTemplate,
    TemplateRefusedError,
    special_token_texts,
)
from lorry.data.encoding.cut import (
    cut_longest,
    cut_longest_middle,
    cut_prompt_tokens,
    cut_text_middle,
    drop_oldest_exchange,
    end_of_supervised,
    split_text_tokens,
)
from lorry.data.encoding.rendered import RenderedTextDetector
from lorry.data.encoding.tokens import MarkedTokens, TextTokenizer
from lorry.data.reading.bad_rows import BadRow
from lorry.data.reading.content import ChatMessage, Conversation, ExampleContent, TextDocument
from lorry.errors import ConfigError, DataError, ModelError

# the kind of a sound row whose answer does not fit: dropped with a count, not an error
TOO_LONG = "too long"
# tries to hit max_length when a prompt is cut; each lands within a few tokens of it
MOST_CUT_ROUNDS = 8


@dataclass(frozen=True)
class EncodedSequence:
    """Tokens and their weights as targets, of equal length. ``cut`` counts the prompt tokens that
    were left out, ``skipped`` the characters among them that were not even tokenised."""

    tokens: list[int]
    weights: list[float]
    cut: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class _RenderedDraft:
    """A rendered example. ``opener``: the text before each span; ``unlearnt``: characters of the
    spans that are not learnt; ``messages`` and ``template`` of a chat, of which ``last`` learns the
    last answer only; ``opened``, ``closed``: BOS, EOS go around it; ``whole``: all of it is learnt;
    ``skipped``: characters of the prompt that are left out beforehand.
    """

    text: str
    spans: Sequence[CharSpan]
    opener: str = ""
    unlearnt: Sequence[CharSpan] = ()
    messages: tuple[ChatMessage, ...] = ()
    template: ChatTemplate | None = None
    last: bool = False
    opened: bool = False
    closed: bool = False
    whole: bool = False
    skipped: int = 0


class ExampleEncoder:
    """Encodes conversations and texts for one tokenizer.

    ``completion_only_loss=False`` supervises every token but the first. ``system`` is put before
    chats that have no system message of their own. ``variables`` go to the chat template;
    ``chat=False`` leaves it aside, as if there were none. ``notes`` counts what was adjusted, in
    words. ``embeddings``: rows of the model's embedding table; a token beyond them makes a bad row
    (a DataError of ``prompt``). ``tell``: where to say how far the reading of a large source is. A
    prompt or text that the template has rendered already is recognised by how it begins and not
    wrapped again; a control token in the middle of a text makes no rendered chat of it. Raises
    ModelError for a template or tokenizer that cannot be used, ConfigError for max_length < 2.
    """

    def __init__(
        self, tokenizer: Any, *, max_length: int, completion_only_loss: bool = True, system: str | None = None,
        variables: Mapping[str, Any] | None = None, chat: bool = True, embeddings: int | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        self.embeddings, self.tell = embeddings, tell
        if max_length < 2:
            raise ConfigError(
                f"max_length={max_length}: the first token of a sequence has no loss; set 2 or more"
            )
        self.tokenizer, self.max_length, self.completion_only_loss, self.system = (
            tokenizer,
            max_length,
            completion_only_loss,
            system,
        )
        self.tokens = TextTokenizer(tokenizer)
        # without a template of its own a plain one stands in, so that chats can be laid out at all
        own = ChatTemplate.of(tokenizer, variables) if chat else None
        opening = {
            "opening": tokenizer.decode(self.tokens.opening),
            "eos_token": tokenizer.eos_token or "",
        }
        self.has_template = own is not None
        self.template = own or ChatTemplate.from_source(PLAIN_TEMPLATE, tokenizer, opening)
        self._end_of_turn = (
            self.tokens.one(self.template.end_of_turn).ids if self.template.end_of_turn else []
        )
        opener = str(opening["opening"])
        # whether the template writes BOS itself: then the tokenizer's would be a second one
        shown = [ChatMessage("user", "?"), ChatMessage("assistant", "!")]
        self._template_opens = bool(opener) and self.template.render(
            shown
        ).text.lstrip().startswith(opener.strip())
        self.notes: Counter[str] = Counter()
        self.rendered = RenderedTextDetector(
            tokenizer, self.template, self.notes, template_is_own=self.has_template, opener=opener
        )

    def identity(self) -> str:
        """All that decides what this encoder makes of a row, as text; "" for a tokenizer that
        cannot be written down.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            return ""
        settings = [
            self.max_length,
            self.completion_only_loss,
            self.system,
            self.embeddings,
            self.has_template,
        ]
        special = self.tokenizer.special_tokens_map
        parts = [
            settings,
            self.template.source,
            self.template.variables,
            special,
            self.tokens.opening,
            self.tokens.end,
        ]
        # what Python's half of a tokenizer decides (split_special_tokens ...) is in none of its
        # files' JSON: read a sample
        sample = " ".join(
            ("Über  12,345", *special_token_texts(self.tokenizer), "\n\n<|x|> 漢字🙂", "end.")
        )
        # of one that stands in for transformers', the class that this would be
        kind = getattr(self.tokenizer, "class_name", None) or type(self.tokenizer).__qualname__
        parts += [kind, self.tokens.ids_and_ends(sample)]
        try:
            text = json.dumps(parts, sort_keys=True, default=str)
        except TypeError:  # variables for the template with keys of several types
            return ""
        return f"{text} {self.tokenizer.backend_tokenizer.to_str()}"

    def encode(self, content: ExampleContent) -> list[EncodedSequence] | BadRow:
        """``encode_many`` for one example."""
        return self.encode_many([content])[0]

    def encode_many(
        self, contents: Sequence[ExampleContent]
    ) -> list[list[EncodedSequence] | BadRow]:
        """Encode each example, or say why it cannot be.

        One sequence each, but for a text longer than max_length, which is cut into several, and a
        chat with turns that the template writes differently later on, which get sequences of their
        own.
        """
        drafts = [self._drafts(content) for content in contents]
        # one call of the tokenizer for all: a fast one works on them in parallel
        sound = [
            draft
            for row_drafts in drafts
            if not isinstance(row_drafts, BadRow)
            for draft in row_drafts
        ]
        columns = (
            [draft.text for draft in sound],
            [draft.spans for draft in sound],
            [draft.opener for draft in sound],
        )
        marked = iter(self.tokens.many(*columns, [draft.unlearnt for draft in sound]))
        return [
            row_drafts
            if isinstance(row_drafts, BadRow)
            else self._together([self._known(self._finish(d, next(marked))) for d in row_drafts])
            for row_drafts in drafts
        ]

    def prompt(self, conversation: Conversation) -> list[int]:
        """The tokens to generate the last answer from, as training puts them before it.

        Raises DataError when the chat template does not take the conversation, or the model has no
        row for a token.
        """
        try:
            ids = self._prompt(conversation)
        except TemplateRefusedError as error:
            raise DataError(str(error)) from error
        self.expect_known(ids)
        return ids

    def expect_known(self, ids: Sequence[int]) -> None:
        """Raise DataError, naming the token, for one that the model has no embedding of."""
        if reason := self._unknown(ids):
            raise DataError(reason)

    def _unknown(self, ids: Sequence[int]) -> str:
        """Why the model cannot read these tokens, "" when it can."""
        if self.embeddings is None or not ids or max(ids) < self.embeddings:
            return ""
        # the first one is named: a whole prompt of them would say no more
        first = next(token for token in ids if token >= self.embeddings)
        text = self.tokenizer.decode([first], skip_special_tokens=False)
        return (
            f"the token {text!r} (id {first}) is beyond the model's embedding table "
            f"of {self.embeddings} rows; use this model's own tokenizer, or a model "
            "with resized embeddings"
        )

    def _known(self, sequences: list[EncodedSequence] | BadRow) -> list[EncodedSequence] | BadRow:
        if self.embeddings is None or isinstance(sequences, BadRow):
            return sequences
        reason = next(filter(None, (self._unknown(piece.tokens) for piece in sequences)), "")
        return BadRow("vocabulary", reason) if reason else sequences

    def _prompt(self, conversation: Conversation) -> list[int]:
        if rendered := self.rendered.split_rendered(conversation, self.system):
            ids = self.tokens.one(rendered[0]).ids
            return self._opened(ids) if self._template_opens else ids
        # all but the answer that is to be generated
        messages = self._prepared(conversation)[:-1]
        if conversation.plain and not self.has_template:
            return self._opened(self.tokens.one(self._plain_prompt(conversation)).ids)
        template = self.template.with_tools(conversation.tools)
        template.expect_tools_shown(messages)
        earlier: Sequence[CharSpan] = ()
        # earlier answers are tokenised as in training
        if any(message.role == "assistant" for message in messages):
            earlier = render_chat(template, messages).spans
        return self.tokens.one(template.prompt(messages), earlier, template.header).ids

    def stop_tokens(self) -> list[int]:
        """Ids at which generation has to stop: the tokenizer's EOS and the template's end of turn."""
        # several tokens cannot stop a generation that looks at one at a time
        turn = self._end_of_turn if len(self._end_of_turn) == 1 else []
        return sorted({*([self.tokens.end] if self.tokens.end is not None else []), *turn})

    def marked_text(self, encoded: EncodedSequence) -> list[tuple[str, bool]]:
        """The example as runs of text, each with whether it is supervised; for a person to look at."""
        runs: list[tuple[list[int], bool]] = []
        for token, weight in zip(encoded.tokens, encoded.weights, strict=True):
            if not runs or runs[-1][1] != bool(weight):
                runs.append(([], bool(weight)))
            runs[-1][0].append(token)
        return [
            (self.tokenizer.decode(ids, skip_special_tokens=False), learnt) for ids, learnt in runs
        ]

    def _drafts(self, content: ExampleContent) -> list[_RenderedDraft] | BadRow:
        try:
            if isinstance(content, TextDocument):
                return [self._text(content.text)]
            self._note_turns(content)
            if content.tools and not self.has_template:
                raise TemplateRefusedError(
                    "the row has tools, but the tokenizer has no chat template to render them"
                )
            if content.plain and not self.has_template:
                whole, answer = self._plain_prompt(content), content.plain[1]
                prompt, skipped = cut_text_middle(self.tokens, whole, self.max_length)
                spans, last_line = (
                    [(len(prompt), len(prompt) + len(answer))],
                    (prompt.splitlines(keepends=True) or [""])[-1],
                )
                return [
                    _RenderedDraft(
                        prompt + answer, spans, last_line, opened=True, closed=True, skipped=skipped
                    )
                ]
            if rendered := self.rendered.split_rendered(content, self.system):
                return [self._rendered_draft(*rendered)]
            messages, skipped = cut_longest_middle(
                self.tokens, self._prepared(content), self.max_length
            )
            template = self.template.with_tools(content.tools)
            template.expect_tools_shown(messages)
            chat = self._laid_out(template, messages)
            # where all is learnt there is no prompt to write an answer anew behind
            stale = chat.stale if self.completion_only_loss else ()
            own = [
                self._chat(
                    template,
                    messages[: at + 1],
                    self._laid_out(template, messages[: at + 1]),
                    last=True,
                )
                for at in stale
            ]
            if own:
                self.notes[
                    (
                        "the chat template rewrites earlier answers; each is trained "
                        "on in a chat that ends with it"
                    )
                ] += 1
            drafts = [*own, self._chat(template, messages, chat, last=False)]
            return [replace(draft, skipped=skipped) for draft in drafts] if skipped else drafts
        except TemplateRefusedError as error:
            return BadRow("template", str(error))

    def _laid_out(self, template: ChatTemplate, messages: tuple[ChatMessage, ...]) -> RenderedChat:
        return render_chat(template, messages, everything=not self.completion_only_loss)

    def _text(self, text: str) -> _RenderedDraft:
        """A text with BOS and EOS around it, each put only where the text does not bring its own."""
        opened = closed = True
        if self.rendered.control_tokens.search(text):
            rendered = self.rendered.begins_rendered(
                text, self.template.written_header.strip() in text
            )
            kind = (
                "are chats that are rendered already, trained on as a whole"
                if rendered
                else "hold control tokens of the tokenizer"
            )
            advice = " (format messages trains on the answers only)" if rendered else ""
            self.notes[f"texts {kind}; no second BOS or end of text was added{advice}"] += 1
            ends = (self.template.end_of_turn if rendered else "", self.tokenizer.eos_token)
            if any(end and text.rstrip().endswith(end) for end in ends):
                text, closed = text.rstrip(), False
            opened = self._template_opens or not rendered
        return _RenderedDraft(text, [(0, len(text))], opened=opened, closed=closed, whole=True)

    def _rendered_draft(self, prompt: str, answer: str) -> _RenderedDraft:
        """The example of a prompt that was rendered elsewhere: BOS where the template writes it,
        one end of turn.
        """
        turn = self.template.end_of_turn if len(self._end_of_turn) == 1 else ""
        prompt, skipped = cut_text_middle(self.tokens, prompt, self.max_length)
        text = prompt + answer + turn
        spans, opened = [(len(prompt), len(text))], self._template_opens
        return _RenderedDraft(
            text, spans, self.template.header, opened=opened, closed=not turn, skipped=skipped
        )

    def _together(
        self, parts: list[list[EncodedSequence] | BadRow]
    ) -> list[EncodedSequence] | BadRow:
        """The sequences of one example; it is a bad row when none of them can be used."""
        # a chat whose early answers do not fit still teaches its last one
        pieces = [piece for part in parts if not isinstance(part, BadRow) for piece in part]
        bad = [part for part in parts if isinstance(part, BadRow)]
        if pieces and bad:
            self.notes["some answers of a chat were left out: too long for max_length"] += 1
        return pieces or bad[0]

    def _plain_prompt(self, conversation: Conversation) -> str:
        prompt = conversation.plain[0] if conversation.plain else ""
        return (
            f"{self.system}\n\n{prompt}"
            if self.system and conversation.messages[0].role != "system"
            else prompt
        )

    def _note_turns(self, conversation: Conversation) -> None:
        """Count what of the turns' keys neither the template nor the weights take."""
        for key in sorted({key for message in conversation.messages for key in message.unread}):
            self.notes[f"turns have the key {key!r}, which is ignored"] += 1
        if any(message.name for message in conversation.messages):
            nameless = tuple(replace(message, name="") for message in conversation.messages)
            template = self.template.with_tools(conversation.tools)
            if (
                not self.has_template
                or template.render(nameless).text == template.render(conversation.messages).text
            ):
                self.notes["turns have the key 'name', which the chat template does not show"] += 1

    def _chat(
        self,
        template: ChatTemplate,
        messages: tuple[ChatMessage, ...],
        chat: RenderedChat,
        last: bool,
    ) -> _RenderedDraft:
        """A chat ready for the tokenizer; without an end of turn that can stop generation it gets
        the end of text.
        """
        if not chat.spans:
            raise TemplateRefusedError(
                "the chat template marks no answer of this conversation as a generation"
            )
        spans = chat.spans[-1:] if last else chat.spans
        answer_text = chat.text[spans[-1][0] : spans[-1][1]]
        if messages[-1].content.strip() not in answer_text:
            self.notes[
                "the chat template changes or shortens the answer itself, a thought for example"
            ] += 1
        if chat.ended and len(self._end_of_turn) == 1:
            return _RenderedDraft(
                chat.text, spans, template.header, chat.unlearnt, messages, template, last
            )
        missing = (
            "the end of a turn is several tokens"
            if chat.ended
            else "no end of turn after the last answer"
        )
        self.notes[f"the chat template writes {missing}; the end of text was added"] += 1
        text = chat.text[: spans[-1][1]]
        return _RenderedDraft(
            text, spans, template.header, chat.unlearnt, messages, template, last, closed=True
        )

    def _prepared(self, conversation: Conversation) -> tuple[ChatMessage, ...]:
        """The messages up to the last learnt answer (what follows teaches nothing), with the system
        message where it can be.
        """
        messages = list(conversation.messages)
        # formats refuse rows without a learnt answer, so this ends
        while messages[-1].role != "assistant" or not messages[-1].learnt:
            messages.pop()
        if any(RESERVED_CHARACTERS.search(message.content) for message in messages):
            raise TemplateRefusedError(
                "the text holds one of the Unicode noncharacters U+FDD0 to U+FDD2, "
                "which Lorry reserves"
            )
        if self.system and messages[0].role != "system":
            messages.insert(0, ChatMessage("system", self.system))
        bare = [self.rendered.without_header(message) for message in messages]
        for message in bare:
            self.rendered.refuse_rendered(message)
        return tuple(self.rendered.without_end(message) for message in bare)

    def _finish(
        self, draft: _RenderedDraft, marked: MarkedTokens
    ) -> list[EncodedSequence] | BadRow:
        """Put BOS and EOS around, cut to max_length, and turn marks into weights."""
        marked = self._dressed(draft, marked)
        if draft.whole:
            return self._pieces(marked.ids)
        cut, full = (
            0,
            len(marked.ids) if not self.completion_only_loss else end_of_supervised(marked),
        )
        if full > self.max_length:
            shortened = (
                self._shortened_chat(draft)
                if draft.messages
                else self._shortened_plain(draft, marked)
            )
            if isinstance(shortened, BadRow):
                return shortened
            marked, cut = shortened, full - self._length(shortened)
        if self.completion_only_loss:
            # behind the last answer nothing is learnt and nothing depends on it: not worth
            # computing
            ids, weights = (
                marked.ids[: end_of_supervised(marked)],
                [float(is_learnt) for is_learnt in marked.learnt[: end_of_supervised(marked)]],
            )
        else:
            ids, weights = marked.ids, [1.0] * len(marked.ids)
        weights = (
            [0.0 if number in marked.barred else weight for number, weight in enumerate(weights)]
            if marked.barred
            else weights
        )
        # nothing stands before the first token that could predict it
        weights[:1] = [0.0]
        if not any(weights):
            return BadRow(
                "no answer",
                ("no token of the answer can be trained on: there is no token before it"),
            )
        return [EncodedSequence(ids, weights, cut, draft.skipped)]

    def _dressed(self, draft: _RenderedDraft, marked: MarkedTokens) -> MarkedTokens:
        ids, learnt = marked.ids, marked.learnt
        if draft.opened:
            ids = self._opened(ids)
            learnt = [False] * (len(ids) - len(learnt)) + learnt
        if draft.closed:
            if self.tokens.end is None:
                raise ModelError(
                    "the tokenizer has no eos_token, so the model could not learn "
                    "to stop; set eos_token"
                )
            # a row that brings its own end ends once
            if ids[-1:] != [self.tokens.end]:
                ids, learnt = [*ids, self.tokens.end], [*learnt, True]
        # barred tokens are of chats, which get no BOS in front
        return MarkedTokens(ids, learnt, marked.barred)

    def _opened(self, ids: list[int]) -> list[int]:
        """With the tokenizer's BOS in front, once."""
        opening = self.tokens.opening
        return ids if ids[: len(opening)] == opening else [*opening, *ids]

    def _pieces(self, ids: list[int]) -> list[EncodedSequence] | BadRow:
        if len(ids) < 2:
            return BadRow(
                "empty answer", "the text is a single token, so there is nothing to train on"
            )
        return [
            EncodedSequence(piece, [0.0] + [1.0] * (len(piece) - 1))
            for piece in split_text_tokens(ids, self.max_length)
        ]

    def _shortened_plain(
        self, draft: _RenderedDraft, marked: MarkedTokens
    ) -> MarkedTokens | BadRow:
        # BOS stays: models go wrong without it
        head = len(self.tokens.opening) if draft.opened else 0
        return cut_prompt_tokens(marked, head, len(marked.ids) - self.max_length) or self._too_long(
            sum(marked.learnt), max(head, 1)
        )

    def _shortened_chat(self, draft: _RenderedDraft) -> MarkedTokens | BadRow:
        """Leave out the oldest turns, then cut the longest prompt messages from the left, until the
        last answer fits whole.
        """
        messages, template = draft.messages, draft.template or self.template
        try:
            # whole exchanges first: a question cut in half is worse than one left out
            while len(shorter := drop_oldest_exchange(messages)) < len(messages):
                messages = shorter
                if (
                    self._length(fitted := self._drafted(template, messages, draft.last))
                    <= self.max_length
                ):
                    return fitted
            # tokens of a shortened text are not those of its part, so each cut is measured anew
            for _ in range(MOST_CUT_ROUNDS * len(messages)):
                marked = self._drafted(template, messages, draft.last)
                over = self._length(marked) - self.max_length
                if over <= 0:
                    return marked
                shorter = cut_longest(template, self.tokens, messages, over)
                if shorter == messages:
                    return self._too_long(*self._sizes(marked))
                messages = shorter
        except TemplateRefusedError as error:
            return BadRow(
                "template", f"{error} (after its prompt was cut to max_length={self.max_length})"
            )
        return self._too_long(*self._sizes(marked))

    def _sizes(self, marked: MarkedTokens) -> tuple[int, int]:
        """(tokens of the last answer, tokens before it that are left when everything that may be
        cut is).
        """
        end = end_of_supervised(marked)
        start = end - marked.learnt[:end][::-1].index(False) if False in marked.learnt[:end] else 0
        return end - start, self._length(marked) - (end - start)

    def _drafted(
        self, template: ChatTemplate, messages: tuple[ChatMessage, ...], last: bool
    ) -> MarkedTokens:
        draft = self._chat(template, messages, self._laid_out(template, messages), last)
        return self._dressed(
            draft, self.tokens.one(draft.text, draft.spans, draft.opener, draft.unlearnt)
        )

    def _length(self, marked: MarkedTokens) -> int:
        return end_of_supervised(marked) if self.completion_only_loss else len(marked.ids)

    def _too_long(self, answer: int, fixed: int) -> BadRow:
        """``answer`` tokens with ``fixed`` others that cannot be cut away."""
        if answer + fixed <= self.max_length:
            return BadRow(
                TOO_LONG,
                (
                    f"its prompt could not be cut to max_length={self.max_length} in "
                    f"{MOST_CUT_ROUNDS} rounds per message"
                ),
            )
        what = (
            "the chat template and the turns that cannot be cut"
            if self.has_template
            else "its beginning"
        )
        return BadRow(
            TOO_LONG,
            (
                f"the answer of {answer} tokens with {fixed} more for {what} is longer "
                f"than max_length={self.max_length}; {answer + fixed} would be enough"
            ),
        )
