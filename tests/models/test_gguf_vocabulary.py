"""Which of llama.cpp's programs a tokenizer is, and which it has none for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from lorry.errors import ModelError
from lorry.models.gguf.vocabulary import GgufVocabulary, read_vocabulary
from tests.support.llama2 import llama2_tokenizer
from tests.support.verbworld import CHATML, tokenizer

# Published tokenizer.json: Qwen2's and Llama 3's own expressions
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def change(**parts: Any) -> PreTrainedTokenizerFast:
    """The tests' byte-level tokenizer with other parts."""
    words = tokenizer()
    for name, part in parts.items():
        setattr(words.backend_tokenizer, name, part)
    return words


def cut(expression: str, **settings: Any) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), settings.get("behavior", "isolated")),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def read(words: Any, rows: int | None = None) -> tuple[GgufVocabulary, list[str]]:
    notes: list[str] = []
    return read_vocabulary(words, len(words) if rows is None else rows, notes.append), notes


def whole_words(words: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    words.backend_tokenizer.model.ignore_merges = True
    return words


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (tokenizer(), "gpt-2"),
        (
            change(
                pre_tokenizer=pre_tokenizers.Sequence(
                    [
                        pre_tokenizers.Digits(individual_digits=True),
                        pre_tokenizers.ByteLevel(add_prefix_space=False),
                    ]
                )
            ),
            "smollm",
        ),
        (change(pre_tokenizer=cut(QWEN2)), "qwen2"),
        (whole_words(change(pre_tokenizer=cut(LLAMA3))), "llama-bpe"),
        (change(pre_tokenizer=cut(LLAMA3)), "smaug-bpe"),
    ],
    ids=["gpt-2", "smollm", "qwen2", "llama-bpe", "smaug-bpe"],
)
def test_known_ways_to_cut(words: Any, name: str) -> None:
    vocabulary, notes = read(words)
    assert (vocabulary.model, vocabulary.pre, notes) == ("gpt2", name, [])
    # every token at its row, as transformers has it
    assert list(vocabulary.tokens) == words.convert_ids_to_tokens(range(len(words)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (change(pre_tokenizer=cut(QWEN2 + "|x")), "it splits text by"),
        (change(pre_tokenizer=cut(QWEN2, behavior="merged_with_next")), "it splits text by"),
        (whole_words(change(pre_tokenizer=cut(QWEN2))), "ignore_merges"),
        (
            change(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
            "it splits text by",
        ),
        (
            change(
                pre_tokenizer=pre_tokenizers.Sequence(
                    [
                        pre_tokenizers.Digits(individual_digits=False),
                        pre_tokenizers.ByteLevel(add_prefix_space=False),
                    ]
                )
            ),
            "it splits text by",
        ),
        (change(normalizer=normalizers.Lowercase()), "normalises text"),
        (change(decoder=decoders.WordPiece()), "not those of a byte-level BPE"),
        (
            change(
                post_processor=processors.TemplateProcessing(
                    "<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
                )
            ),
            "it adds other tokens to a text than its BOS and EOS",
        ),
        (
            PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer(
                    models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")
                )
            ),
            "WordPiece",
        ),
    ],
)
def test_what_llama_cpp_has_no_program_for(words: Any, message: str) -> None:
    with pytest.raises(ModelError, match="cannot be written into a GGUF file") as refused:
        read(words)
    assert message in str(refused.value)


def test_ends_ids_and_template() -> None:
    words = change(
        post_processor=processors.TemplateProcessing(
            "$A <|im_end|>", special_tokens=[("<|im_end|>", 2)]
        )
    )
    vocabulary, _ = read(words, len(words) + 2)
    assert (vocabulary.add_bos, vocabulary.add_eos) == (False, True)
    assert vocabulary.ids == {"eos": 2, "padding": 0}
    assert vocabulary.chat_template == CHATML
    # 3 is control, 5 is unused: rows of the model that no token has
    assert [int(t) for t in vocabulary.types[:3]] == [3, 3, 3]
    assert [int(t) for t in vocabulary.types[-2:]] == [5, 5]
    assert len(set(vocabulary.tokens)) == len(vocabulary.tokens) == len(words) + 2


def test_more_tokens_than_rows() -> None:
    with pytest.raises(ModelError, match="rows of embeddings"):
        read(tokenizer(), 10)


def test_tokens_of_another_kind_are_told() -> None:
    words = tokenizer()
    words.add_tokens([AddedToken("<mask>", lstrip=True), AddedToken("plain")])
    vocabulary, notes = read(words)
    assert any("'<mask>'" in note for note in notes)
    assert int(vocabulary.types[vocabulary.tokens.index("plain")]) == 4  # user defined


def test_nfc_is_told() -> None:
    vocabulary, notes = read(change(normalizer=normalizers.NFC()))
    assert (vocabulary.pre, len(notes)) == ("gpt-2", 1)


# --- SentencePiece


def pieces(shared_data: Path) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = json.loads(
        (shared_data / "models" / "stories260K" / "tok512.json").read_text()
    )
    return found


def test_scores_give_the_order_of_merges(shared_data: Path) -> None:
    """The order of the published scores, which the tokenizer's merges were made from."""
    published = pieces(shared_data)
    vocabulary, _ = read(llama2_tokenizer(published))
    assert (vocabulary.model, vocabulary.pre) == ("llama", "default")
    assert (vocabulary.add_bos, vocabulary.add_space_prefix) == (True, True)
    longer = [row for row in range(259, 512) if len(bytes.fromhex(published[row][0]).decode()) > 1]
    ours = sorted(longer, key=lambda row: -vocabulary.scores[row])
    assert ours == sorted(longer, key=lambda row: -published[row][1])
    assert [int(t) for t in vocabulary.types[:4]] == [2, 3, 3, 6]  # unknown, control, control, byte


def test_metaspace_instead_of_a_normaliser(shared_data: Path) -> None:
    for scheme, prefix, told in (("always", True, 0), ("first", True, 1), ("never", False, 0)):
        words = llama2_tokenizer(pieces(shared_data))
        words.backend_tokenizer.normalizer = None
        words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            "▁", prepend_scheme=scheme, split=False
        )
        vocabulary, notes = read(words)
        assert (vocabulary.add_space_prefix, len(notes)) == (prefix, told)


@pytest.mark.parametrize("wrong", ["a pair is missing", "pairs of one token apart"])
def test_merges_that_scores_cannot_tell_of(wrong: str, shared_data: Path) -> None:
    words = llama2_tokenizer(pieces(shared_data))
    built = json.loads(words.backend_tokenizer.to_str())
    merges = built["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    place = next(i for i, text in enumerate(made) if made.count(text) > 1)
    taken = merges.pop(place)
    if wrong == "pairs of one token apart":
        merges.append(taken)
    words._tokenizer = Tokenizer.from_str(json.dumps(built))
    with pytest.raises(ModelError, match="are not those implied by its scores"):
        read(words)


def test_text_prepared_otherwise(shared_data: Path) -> None:
    words = llama2_tokenizer(pieces(shared_data))
    words.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(" ", "▁")]
    )
    with pytest.raises(ModelError, match="it normalises text by"):
        read(words)
