"""Weights, ends and cuts: what is learnt of plain text and prompts, and that an answer is never
cut.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from lorry.data.encoding.cut import cut_prompt_tokens
from lorry.data.encoding.encode import TOO_LONG, EncodedSequence, ExampleEncoder
from lorry.data.encoding.tokens import MarkedTokens
from lorry.data.reading.bad_rows import BadRow
from lorry.data.reading.content import ChatMessage, Conversation, ExampleContent, TextDocument
from lorry.data.reading.formats import detect_format, normalise_row
from lorry.errors import ConfigError, ModelError

Tokenizers = Callable[..., Any]
Prose = Callable[[int, int], str]


def with_bos(tokenizer: Any) -> Any:
    """The same tokenizer, putting a BOS before every text, as Llama's do."""
    made = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
    )  # fmt: skip
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", made.eos_token_id)]
    )
    return made


def encode_example(
    content: ExampleContent, tokenizer: Any, **settings: Any
) -> list[EncodedSequence] | BadRow:
    """One example, by an encoder of its own."""
    return ExampleEncoder(tokenizer, **settings).encode(content)


def only(made: list[EncodedSequence] | BadRow) -> EncodedSequence:
    assert not isinstance(made, BadRow), made
    assert len(made) == 1
    return made[0]


def row(**columns: Any) -> ExampleContent:
    content = normalise_row(columns, detect_format(columns))
    assert not isinstance(content, BadRow)
    return content


def marked(encoder: ExampleEncoder, made: EncodedSequence) -> str:
    return "".join(f"«{text}»" if learnt else text for text, learnt in encoder.marked_text(made))


MANY_TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "No"},
    {"role": "user", "content": "So"},
]
HEADED = "S\n\n### Instruction:\nHi\n\n### Response:\n«Yes<|endoftext|>»\n\n### Instruction:\nMore\n\n### Response:\n«No<|endoftext|>»"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": "Say: ", "completion": "kalo"}, "Say: «kalo<|endoftext|>»"),
        ({"prompt": "Say:", "completion": " kalo"}, "Say:« kalo<|endoftext|>»"),
        ({"prompt": "a\n\n", "completion": "\n\nkalo"}, "a\n\n«\n\nkalo<|endoftext|>»"),
        ({"question": "Who?", "answer": "Me"}, "Question: Who?\nAnswer:« Me<|endoftext|>»"),
        (
            {"instruction": "Do", "output": "ok"},
            "### Instruction:\nDo\n\n### Response:\n«ok<|endoftext|>»",
        ),
        ({"prompt": "p", "completion": " kalo<|endoftext|>"}, "p« kalo<|endoftext|>»"),
        ({"messages": MANY_TURNS}, HEADED),
    ],
)
def test_without_a_chat_template(
    tokenizer_of: Tokenizers, columns: dict[str, Any], expected: str
) -> None:
    """The end of text is learnt although it is also the padding token (eos == pad in this
    tokenizer).
    """
    tokenizer = tokenizer_of(None)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    encoder = ExampleEncoder(tokenizer, max_length=200)
    made = only(encoder.encode(row(**columns)))
    assert marked(encoder, made) == expected


@pytest.mark.parametrize("columns", [{"text": "kalo mi"}, {"prompt": "", "completion": "kalo mi"}])
def test_without_a_prompt_all_but_the_first_token_is_learnt(
    tokenizer_of: Tokenizers, columns: dict[str, Any]
) -> None:
    made = only(encode_example(row(**columns), tokenizer_of(None), max_length=200))
    assert tokenizer_of(None).decode(made.tokens) == "kalo mi<|endoftext|>"
    assert made.weights == [0.0] + [1.0] * (len(made.tokens) - 1)


@pytest.mark.parametrize(
    "text", ["kalo mi", "<|endoftext|>kalo mi", "<|endoftext|>kalo mi<|endoftext|>"]
)
def test_bos_and_eos_stand_once(tokenizer_of: Tokenizers, text: str) -> None:
    tokenizer = with_bos(tokenizer_of(None))
    bos = tokenizer.bos_token_id
    inside = tokenizer("kalo mi", add_special_tokens=False)["input_ids"]
    assert only(encode_example(TextDocument(text), tokenizer, max_length=99)).tokens == [
        bos,
        *inside,
        bos,
    ]
    made = only(
        encode_example(
            row(prompt=text.removesuffix("<|endoftext|>"), completion=" ra<|endoftext|>"),
            tokenizer,
            max_length=99,
        )
    )
    assert made.tokens.count(bos) == 2
    assert made.weights[0] == 0.0
    assert made.weights[-1] == 1.0


def test_the_prompt_is_tokenised_as_generation_meets_it(tokenizer_of: Tokenizers) -> None:
    """ "Answer: " + "yes": as a whole the space would join the answer's first token."""
    tokenizer = with_bos(tokenizer_of(None))
    encoder = ExampleEncoder(tokenizer, max_length=99)
    content = row(prompt="Say: ", completion="kalo")
    assert isinstance(content, Conversation)
    prompt = encoder.prompt(content)
    assert prompt == tokenizer("Say: ")["input_ids"]
    made = only(encoder.encode(content))
    assert made.tokens[: len(prompt)] == prompt
    assert made.weights == [0.0] * len(prompt) + [1.0] * (len(made.tokens) - len(prompt))


