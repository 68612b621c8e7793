"""Corpora whose texts are read as one: the sequences are those that a few lines make of the joined
text, wherever the texts lie; what else is read as one by one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lorry.data.encoding import token_cache
from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.encoding.token_cache import cache_key
from lorry.data.encoding.token_set import TokenSet
from lorry.data.reading.sources import open_source
from lorry.errors import DataError

NAME = "muse:News/raw/forget"


def with_bos(words: Any) -> PreTrainedTokenizerFast:
    """The same tokenizer, with a BOS before every text, as Llama's have."""
    backend = Tokenizer.from_str(words.backend_tokenizer.to_str())
    bos = words.eos_token
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, words.eos_token_id)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=bos)


def folder_of(root: Path, texts: list[str], name: str = "News/raw/forget.json") -> dict[str, str]:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(texts))
    return {"muse": str(root)}


def pieces_of(words: Any, texts: list[str], max_length: int) -> list[tuple[list[int], list[int]]]:
    """open-unlearning's `PretrainingDataset`, without its detour over text: [(ids, labels)]. Index 0
    has no label, and neither has a BOS.
    """
    ids = words("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    bos = words("")["input_ids"]
    size = max_length - len(bos)
    made = []
    for i in range(len(ids) // size + 1):
        piece = bos + ids[i * size : (i + 1) * size]
        matched = len(bos) or 1
        made.append((piece, [-100] * matched + piece[matched:]))
    return [(piece, labels) for piece, labels in made if len(piece) > (len(bos) or 1)]


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text("abc é\n漢", min_size=1, max_size=40).filter(str.strip), min_size=1),
    max_length=st.integers(2, 30),
    opened=st.booleans(),
)
def test_the_sequences_are_those_of_the_joined_text(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_of: Callable[..., Any], texts: list[str],
    max_length: int, opened: bool,
) -> None:  # fmt: skip
    words = with_bos(tokenizer_of(None)) if opened else tokenizer_of(None)
    local = folder_of(tmp_path_factory.mktemp("muse"), texts)
    expected = pieces_of(words, texts, max_length)
    source, encoder = open_source(NAME, local=local), ExampleEncoder(words, max_length=max_length)
    if not expected:  # one token and no BOS: nothing can be learnt
        with pytest.raises(DataError, match="no usable row"):
            TokenSet.build(source, encoder)
        return
    made = TokenSet.build(source, encoder)
    for row, (ids, labels) in enumerate(expected):
        span = slice(made.edges[row], made.edges[row + 1])
        assert made.tokens[span].tolist() == ids
        assert made.weights[span].tolist() == [float(label != -100) for label in labels]
    assert len(made) == len(expected)
    assert max(made.lengths) <= max_length
    assert made.report.rows == len(texts)


def test_a_sequence_is_placed_at_the_text_it_begins_in(
    tmp_path: Path, tokenizer_of: Callable[..., Any]
) -> None:
    texts = ["a" * 9, "b", "c", "d" * 20]
    local = folder_of(tmp_path, texts)
    source = open_source(NAME, local=local)
    made = TokenSet.build(source, ExampleEncoder(tokenizer_of(None), max_length=4))
    words, at = tokenizer_of(None), 0
    joined = "\n\n".join(texts)
    for row, where in enumerate(made.where):
        begun = [n for n in range(4) if len("\n\n".join(texts[:n])) + (2 if n else 0) <= at]
        assert where.endswith(f"element {begun[-1]}")
        span = slice(made.edges[row], made.edges[row + 1])
        at += len(words.decode(made.tokens[span].tolist()))
    assert len(joined) - at in (0, 1)  # a last token by itself follows nothing
    assert any("joined with blank lines and cut every 4 tokens" in n for n in made.report.notes)
    rest, held = made.held_out(1, 0)  # pieces that begin in one text stay on one side
    assert not {*rest.where} & {*held.where}


@pytest.mark.parametrize(
    ("name", "file", "joined"),
    [
        ("muse:News/raw/retain1", "News/raw/retain1.json", True),
        ("muse:Books/scal/forget_2", "books/scal/forget_2.json", True),
        ("muse:News/sust/forget_1", "News/sust/forget_1.json", True),
        ("muse:News/train/full", "News/train/full.json", True),
        ("muse:News/privleak/forget", "News/privleak/forget.json", False),
        ("wmdp:bio-retain-corpus", "bio-retain-corpus.json", True),
        ("wmdp:questions", "questions.json", False),
        ("tofu:forget01", "forget01.json", False),
    ],
)
def test_what_is_joined(name: str, file: str, joined: bool, tmp_path: Path) -> None:
    folder_of(tmp_path, ["one", "two"], file)
    local = dict.fromkeys(("muse", "wmdp", "tofu"), str(tmp_path))
    assert open_source(name, local=local).joined is joined
    # the very file by its own name is read text by text
    assert not open_source(tmp_path / file).joined
    both = open_source([name, str(tmp_path / file)], local=local)
    assert not both.joined
    assert [row.values["text"] for row in both] == ["one", "two"] * 2
    assert bool(both.remarks) is joined


def test_joined_texts_are_not_streamed_and_cached_apart(
    tmp_path: Path, tokenizer_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    local = folder_of(tmp_path, ["one", "two"])
    with pytest.raises(DataError, match="cannot be streamed"):
        open_source(NAME, local=local, streaming=True)
    monkeypatch.setattr(token_cache, "SMALLEST_SOURCE", 0)
    encoder = ExampleEncoder(tokenizer_of("chatml"), max_length=8)
    joined, path = open_source(NAME, local=local), tmp_path / "News/raw/forget.json"
    alone = open_source(path)
    assert cache_key(joined, encoder, None) != cache_key(alone, encoder, None)
    assert "joined" in joined.selection


def test_a_row_with_turns_among_them_is_an_error(
    tmp_path: Path, tokenizer_of: Callable[..., Any]
) -> None:
    rows: list[Any] = [{"question": "a", "answer": "b"}]
    local = folder_of(tmp_path, rows)
    with pytest.raises(DataError, match="element 0: a row with turns"):
        TokenSet.build(
            open_source(NAME, local=local), ExampleEncoder(tokenizer_of("chatml"), max_length=8)
        )


def test_every_token_is_learnt_once(tmp_path: Path, tokenizer_of: Callable[..., Any]) -> None:
    """With a BOS before each sequence, all of the text is a target."""
    words, texts = with_bos(tokenizer_of(None)), ["one two three", "four", "five six"]
    made = TokenSet.build(
        open_source(NAME, local=folder_of(tmp_path, texts)), ExampleEncoder(words, max_length=5)
    )
    learnt = made.tokens[np.flatnonzero(made.weights)].tolist()
    assert learnt == words("\n\n".join(texts), add_special_tokens=False)["input_ids"]
