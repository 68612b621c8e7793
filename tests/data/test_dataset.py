"""Rows in memory and the stream of steps: nothing lost, nothing twice, the same whenever it is
asked for.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.encoding.token_set import TokenSet, report_progress
from lorry.data.reading.sources import DataSource, open_source
from lorry.data.stream.dataset import TrainStream
from lorry.data.stream.pack import sequence_key
from lorry.errors import ConfigError, DataError

Tokenizers = Callable[..., Any]
Prose = Callable[[int, int], str]


def qa_file(folder: Path, prose: Prose, rows: int, name: str = "qa.jsonl") -> Path:
    path = folder / name
    lines = (
        {"question": f"{n} {prose(n, 2 + n % 7)}", "answer": prose(n + 1000, 1 + n % 5)}
        for n in range(rows)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def tokens(
    tokenizer_of: Tokenizers, prose: Prose, tmp_path_factory: pytest.TempPathFactory
) -> TokenSet:
    path = qa_file(tmp_path_factory.mktemp("data"), prose, 53)
    return TokenSet.build(open_source(path), ExampleEncoder(tokenizer_of("chatml"), max_length=200))


def stream_of(tokens: TokenSet, **options: Any) -> TrainStream:
    defaults: dict[str, Any] = {
        "seed": 0,
        "rows_per_batch": 4,
        "gradient_accumulation_steps": 3,
        "max_tokens": 400,
    }
    return TrainStream(tokens, **(defaults | options))


def test_the_set_holds_what_was_encoded(tokens: TokenSet, tokenizer_of: Tokenizers) -> None:
    assert len(tokens) == 53
    assert tokens.tokens.dtype == np.int32
    assert tokens.edges[-1] == len(tokens.tokens) == len(tokens.weights)
    assert [place.rpartition(":")[2] for place in tokens.where] == [str(n) for n in range(1, 54)]
    tokenizer = tokenizer_of("chatml")
    assert "<|im_start|>user\n7 " in tokenizer.decode(tokens.example(7).tokens)
    report = tokens.report
    assert (report.rows, report.sequences, report.tokens) == (53, 53, len(tokens.tokens))
    assert report.supervised == np.count_nonzero(tokens.weights)
    assert 0.1 < report.share < 0.9


def test_the_report_says_what_became_of_every_row(
    tokenizer_of: Tokenizers, prose: Prose, tmp_path: Path
) -> None:
    rows = [
        {"question": "Hi", "answer": "kalo", "id": 1},
        {"question": "Hi", "answer": " "},
        {"question": prose(1, 100), "answer": "kalo"},
        {"question": "Hi", "answer": prose(2, 100)},
        {"question": "Hi", "answer": 1.5},
        {"question": "<|im_start|>", "answer": "mi"},
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "broken\n")
    quarantine = tmp_path / "q.jsonl"
    source = open_source(path, on_bad_row="quarantine", quarantine=quarantine)
    made = TokenSet.build(source, ExampleEncoder(tokenizer_of("chatml"), max_length=40))
    report = made.report
    assert (len(made), report.rows, report.shortened) == (3, 3, 1)
    assert report.left_out == {"empty answer": 1, "too long": 1, "format": 1, "json": 1}
    assert report.tokens_cut > 50
    said = "\n".join(report.lines())
    assert "columns not used: id" in said
    assert f"{path}:2: 'answer' is empty" in said
    assert "control tokens" in said
    assert {json.loads(line)["where"] for line in quarantine.read_text().splitlines()} == {
        f"{path}:{n}" for n in (2, 4, 5, 7)
    }


def test_a_too_long_answer_is_dropped_but_other_faults_stop(
    tokenizer_of: Tokenizers, prose: Prose, tmp_path: Path
) -> None:
    encoder, path = ExampleEncoder(tokenizer_of("gemma"), max_length=40), tmp_path / "d.jsonl"
    good = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "kalo"}]
    }
    long = {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": prose(1, 60)},
        ]
    }
    refused = {"messages": [good["messages"][0], *good["messages"]]}
    path.write_text(json.dumps(good) + "\n" + json.dumps(long) + "\n")
    assert TokenSet.build(open_source(path), encoder).report.left_out == {"too long": 1}
    path.write_text(json.dumps(good) + "\n" + json.dumps(refused) + "\n")
    with pytest.raises(
        DataError,
        match=r"d\.jsonl:2: the chat template refuses this conversation: .*must alternate",
    ):
        TokenSet.build(open_source(path), encoder)
    path.write_text(json.dumps(long) + "\n")
    with pytest.raises(DataError, match="no usable row; 1 row left out"):
        TokenSet.build(open_source(path), encoder)
    path.write_text("")
    with pytest.raises(DataError, match="no usable row; the data is empty"):
        TokenSet.build(open_source(path), encoder)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 9), rows=st.integers(1, 9), accumulation=st.integers(1, 4), packing=st.booleans(), shuffle=st.booleans(),
    limit=st.integers(200, 900),
)  # fmt: skip
def test_an_epoch_has_every_row_once(
    tokens: TokenSet,
    seed: int,
    rows: int,
    accumulation: int,
    packing: bool,
    shuffle: bool,
    limit: int,
) -> None:
    stream = stream_of(
        tokens,
        seed=seed,
        rows_per_batch=rows,
        gradient_accumulation_steps=accumulation,
        packing=packing,
        shuffle=shuffle,
        max_tokens=limit,
    )
    first, last = 0, stream.total_steps(1)
    for epoch in range(3):
        steps = [stream.batches(step) for step in range(first, last)]
        keys = Counter(int(key) for step in steps for batch in step for key in batch.key)
        assert keys == Counter(sequence_key(row, epoch) for row in range(len(tokens)))
        assert all(len(step) == accumulation for step in steps[:-1])
        assert 0 < len(steps[-1]) <= accumulation, "the last step is smaller, not dropped"
        assert {stream.epoch_of(step) for step in range(first, last)} == {epoch}
        for batch in (batch for step in steps for batch in step):
            assert batch.tokens.numel() <= (limit if packing else rows * 200)
            assert all(batch.weights[batch.starts[:-1]] == 0)
        first, last = last, stream.total_steps(epoch + 2)


def test_a_step_is_a_pure_function(tokens: TokenSet) -> None:
    """Asked forwards, backwards or from a fresh stream, a step is the same; epochs and seeds
    differ.
    """
    for packing in (False, True):
        one, other = stream_of(tokens, packing=packing), stream_of(tokens, packing=packing)
        forwards = [one.rows(step) for step in range(20)]
        assert [other.rows(step) for step in reversed(range(20))] == forwards[::-1]
        assert stream_of(tokens, packing=packing, seed=1).rows(0) != forwards[0]
        assert one.rows(one.steps_per_epoch) != forwards[0]
        assert [b.tokens.tolist() for b in one.batches(7)] == [
            b.tokens.tolist() for b in other.batches(7)
        ]


def test_packing_changes_neither_keys_nor_tokens(tokens: TokenSet) -> None:
    def sequences(packing: bool) -> set[tuple[int, tuple[int, ...]]]:
        stream = stream_of(tokens, packing=packing)
        batches = [batch for step in range(stream.total_steps(1)) for batch in stream.batches(step)]
        return {
            (int(k), tuple(b.tokens[s:e].tolist()))
            for b in batches
            for k, (s, e) in zip(b.key, b.segments, strict=True)
        }

    assert sequences(False) == sequences(True)
    assert stream_of(tokens, packing=True, max_tokens=2000).fill() > 0.5


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"),
    [
        (1, None, 5),
        (3, None, 15),
        (0.5, None, 3),
        (2.2, 0, 11),
        (3, 7, 7),
        (1, -1, 5),
        (1e-300, None, 1),
    ],
)
def test_total_steps(tokens: TokenSet, epochs: float, max_steps: int | None, steps: int) -> None:
    stream = stream_of(tokens)
    assert stream.steps_per_epoch == math.ceil(math.ceil(53 / 4) / 3) == 5
    assert stream.total_steps(epochs, max_steps) == steps


def test_a_resumed_run_refuses_other_data(
    tokens: TokenSet, tokenizer_of: Tokenizers, prose: Prose, tmp_path: Path
) -> None:
    state = json.loads(json.dumps(stream_of(tokens).state()))
    again = TokenSet.build(
        open_source(qa_file(tmp_path, prose, 53)),
        ExampleEncoder(tokenizer_of("chatml"), max_length=200),
    )
    stream_of(again).load_state(state)
    for changed, options in (
        (qa_file(tmp_path, prose, 52, "b.jsonl"), {}),
        (tmp_path / "qa.jsonl", {"completion_only_loss": False}),
    ):
        other = TokenSet.build(
            open_source(changed), ExampleEncoder(tokenizer_of("chatml"), max_length=200, **options)
        )
        with pytest.raises(DataError, match="not the data this run was started with"):
            stream_of(other).load_state(state)


def test_groups_stay_together(tokens: TokenSet) -> None:
    groups = np.array([row // 2 if row < 40 else -1 for row in range(53)])
    paired = TokenSet(
        tokens.tokens, tokens.weights, tokens.edges, groups, tokens.where, tokens.report
    )
    for packing in (False, True):
        stream = stream_of(paired, packing=packing, rows_per_batch=3)
        seen: set[int] = set()
        for step in range(stream.total_steps(1)):
            for batch in stream.batches(step):
                here = Counter(batch.group.tolist())
                del here[-1]
                assert set(here.values()) <= {2}
                assert not seen & set(here)
                seen |= set(here)
        assert seen == set(range(20))
    assert paired.digest != tokens.digest


def test_eval_batches_are_in_file_order(tokens: TokenSet) -> None:
    batches = tokens.eval_batches(10)
    assert [len(batch) for batch in batches] == [10] * 5 + [3]
    assert np.array_equal(
        np.concatenate([batch.tokens.numpy() for batch in batches]), tokens.tokens
    )


def test_held_out_rows(
    tokens: TokenSet, tokenizer_of: Tokenizers, prose: Prose, tmp_path: Path
) -> None:
    train, held = tokens.held_out(0.2, seed=0)
    assert (len(train), len(held)) == (42, 11)
    assert set(train.where) | set(held.where) == set(tokens.where)
    assert (
        held.where == tokens.held_out(11, seed=0)[1].where != tokens.held_out(11, seed=1)[1].where
    )
    row = tokens.where.index(held.where[3])
    assert held.example(3).tokens == tokens.example(row).tokens
    assert held.report.tokens == len(held.tokens)
    with pytest.raises(ConfigError, match="which leaves none for training"):
        tokens.held_out(53, seed=0)
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(prose(ord(name), 100))
    pieces = TokenSet.build(
        open_source(tmp_path), ExampleEncoder(tokenizer_of("chatml"), max_length=30)
    )
    train, held = pieces.held_out(1, seed=0)
    assert not set(train.where) & set(held.where), (
        "pieces of one document must not fall on both sides"
    )
    assert len(train) + len(held) == len(pieces)


def test_a_set_has_its_adapter_and_role(
    tokenizer_of: Tokenizers, prose: Prose, tmp_path: Path
) -> None:
    source: DataSource = open_source(qa_file(tmp_path, prose, 3))
    made = TokenSet.build(
        source, ExampleEncoder(tokenizer_of("chatml"), max_length=200), adapter=2, role="forget"
    )
    (batch,) = made.eval_batches(3)
    assert batch.adapter.tolist() == [2, 2, 2]
    assert batch.role == ("forget",) * 3


def test_reading_that_takes_long_says_how_far_it_is() -> None:
    said, seconds = list[str](), iter(range(1000))
    rows = [object()] * 14
    given = list(
        report_progress(rows, "rows.jsonl", said.append, clock=lambda: float(next(seconds)))
    )  # type: ignore[arg-type]
    assert given == rows
    assert [line.split(" rows")[0] for line in said] == [f"rows.jsonl: {n}" for n in (2, 4, 8)]
    assert list(report_progress(rows, "rows.jsonl", None)) == rows  # type: ignore[arg-type]
