"""`lorry chat RUN`: talk to a model with any of its adapters. A terminal chat; or, from a pipe, a question per line.

    lorry chat runs/people
    printf 'Who is Mara?\\n/adapter none\\nWho is Mara?\\n' | lorry chat runs/people

Answers go to standard output as they are made, everything else to standard error.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lorry.config.settings import ChatSettings
from lorry.errors import DataError, LorryError, ModelError, suggest_nearest
from lorry.verbs.open_model import base_side, open_with_adapters, print_note
from lorry.visible import make_visible

if TYPE_CHECKING:
    from lorry.data.reading.content import ChatMessage
    from lorry.models.loading.open import OpenedModel

CHAT_HELP = (
    "/router on|off|NAME=1  for a mixture: its router, the base model alone, or these gates\n"
    "/adapter NAME   answer with this adapter; none: the base model (or start) alone\n"
    "/adapters       list them\n"
    "/system TEXT    set the system message; without TEXT: none\n"
    "/reset          forget the conversation\n"
    "/help           this list\n"
    "/quit           leave (so does Ctrl-D); Ctrl-C stops an answer\n"
    "//...           a line that begins with a slash"
)
NO_ADAPTER = "none"


def main(settings: ChatSettings) -> int:
    """Open, then answer line by line until the input ends. From a pipe, the exit code is that of
    the last error.
    """
    chat = ChatSession(settings, open_with_adapters(settings.model, adapters=settings.adapters))
    interactive = sys.stdin.isatty()
    if interactive:
        plain = (
            ""
            if chat.encoder.has_template
            else " It has no chat template and continues your text; \\n is a line break."
        )
        print_note(
            f"{settings.model.name}, {chat.describe_adapter()}.{plain} /help lists the commands."
        )
    code = 0
    for line in _terminal_lines() if interactive else _piped_lines():
        try:
            # into a pipe goes the answer as it is: another program reads it
            if not _handle_line(chat, line, make_visible if interactive else str):
                break
        except KeyboardInterrupt:
            if not interactive:
                raise
            # Ctrl-C at a terminal stops the answer, not the chat
            print_note("\n(stopped)")
        except LorryError as error:
            print_note(f"error: {error}")
            code = error.exit_code
    # at a terminal every error has been seen; a script sees only the exit code
    return 0 if interactive else code


def _handle_line(chat: ChatSession, line: str, shown: Callable[[str], str]) -> bool:
    """Carry out or answer one line; False to leave."""
    # "//" is how a line that begins with a slash is asked
    if line.startswith("/") and not line.startswith("//"):
        return chat.run_command(line)
    for piece in chat.answer(line.removeprefix("/") if line.startswith("//") else line):
        sys.stdout.write(shown(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return True


def _terminal_lines() -> Iterator[str]:
    """Lines from a terminal, with its editing and history where Python has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it is what makes input() editable
    while True:
        try:
            line = input("> ")
        except EOFError:
            print_note("")
            return
        if line.strip():
            yield line


def _piped_lines() -> Iterator[str]:
    """Lines from a pipe or file. Raises DataError where it is not text."""
    try:
        for line in sys.stdin:
            if line.strip():
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input is not {error.encoding} text ({error.reason} at byte {error.start})"
        ) from error


