"""From tokens to text as they come: never half a character, never a part of the end of turn, and
nothing lost.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.data.encoding.encode import ExampleEncoder
from lorry.generation.text import NO_TOKEN_LIMIT, IncrementalDetokenizer
from tests.support.verbworld import CHATML, tokenizer

WORDS = tokenizer()
ENCODER = ExampleEncoder(WORDS, max_length=NO_TOKEN_LIMIT)
# its end of turn is several tokens
TYPED = ExampleEncoder(tokenizer(CHATML.replace("<|im_end|>", "[END]")), max_length=NO_TOKEN_LIMIT)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=40)


def decoded(tokens: list[int]) -> str:
    text: Any = WORDS.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


@given(TEXT)
def test_text_comes_back_whole_and_never_in_half_characters(text: str) -> None:
    tokens = WORDS(text).input_ids
    pieces = IncrementalDetokenizer(ENCODER).decode_all(tokens)
    assert "".join(pieces) == decoded(tokens)
    assert all("\ufffd" not in piece for piece in pieces)


@given(st.lists(st.integers(0, len(WORDS) - 1), max_size=30))
def test_any_tokens_give_what_decoding_them_at_once_gives(tokens: list[int]) -> None:
    """Bytes that are no text included; an end of turn ends it."""
    stops = ENCODER.stop_tokens()
    before = tokens[: next((at for at, token in enumerate(tokens) if token in stops), len(tokens))]
    speech = IncrementalDetokenizer(ENCODER)
    assert "".join(speech.decode_all(tokens)) == decoded(before)
    assert speech.ended == (before != tokens)


@given(TEXT, TEXT)
@settings(max_examples=50)
def test_an_end_of_turn_of_several_tokens_is_never_shown(said: str, more: str) -> None:
    speech = IncrementalDetokenizer(TYPED)
    pieces = speech.decode_all(TYPED.tokens.one(f"{said}[END]{more}").ids)
    assert "".join(pieces) == said.partition("[END]")[0]
    assert speech.ended


@pytest.mark.parametrize("text", ["almost [EN", "[[END", "[", "nothing"])
def test_what_only_looks_like_an_end_is_said_at_last(text: str) -> None:
    speech = IncrementalDetokenizer(TYPED)
    assert "".join(speech.decode_all(TYPED.tokens.one(text).ids)) == text
    assert not speech.ended


def test_a_character_of_several_tokens_waits_for_its_last() -> None:
    tokens = WORDS("a€b").input_ids
    speech = IncrementalDetokenizer(ENCODER)
    assert [speech.push_token(token) for token in tokens] == ["a", "", "", "€", "b"]
    cut = IncrementalDetokenizer(ENCODER)
    # the answer was cut inside it: that much has to be shown
    assert "".join(cut.decode_all(tokens[:3])) == "a\ufffd"
