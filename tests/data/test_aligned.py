"""Two tokenizers on one conversation: which tokens answer to which, by hand, by brute force, by the
text they stand for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorry.data.batch import TokenizedExample, collate
from lorry.data.encoding.encode import EncodedSequence, ExampleEncoder
from lorry.data.encoding.token_set import TokenSet
from lorry.data.reading.content import ChatMessage, Conversation, TextDocument
from lorry.data.reading.formats import read_examples
from lorry.data.reading.sources import open_source
from lorry.errors import ConfigError
from lorry.models.loading.tokenizer import load_tokenizer
from lorry.tasks.distill.align import (
    PairedEncoder,
    align_sequences,
    identity_view,
    require_same_tokenizer,
    sequence_digest,
    sequence_digests,
)
from tests.support.tinyrun import CHATML, tokenizer


def gpt2(shared_data: Path) -> Any:
    """GPT-2's own tokenizer, which has no chat template."""
    found = load_tokenizer(shared_data / "tokenizers" / "gpt2", add_note=print)
    assert found is not None
    found.eos_token = found.bos_token = "<|endoftext|>"
    return found


def paired(shared_data: Path, *, max_length: int = 512, theirs: int = 1024) -> PairedEncoder:
    """A tiny byte-level student with ChatML, and GPT-2 reading along."""
    return PairedEncoder(
        tokenizer(),
        theirs=ExampleEncoder(gpt2(shared_data), max_length=theirs),
        max_length=max_length,
    )


def test_by_hand() -> None:
    """Two answers, of 2 and 3 tokens here and 3 and 1 there: 2 + 1 pairs, read from the token
    before.
    """
    ours = EncodedSequence([9, 9, 1, 2, 9, 3, 4, 5], [0, 0, 1, 1, 0, 1, 1, 1])
    theirs = EncodedSequence([8, 1, 2, 3, 8, 8, 4, 8], [0, 1, 1, 1, 0, 0, 1, 0])
    view = align_sequences(ours, theirs)
    assert view is not None
    assert list(view.targets) == [2, 3, 5]
    assert list(view.sources) == [0, 1, 5]
    assert align_sequences(ours, EncodedSequence([8, 1], [0, 1])) is None


weights = st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=2, max_size=30).map(
    lambda w: [0.0, *w[1:]]
)


@given(weights, weights)
def test_runs_by_brute_force(a: list[float], b: list[float]) -> None:
    def runs(marks: list[float]) -> list[list[int]]:
        found: list[list[int]] = []
        for t, w in enumerate(marks):
            if w:
                if t and marks[t - 1]:
                    found[-1].append(t)
                else:
                    found.append([t])
        return found

    view = align_sequences(EncodedSequence([0] * len(a), a), EncodedSequence([0] * len(b), b))
    if len(runs(a)) != len(runs(b)):
        assert view is None
        return
    assert view is not None
    pairs = [
        (x, y - 1)
        for one, other in zip(runs(a), runs(b), strict=True)
        for x, y in zip(one, other, strict=False)
    ]
    assert list(zip(view.targets, view.sources, strict=True)) == pairs


@given(weights)
def test_a_teacher_of_the_same_tokens_reads_the_token_before(a: list[float]) -> None:
    tokens = list(range(len(a)))
    view, aligned = (
        identity_view(tokens, a),
        align_sequences(EncodedSequence(tokens, a), EncodedSequence(tokens, a)),
    )
    assert aligned is not None
    assert (list(view.targets), list(view.sources)) == (
        list(aligned.targets),
        list(aligned.sources),
    )
    assert all(a[t] and s == t - 1 for t, s in zip(view.targets, view.sources, strict=True))


def test_two_real_tokenizers_start_at_the_answer(shared_data: Path) -> None:
    """Rows of Dolly: decoded from the first pair on, both sides say the answer from its start."""
    encoder = paired(shared_data, max_length=4096, theirs=4096)
    teacher = encoder.theirs.tokenizer
    rows = [
        found.content
        for found in read_examples(
            open_source(shared_data / "instruct" / "dolly_151.jsonl", limit=40)
        )
    ]
    made = encoder.encode_many(rows)
    assert len(encoder.views) > 35
    assert encoder.missing == 0
    for row, encoded in zip(rows, made, strict=True):
        assert isinstance(encoded, list)
        assert isinstance(row, Conversation)
        answer = row.messages[-1].content
        view = encoder.views[sequence_digest(encoded[0].tokens, encoded[0].weights)]
        ours = encoder.tokenizer.decode(encoded[0].tokens[view.targets[0] :])
        theirs = teacher.decode(list(view.tokens)[view.sources[0] + 1 :])
        start = answer.split()[0]
        assert ours.lstrip().startswith(start)
        assert theirs.lstrip().startswith(start)
        assert len(view.targets) == min(
            sum(map(bool, encoded[0].weights)), len(view.tokens) - 1 - view.sources[0]
        )


