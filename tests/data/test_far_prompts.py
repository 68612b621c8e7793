"""Prompts that are far longer than max_length: their middle is never tokenised, and what is kept is
what the whole would give.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.data.encoding import cut
from lorry.data.encoding.cut import CUT_REACH, cut_text_middle
from lorry.data.encoding.encode import EncodedSequence, ExampleEncoder
from lorry.data.encoding.tokens import TextTokenizer
from lorry.data.reading.content import ChatMessage, Conversation

Tokenizers = Callable[..., Any]
LENGTH, WINDOW = 48, 512
KINDS = ["chatml", "gemma", "llama2", None]


@pytest.fixture(scope="module", autouse=True)
def small_window() -> Iterator[None]:
    """Texts of 14,000 characters are far enough then, and quick to read as a whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut, "CUT_WINDOW", WINDOW)
        yield


def far_text(seed: int, words: list[str], size: int = 3 * (LENGTH * CUT_REACH + 3 * WINDOW)) -> str:
    draw, made, length = random.Random(seed), list[str](), 0
    while length < size:
        made.append(draw.choice(words))
        length += len(made[-1]) + 1
    return " ".join(made)


PROSE = [
    *("the", "Fox:", "jumps\n\nover", "", "", "it's", "1234567", "dogs,", "don't\tstop!", "naïve"),
    *("Straße", "漢字", "über-lang", "x=1;", "🙂🙃", "end.\n"),
]
WORDS = st.lists(
    st.one_of(
        st.sampled_from(PROSE),
        st.text(st.sampled_from("abé漢🙂 \n\t.'<|1"), min_size=1, max_size=12),
    ),
    min_size=3,
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_kept_are_the_last_of_the_whole_text(
    kind: str | None, tokenizer_of: Tokenizers
) -> None:
    """Held against transformers' own reading of the whole."""
    tokenizer = tokenizer_of(kind)
    text = far_text(1, PROSE)
    shown, skipped = cut_text_middle(TextTokenizer(tokenizer), text, LENGTH)
    assert 0 < skipped == len(text) - len(shown)
    whole, ids = (tokenizer(one, add_special_tokens=False)["input_ids"] for one in (text, shown))
    assert ids[-LENGTH:] == whole[-LENGTH:]
    assert ids[:10] == whole[:10]


@settings(max_examples=25, deadline=None)
@given(words=WORDS, seed=st.integers(0, 99), kind=st.sampled_from(KINDS))
def test_whatever_the_text_is_the_tokens_are_those_of_the_whole(
    words: list[str], seed: int, kind: Any, tokenizer_of: Any
) -> None:
    tokenizer = tokenizer_of(kind)
    text = far_text(seed, words)
    shown, skipped = cut_text_middle(TextTokenizer(tokenizer), text, LENGTH)
    whole, ids = (tokenizer(one, add_special_tokens=False)["input_ids"] for one in (text, shown))
    assert ids[-LENGTH:] == whole[-LENGTH:]
    assert ids[:10] == whole[:10]
    assert skipped == len(text) - len(shown)


@pytest.mark.parametrize(
    "text",
    ["a" * 90_000, "漢字" * 45_000, " " * 90_000, "word " * 10],
    ids=["word", "han", "space", "short"],
)
def test_a_text_without_words_to_begin_at_is_read_whole(
    text: str, tokenizer_of: Tokenizers
) -> None:
    assert cut_text_middle(TextTokenizer(tokenizer_of("chatml")), text, LENGTH) == (text, 0)


def conversations() -> dict[str, Conversation]:
    far, short = far_text(2, PROSE), "Say it in one word."
    answer, unlearnt = ChatMessage("assistant", "Fox."), ChatMessage("assistant", far, learnt=False)
    return {
        "question": Conversation((ChatMessage("user", far), answer), plain=(far, "Fox.")),
        "system": Conversation((ChatMessage("system", far), ChatMessage("user", short), answer)),
        "both": Conversation((ChatMessage("system", short), ChatMessage("user", far), answer)),
        "two far": Conversation(
            (ChatMessage("system", far), ChatMessage("user", far[5000:]), answer)
        ),
        "earlier": Conversation(
            (
                ChatMessage("user", far),
                ChatMessage("assistant", "No."),
                ChatMessage("user", short),
                answer,
            )
        ),
        "later": Conversation(
            (
                ChatMessage("user", short),
                ChatMessage("assistant", "No."),
                ChatMessage("user", far),
                answer,
            )
        ),
        "weightless": Conversation(
            (ChatMessage("user", short), unlearnt, ChatMessage("user", far), answer)
        ),
    }


@pytest.mark.parametrize("only_answers", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", conversations())
def test_an_example_is_the_same_as_when_all_of_it_is_read(
    name: str,
    kind: Any,
    only_answers: bool,
    tokenizer_of: Tokenizers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one path against the other; that the shorter one reads as transformers does is held
    above.
    """
    tokenizer, content = tokenizer_of(kind), conversations()[name]

    def made() -> Any:
        return ExampleEncoder(
            tokenizer, max_length=LENGTH, completion_only_loss=only_answers
        ).encode(content)

    quick = made()
    monkeypatch.setattr(cut, "CUT_REACH", 1 << 30)
    whole = made()
    if not isinstance(whole, list):
        assert quick == whole
        return
    assert [(piece.tokens, piece.weights) for piece in quick] == [
        (piece.tokens, piece.weights) for piece in whole
    ]
    assert all(piece.skipped == 0 for piece in whole)


def test_what_was_never_tokenised_is_counted_in_characters(tokenizer_of: Tokenizers) -> None:
    tokenizer, content = tokenizer_of("chatml"), conversations()["question"]
    (piece,) = ExampleEncoder(tokenizer, max_length=LENGTH).encode(content)
    assert isinstance(piece, EncodedSequence)
    text = content.messages[0].content
    whole, kept = (
        len(tokenizer(part, add_special_tokens=False)["input_ids"])
        for part in (text, text[piece.skipped :])
    )
    assert 0 < piece.skipped < len(text)
    assert 0 < piece.cut < whole
    # what was skipped and what was cut is the text but for the tokens that are kept
    assert abs(kept - piece.cut - sum(weight == 0 for weight in piece.weights)) < 0.05 * kept


def test_tokens_that_cross_words_may_keep_two_readings_out_of_step() -> None:
    """Both tails of "b a a a a ..." read " a a" from their own beginning on; the whole reads it
    from its own.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {token: number for number, token in enumerate(["b", " ", "a", " a", " a a", "<eos>"])}
    bpe = models.BPE(vocab=vocab, merges=[(" ", "a"), (" a", " a")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe), eos_token="<eos>")
    text = "b" + " a" * 60001
    assert cut_text_middle(TextTokenizer(tokenizer), text, 16) == (text, 0)
