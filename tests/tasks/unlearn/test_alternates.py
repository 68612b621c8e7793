"""Which alternates of a file a row learns: those of its own question and answer, never another's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorry.config.data import DataConfig
from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.encoding.token_set import TokenSet, encode_rows
from lorry.data.reading.formats import read_examples
from lorry.data.reading.sources import open_source
from lorry.errors import DataError
from lorry.models.loading.tokenizer import load_tokenizer
from lorry.tasks.unlearn.alternates import AlternatesFinder, alternates_of, read_alternates
from tests.support.verbworld import model_directory, write_rows


def chat(*turns: str) -> dict[str, Any]:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]}


def learnt(
    folder: Path,
    rows: list[dict[str, Any]],
    others: list[dict[str, Any]],
    retained: list[dict[str, Any]] | None = None,
) -> list[list[str]]:
    """The alternates of each row, decoded; ``retained``: rows of another set, read before."""
    words = load_tokenizer(model_directory(folder / "base"), add_note=print)
    encoder = ExampleEncoder(words, max_length=160)
    path = write_rows(folder / "forget.jsonl", rows)
    source = open_source(path)
    tokens = TokenSet.of(encode_rows(read_examples(source), source, encoder), source, encoder)
    finder = AlternatesFinder(read_alternates(str(write_rows(folder / "others.jsonl", others))))
    if retained:
        other = write_rows(folder / "retain.jsonl", retained)
        source = open_source(other)
        kept = TokenSet.of(encode_rows(read_examples(source), source, encoder), source, encoder)
        alternates_of(DataConfig(path=str(other)), kept, encoder, finder=finder)
    made = alternates_of(DataConfig(path=str(path)), tokens, encoder, finder=finder)
    return [
        [words.decode(made.tokens.example(n, 0).tokens) for n in numbers] for numbers in made.of
    ]


WHY = [chat("Ada?", "Old.", "Why?", "Born early."), chat("Bo?", "Tall.", "Why?", "Eats  well.")]


def test_rows_with_one_last_question_learn_their_own_alternates(tmp_path: Path) -> None:
    others = [
        {"question": "Why?", "answer": "Born early.", "alternate": "Ada sings."},
        {"question": "Why?", "answer": "Eats well.", "alternate": ["Bo swims.", "Bo runs."]},
    ]
    ada, bo = learnt(tmp_path, WHY, others)
    assert ["sings" in text for text in ada] == [True]
    assert ["swims" in text for text in bo] == [True, False]
    assert ["runs" in text for text in bo] == [False, True]


@pytest.mark.parametrize(
    ("rows", "others", "message"),
    [
        (WHY, [{"question": "Why?", "alternate": "So."}], r"forget\.jsonl:2: .*forget\.jsonl:1"),
        (
            WHY,
            [{"question": "Why?", "answer": "Born early.", "alternate": "So."}],
            r"forget\.jsonl:2: .*other turns than in .*forget\.jsonl:1",
        ),
        (
            [chat("Ada?", "Old.", "Why?", "So."), chat("Bo?", "Tall.", "Why?", "So.")],
            [{"question": "Why?", "answer": "So.", "alternate": "Perhaps."}],
            "remove one of the rows",
        ),
        (
            WHY[:1],
            [{"question": "Why?", "answer": a, "alternate": "So."} for a in ("One.", "Two.")],
            "with 2 answers, none of which is this row's",
        ),
    ],
)
def test_what_no_answer_tells_apart_is_refused(
    tmp_path: Path, rows: list[dict[str, Any]], others: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        learnt(tmp_path, rows, others)


def test_rows_without_turns_before_may_share_a_question(tmp_path: Path) -> None:
    rows = [chat("Why?", "So."), chat("Why?", "Because.")]
    found = learnt(tmp_path, rows, [{"question": "Why?", "alternate": "Perhaps."}])
    assert [["Perhaps" in text for text in one] for one in found] == [[True], [True]]
    # an answer in other words is still the only one of its question
    found = learnt(tmp_path, rows, [{"question": "Why?", "answer": "Hm.", "alternate": "Perhaps."}])
    assert [len(one) for one in found] == [1, 1]


@pytest.mark.parametrize("answer", [{}, {"answer": "Of hunger."}, {"answer": "In other words."}])
def test_rows_to_forget_and_to_retain_do_not_share_alternates(
    tmp_path: Path, answer: dict[str, str]
) -> None:
    """A file without answers, or with the one answer of the other set, cannot tell them apart."""
    rows, kept = [chat("Why?", "Of hunger.")], [chat("Why?", "Of joy.")]
    others = [{"question": "Why?", "alternate": "Of spite.", **answer}]
    with pytest.raises(DataError, match=r"forget\.jsonl:1: 'Why\?' is also asked in .*retain"):
        learnt(tmp_path, rows, others, kept)
    both = [*others, {"question": "Why?", "answer": "Of joy.", "alternate": "Of gloom."}]
    if answer:
        both[0] = {**both[0], "answer": "Of hunger."}
        (found,) = learnt(tmp_path, rows, both, kept)
        assert ["spite" in text for text in found] == [True]