def test_chats_are_matched_turn_by_turn(shared_data: Path) -> None:
    teacher = gpt2(shared_data)
    teacher.chat_template = CHATML
    encoder = PairedEncoder(
        tokenizer(), theirs=ExampleEncoder(teacher, max_length=256), max_length=256
    )
    said = [
        ChatMessage("user", "Where is it?"),
        ChatMessage("assistant", "In the lorry, by the river."),
        ChatMessage("user", "Why?"),
    ]
    encoded = encoder.encode(Conversation((*said, ChatMessage("assistant", "It rained."))))
    assert isinstance(encoded, list)
    (view,) = encoder.views.values()
    jumps = [i for i, step in enumerate(np.diff(view.targets), 1) if step > 1]
    assert len(jumps) == 1
    for at in (0, jumps[0]):
        heard = (
            encoder.tokenizer.decode(encoded[0].tokens[view.targets[at] :]),
            teacher.decode(view.tokens[view.sources[at] + 1 :]),
        )
        assert {text[:2] for text in heard} == {"In" if at == 0 else "It"}


def test_what_the_teacher_cannot_read_is_counted(shared_data: Path) -> None:
    """An answer too long for it, and a text that falls into other pieces."""
    encoder = paired(shared_data, max_length=512, theirs=8)
    assert isinstance(
        encoder.encode(
            Conversation(
                (ChatMessage("user", "?"), ChatMessage("assistant", "a long answer " * 12))
            )
        ),
        list,
    )
    assert (encoder.missing, len(encoder.views)) == (1, 0)
    assert isinstance(
        encoder.encode(TextDocument("one two three four five six seven eight nine ten " * 3)), list
    )
    assert (encoder.missing, len(encoder.views)) == (2, 0)
    assert isinstance(encoder.encode(TextDocument("short")), list)
    assert encoder.missing == 2
    assert len(encoder.views) == 1


def test_the_student_reads_what_it_reads_alone(shared_data: Path) -> None:
    source = shared_data / "instruct" / "dolly_151.jsonl"
    alone = TokenSet.build(
        open_source(source, limit=20), ExampleEncoder(tokenizer(), max_length=256)
    )
    beside = TokenSet.build(
        open_source(source, limit=20), encoder := paired(shared_data, max_length=256)
    )
    assert alone.digest == beside.digest
    assert {name for batch in beside.eval_batches(7) for name in sequence_digests(batch)} >= set(
        encoder.views
    )


def test_names_hang_on_tokens_and_supervision_alone() -> None:
    a, b = (
        TokenizedExample([1, 2, 3], [0, 1, 1], key=5),
        TokenizedExample([1, 2, 3], [0, 0.5, 2.0], key=6, adapter=1),
    )
    packed = sequence_digests(collate([a, TokenizedExample([1, 2, 3], [0, 0, 1]), b]))
    assert packed[0] == packed[2] == sequence_digest([1, 2, 3], [0, 1, 1])
    assert packed[1] != packed[0]
    assert sequence_digest([1, 2, 4], [0, 1, 1]) != packed[0]


def test_the_first_difference_of_two_tokenizers(shared_data: Path) -> None:
    require_same_tokenizer(tokenizer(), tokenizer(), "teacher")
    with pytest.raises(
        ConfigError,
        match=r"teacher has another tokenizer: id 0 is '!' there .* \(50257 and 320 entries\).*uld",
    ):
        require_same_tokenizer(tokenizer(), gpt2(shared_data), "teacher")
    other = tokenizer()
    other.add_tokens(["<new>"])
    with pytest.raises(ConfigError, match=r"id 320 is '<new>' there and absent in the student's"):
        require_same_tokenizer(tokenizer(), other, "teacher")