def test_all_tokens_when_completions_are_not_singled_out(tokenizer_of: Tokenizers) -> None:
    content = Conversation(
        (
            ChatMessage("user", "Hi"),
            ChatMessage("assistant", "Hello"),
            ChatMessage("user", "unanswered"),
        )
    )
    tokenizer = tokenizer_of("chatml")
    made = only(encode_example(content, tokenizer, max_length=99, completion_only_loss=False))
    assert made.weights == [0.0] + [1.0] * (len(made.tokens) - 1)
    assert (
        tokenizer.decode(made.tokens)
        == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    )


def test_all_tokens_of_a_long_chat_still_keep_the_answer(
    tokenizer_of: Tokenizers, prose: Prose
) -> None:
    content = Conversation((ChatMessage("user", prose(1, 80)), ChatMessage("assistant", "Hello")))
    for family in ("chatml", "qwen3", None):
        made = only(
            encode_example(content, tokenizer_of(family), max_length=40, completion_only_loss=False)
        )
        assert 30 < len(made.tokens) <= 40
        assert made.weights == [0.0] + [1.0] * (len(made.tokens) - 1)
        assert "Hello<|" in tokenizer_of(family).decode(made.tokens)
    turns = (*content.messages[1:], ChatMessage("user", "a"), ChatMessage("assistant", "b"))
    every = encode_example(
        Conversation((ChatMessage("user", "x"), *turns)),
        tokenizer_of("qwen3"),
        max_length=400,
        completion_only_loss=False,
    )
    assert not isinstance(every, BadRow)
    assert len(every) == 1


def test_a_default_system_message(tokenizer_of: Tokenizers) -> None:
    content = Conversation((ChatMessage("user", "Hi"), ChatMessage("assistant", "Hello")))
    own = Conversation((ChatMessage("system", "Mine"), *content.messages))
    for chat, family, expected in (
        (content, "chatml", "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi"),
        (own, "chatml", "<|im_start|>system\nMine<|im_end|>\n<|im_start|>user\nHi"),
        (content, "gemma", "<bos><start_of_turn>user\nBe kind\n\nHi"),
    ):
        made = only(encode_example(chat, tokenizer_of(family), max_length=99, system="Be kind"))
        assert tokenizer_of(family).decode(made.tokens).startswith(expected)
    plain = only(
        encode_example(
            row(question="Hi", answer="Hello"), tokenizer_of(None), max_length=99, system="Be kind"
        )
    )
    assert tokenizer_of(None).decode(plain.tokens).startswith("Be kind\n\nQuestion: Hi")


@pytest.mark.parametrize("max_length", [2, 3, 7, 50, 10_000])
@pytest.mark.parametrize("bos", [False, True])
def test_a_long_text_is_cut_into_pieces_and_every_token_is_learnt_once(
    tokenizer_of: Tokenizers, prose: Prose, max_length: int, bos: bool
) -> None:
    tokenizer = with_bos(tokenizer_of(None)) if bos else tokenizer_of(None)
    text = prose(5, 60)
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    pieces = encode_example(TextDocument(text), tokenizer, max_length=max_length)
    assert not isinstance(pieces, BadRow)
    learnt = [
        token
        for piece in pieces
        for token, weight in zip(piece.tokens, piece.weights, strict=True)
        if weight
    ]
    assert learnt == whole[1:]
    assert all(len(piece.tokens) <= max_length and piece.weights[0] == 0.0 for piece in pieces)
    assert all(before.tokens[-1] == after.tokens[0] for before, after in pairwise(pieces))


WORDS = st.lists(
    st.sampled_from(["ka", "lomi", "ten ra", "日本", "é", "12", "\n", "th!", "<x>"]),
    min_size=1,
    max_size=25,
)
TEXTS = WORDS.map(" ".join).filter(lambda text: text.strip())