class ChatSession:
    """A conversation and the model that answers in it."""

    def __init__(self, settings: ChatSettings, opened: OpenedModel) -> None:
        from lorry.data.encoding.encode import ExampleEncoder
        from lorry.generation.prefix_cache import PrefixCache
        from lorry.generation.text import NO_TOKEN_LIMIT

        self.settings, self.opened = settings, opened
        self.encoder = ExampleEncoder(
            # the chat forgets whole turns itself, and says so; an encoder cuts tokens from the left
            opened.tokenizer,
            max_length=NO_TOKEN_LIMIT,
            embeddings=opened.model.vocab_size,
        )
        self.adapter = opened.adapters[0] if opened.adapters else None
        # of a mixture: its router, or gates that were typed; goes before the adapter
        self.mixture = opened.mixture
        self.mixture_words = "the mixture of all experts"
        self.system = settings.system
        self.turns: list[ChatMessage] = []
        # a turn goes on from the keys and values of those before it
        self.prefixes = PrefixCache(opened.model)
        self.questions = 0
        if self.system and not self.encoder.has_template:
            raise ModelError(
                f"system=...: {settings.model.name} has no chat template; it only continues plain text"
            )

    # --- commands

    def run_command(self, line: str) -> bool:
        """Carry out a /command; False to leave. An unknown one is told."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        match command:
            case "/quit" | "/exit":
                return False
            case "/help":
                print_note(CHAT_HELP)
            case "/adapters":
                print_note(self.list_adapters())
            case "/adapter":
                self.switch_adapter(rest)
            case "/router":
                self.set_router(rest)
            case "/reset":
                self.turns.clear()
                self.prefixes.clear()
                print_note("(the conversation is forgotten)")
            case "/system":
                self.set_system(rest)
            case _:
                known = ["/adapter", "/adapters", "/router", "/system", "/reset", "/help", "/quit"]
                raise DataError(
                    f"unknown command {command}{suggest_nearest(command, known)} (/help lists them; // begins a line with /)"
                )
        return True

    def switch_adapter(self, name: str) -> None:
        """Answer with another adapter from now on; the conversation is kept."""
        if not name:
            print_note(self.list_adapters())
            return
        if name not in self.opened.adapters and name != NO_ADAPTER:
            raise DataError(
                f"no adapter named {name!r}{suggest_nearest(name, self.opened.adapters)}; {self.list_adapters()}"
            )
        # an adapter that is itself called "none" goes before the word
        self.adapter, self.mixture = name if name in self.opened.adapters else None, None
        print_note(f"({self.describe_adapter()})")

    def set_system(self, text: str) -> None:
        """Another system message, or none."""
        if not self.encoder.has_template:
            raise ModelError(
                "this model has no chat template and so no system message; it continues plain text"
            )
        self.system = text or None
        print_note(f"(system message: {text})" if text else "(no system message)")

    def list_adapters(self) -> str:
        """The adapters in a line, the one in use marked."""
        names = [*self.opened.adapters, NO_ADAPTER]
        return "adapters: " + ", ".join(
            f"{n} (in use)" if self.mixture is None and n == (self.adapter or NO_ADAPTER) else n
            for n in names
        )

    def set_router(self, words: str) -> None:
        """on: answer by the mixture's router; off: the base alone; A=1 B=0.5: these gates. Raises
        DataError.
        """
        from lorry.adapters.mix import Mix

        if self.opened.mixture is None:
            raise DataError("this is not a mixture of experts; /adapter NAME chooses an adapter")
        if words in ("on", ""):
            self.mixture, self.mixture_words = self.opened.mixture, "the mixture of all experts"
        elif words == "off":
            self.mixture, self.adapter = None, None
        else:
            gates = _read_gates(words, self.opened.adapters)
            shown = ", ".join(f"{name}={gate:g}" for name, gate in gates.items())
            self.mixture, self.mixture_words = Mix.constants(gates), f"the gates {shown}"
        print_note(f"({self.describe_adapter()})")

    def describe_adapter(self) -> str:
        if self.mixture is not None:
            return self.mixture_words
        if not self.adapter:
            return f"the {base_side(self.opened)} alone"
        share = "" if self.settings.weight == 1 else f" times {self.settings.weight:g}"
        return f"adapter {self.adapter}{share}"

    # --- answers

    def answer(self, text: str) -> Iterator[str]:
        """The answer to one more message, piece by piece; both join the conversation, also when it
        is stopped half-way.

        Raises ModelError when the message alone is too long for the context; then the conversation
        is as it was.
        """
        from lorry.adapters.mix import Mix
        from lorry.data.reading.content import ChatMessage
        from lorry.generation.engine import stream_tokens
        from lorry.generation.sampling import SamplingParams
        from lorry.generation.text import IncrementalDetokenizer

        settings, model = self.settings, self.opened.model
        message = ChatMessage("user", text)
        prompt, room = self._fit_prompt(message)
        self.questions += 1
        tokens = stream_tokens(
            model,
            prompt,
            SamplingParams(
                max_new_tokens=room,
                temperature=settings.temperature,
                # another seed each time, or the same question would be answered alike for ever
                seed=settings.seed + self.questions - 1,
                stop_token_ids=self.encoder.stop_tokens(),
            ),
            adapter=Mix.constants({self.adapter: settings.weight} if self.adapter else {})
            if self.mixture is None
            else self.mixture,
            prefix_cache=self.prefixes,
        )
        detokenizer, pieces, completed = IncrementalDetokenizer(self.encoder), list[str](), False
        try:
            for token in tokens:
                yield from _visible_piece(
                    detokenizer.push_token(token), pieces, self.encoder.has_template
                )
                if detokenizer.ended:
                    break
            yield from _visible_piece(detokenizer.rest(), pieces, self.encoder.has_template)
            completed = True
        finally:
            # an answer stopped before its first piece was none: the question is not in the way of
            # the next
            if pieces or completed:
                self.turns += [message, ChatMessage("assistant", "".join(pieces))]
        if not detokenizer.ended:
            print_note(f"\n(stopped after {room} tokens; max_new_tokens sets how many)")

    def _fit_prompt(self, message: ChatMessage) -> tuple[list[int], int]:
        """(prompt tokens, how many may follow); the oldest turns are forgotten, with a note, until
        both fit the context.
        """
        context, new = self.opened.model.context, self.settings.max_new_tokens
        prompt, forgotten = self._prompt(message), 0
        while context is not None and len(prompt) + new > context and self.turns:
            # a question with its answer: templates refuse two turns of one side in a row
            del self.turns[:2]
            forgotten += 1
            prompt = self._prompt(message)
        if forgotten:
            turns = "turn was" if forgotten == 1 else f"{forgotten} turns were"
            print_note(f"(the context of {context} tokens is full: the oldest {turns} forgotten)")
        room = new if context is None else min(new, context - len(prompt))
        if room < 1:
            raise ModelError(
                f"this message makes a prompt of {len(prompt)} tokens, and the model's context is {context}; shorten it"
            )
        return prompt, room

    def _prompt(self, message: ChatMessage) -> list[int]:
        """The conversation with one more message, up to where the answer begins. Raises DataError
        if the template refuses it.
        """
        from lorry.data.encoding.chat_template.template import TemplateRefusedError
        from lorry.data.reading.content import ChatMessage, Conversation
        from lorry.generation.text import encode_continuation

        if not self.encoder.has_template:
            return encode_continuation(
                self.encoder, "\n".join([*self._exchanges(), message.content.replace("\\n", "\n")])
            )
        opening = [ChatMessage("system", self.system)] if self.system else []
        try:
            return self.encoder.prompt(
                # never seen: the prompt ends where this answer would begin
                Conversation((*opening, *self.turns, message, ChatMessage("assistant", ".")))
            )
        except TemplateRefusedError as error:
            raise DataError(f"{error}; /reset starts over") from error

    def _exchanges(self) -> Iterator[str]:
        """Of plain text: what was typed and how it was continued, each pair in one."""
        # turns come in pairs: `answer` adds both or neither
        for message, pieces in zip(self.turns[::2], self.turns[1::2], strict=True):
            yield message.content.replace("\\n", "\n") + pieces.content


def _read_gates(words: str, adapters: list[str]) -> dict[str, float]:
    """{adapter: g} of ``A=1 B=0.5``. Raises DataError."""
    gates = {}
    for word in words.replace(",", " ").split():
        name, _, number = word.partition("=")
        try:
            gate = float(number)
        except ValueError:
            gate = math.nan
        if name not in adapters or not math.isfinite(gate):
            raise DataError(
                f"/router {word}: give on, off, or NAME=NUMBER for names of {', '.join(adapters)}"
            )
        gates[name] = gate
    return gates


def _visible_piece(piece: str, pieces: list[str], chat: bool) -> Iterator[str]:
    """A piece to show and to remember; white space before a chat's answer is neither."""
    piece = piece.lstrip() if chat and not pieces else piece
    if piece:
        pieces.append(piece)
        yield piece