@pytest.mark.parametrize(
    "family", ["chatml", "default_system", "llama3", "gemma", "llama2", "qwen3", None]
)
@settings(max_examples=12, deadline=None)  # of each of seven templates
@given(
    turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), system=st.none() | TEXTS, max_length=st.integers(8, 120),
    plain=st.booleans(),
)  # fmt: skip
def test_the_answer_is_never_cut(
    tokenizer_of: Tokenizers,
    family: str | None,
    turns: list[tuple[str, str]],
    system: str | None,
    max_length: int,
    plain: bool,
) -> None:
    """Whatever the length: the last answer, end of turn included, is there whole at the end, or the
    row is reported.
    """
    tokenizer = tokenizer_of(family)
    messages = [ChatMessage("system", system)] if system else []
    for question, answer in turns:
        messages += [ChatMessage("user", question), ChatMessage("assistant", answer)]
    content = Conversation(tuple(messages))
    if plain and len(turns) == 1:
        content = Conversation(content.messages, ("Q: " + turns[0][0] + "\nA:", " " + turns[0][1]))
    roomy, tight = (
        ExampleEncoder(tokenizer, max_length=100_000),
        ExampleEncoder(tokenizer, max_length=max_length),
    )
    every, made = roomy.encode(content), tight.encode(content)
    assert not isinstance(every, BadRow)
    whole = every[-1]
    answer = whole.tokens[last_run(whole) :]
    if isinstance(made, BadRow):
        assert made.kind == TOO_LONG
        bones = (
            *([ChatMessage("system", "")] if system else []),
            ChatMessage("user", ""),
            messages[-1],
        )
        least = Conversation(bones, ("", content.plain[1]) if content.plain else None)
        bare = roomy.encode(least)
        if not isinstance(bare, BadRow) and family != "llama2":
            assert len(bare[0].tokens) + 2 > max_length, "it would have fitted with its prompt cut"
        return
    if len(made) < len(every):
        assert "some answers of a chat were left out: too long for max_length" in tight.notes
        return
    made_row = made[-1]
    assert len(made_row.tokens) <= max_length
    assert made_row.tokens[-len(answer) :] == answer
    assert all(made_row.weights[-len(answer) :]) or whole.weights[-len(answer)] == 0.0
    if len(whole.tokens) <= max_length:
        assert made_row == whole
    else:
        assert made_row.cut == len(whole.tokens) - len(made_row.tokens) > 0
        assert made_row.tokens[0] == whole.tokens[0] or family is None, "the BOS or header stays"


def test_a_token_stays_before_the_answer() -> None:
    """Cut to nothing, the answer's first token would have nothing to be predicted from."""
    marked = MarkedTokens([1, 2, 3, 8, 9], [False, False, False, True, True])
    assert cut_prompt_tokens(marked, 0, 2) == MarkedTokens([3, 8, 9], [False, True, True])
    assert cut_prompt_tokens(marked, 0, 3) is None
    assert cut_prompt_tokens(marked, 1, 2) == MarkedTokens([1, 8, 9], [False, True, True])
    assert cut_prompt_tokens(marked, 1, 3) is None


def last_run(made: EncodedSequence) -> int:
    """Where the last run of supervised tokens starts."""
    at = len(made.weights)
    while at and made.weights[at - 1]:
        at -= 1
    return at


def test_the_prompt_is_cut_at_its_left(tokenizer_of: Tokenizers, prose: Prose) -> None:
    """One long question keeps its end; the header, the system message and all of the answer stay."""
    question = prose(7, 200).strip() + " THE END"
    content = Conversation(
        (
            ChatMessage("system", "Be kind"),
            ChatMessage("user", question),
            ChatMessage("assistant", "Hello mi"),
        )
    )
    encoder = ExampleEncoder(tokenizer_of("chatml"), max_length=60)
    made = only(encoder.encode(content))
    text = marked(encoder, made)
    assert text.startswith("<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n")
    assert text.endswith(" THE END<|im_end|>\n<|im_start|>assistant\n«Hello mi<|im_end|>»")
    assert text.split("user\n")[1].split("<|im_end|>")[0] in question
    assert 55 <= len(made.tokens) <= 60, "no more than needed is cut"


def test_old_turns_go_before_the_last_question_is_cut(tokenizer_of: Tokenizers) -> None:
    turns = [ChatMessage("system", "S")]
    for at in range(6):
        turns += [ChatMessage("user", f"q{at}"), ChatMessage("assistant", f"a{at}")]
    encoder = ExampleEncoder(tokenizer_of("chatml"), max_length=50)
    text = marked(encoder, only(encoder.encode(Conversation(tuple(turns)))))
    assert text.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq4<|im_end|>")
    assert text.endswith("«a5<|im_end|>»")


def test_an_answer_that_does_not_fit_is_reported(tokenizer_of: Tokenizers, prose: Prose) -> None:
    for family in ("chatml", None):
        made = encode_example(
            row(question="Hi", answer=prose(3, 50)), tokenizer_of(family), max_length=30
        )
        assert isinstance(made, BadRow)
        assert made.kind == TOO_LONG
        assert "is longer than max_length=30" in made.reason


def test_many_give_the_same_as_one_by_one(tokenizer_of: Tokenizers, prose: Prose) -> None:
    encoder = ExampleEncoder(tokenizer_of("llama3"), max_length=40)
    contents: list[ExampleContent] = [TextDocument(prose(seed, 40)) for seed in range(3)]
    contents += [
        row(question=prose(seed, 3 + seed), answer=prose(seed + 50, 2 + seed)) for seed in range(12)
    ]
    assert encoder.encode_many(contents) == [encoder.encode(content) for content in contents]
    assert encoder.encode_many([]) == []


def test_what_cannot_be_learnt_is_refused(tokenizer_of: Tokenizers) -> None:
    tokenizer = tokenizer_of(None)
    with pytest.raises(ConfigError, match="max_length=1"):
        ExampleEncoder(tokenizer, max_length=1)
    endless = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ModelError, match="has no eos_token"):
        encode_example(TextDocument("kalo"), endless, max_length=9)
    made = encode_example(TextDocument("<|endoftext|>"), tokenizer, max_length=9)
    assert isinstance(made, BadRow)
    assert "a single token" in made.reason
