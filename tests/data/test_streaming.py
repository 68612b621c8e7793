"""Streaming: windows in bounded memory, and a stop at any step that leaves no trace in what
follows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.reading.sources import open_source
from lorry.data.stream.streaming import StreamingTokenSet, StreamingTrainStream
from lorry.errors import ConfigError, DataError

ROWS = 47


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, prose: Callable[[int, int], str]) -> Path:
    """Rows of many lengths, some of them bad, and a stretch of twelve in which no row is usable."""
    lines = []
    for n in range(ROWS):
        row: dict[str, Any] = {
            "question": f"{n} {prose(n, 2 + n % 7)}",
            "answer": prose(n + 1000, 1 + n % 5),
        }
        if n % 9 == 4 or 20 <= n < 32:
            row["answer"] = ""
        lines.append("broken" if n % 11 == 6 else json.dumps(row))
    made = tmp_path_factory.mktemp("stream") / "qa.jsonl"
    made.write_text("\n".join(lines))
    return made


def stream_of(
    path: Path, tokenizer: Any, *, window: int = 8, **options: Any
) -> StreamingTrainStream:
    encoder = ExampleEncoder(tokenizer, max_length=120)
    rows = StreamingTokenSet(
        open_source(path, on_bad_row="skip", streaming=True), encoder, window_rows=window
    )
    return StreamingTrainStream(
        rows,
        **(
            {"seed": 0, "rows_per_batch": 2, "gradient_accumulation_steps": 2, "max_tokens": 240}
            | options
        ),
    )


def taken(stream: StreamingTrainStream, first: int, last: int) -> list[Any]:
    return [
        [
            (b.tokens.tolist(), b.weights.tolist(), b.starts.tolist(), b.key.tolist())
            for b in stream.batches(step)
        ]
        for step in range(first, last)
    ]


@settings(max_examples=12, deadline=None)
@given(
    stops=st.lists(st.integers(0, 45), max_size=3),
    window=st.sampled_from([1, 3, 8, 100]),
    packing=st.booleans(),
    seed=st.integers(0, 3),
)
def test_stopping_anywhere_leaves_no_trace(
    path: Path,
    tokenizer_of: Callable[..., Any],
    stops: list[int],
    window: int,
    packing: bool,
    seed: int,
) -> None:
    """Against an uninterrupted stream; stopped and resumed up to three times, over several epochs."""
    options: dict[str, Any] = {"window": window, "packing": packing, "seed": seed}
    expected = taken(stream_of(path, tokenizer_of("chatml"), **options), 0, 45)
    got, stream = [], stream_of(path, tokenizer_of("chatml"), **options)
    for first, last in zip([0, *sorted(stops)], [*sorted(stops), 45], strict=True):
        got += taken(stream, first, last)
        state = json.loads(json.dumps(stream.state()))
        stream = stream_of(path, tokenizer_of("chatml"), **options)
        stream.load_state(state)
    assert got == expected


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_has_every_usable_row_once(
    path: Path, tokenizer_of: Callable[..., Any], packing: bool
) -> None:
    stream = stream_of(path, tokenizer_of("chatml"), packing=packing)
    usable = [n for n in range(ROWS) if n % 11 != 6 and n % 9 != 4 and not 20 <= n < 32]
    epochs: dict[int, list[tuple[int, ...]]] = {0: [], 1: []}
    step = 0
    while True:
        batches = stream.batches(step)
        if stream.state()["epoch"] > 1:
            break
        sequences = [tuple(b.tokens[s:e].tolist()) for b in batches for s, e in b.segments]
        epochs[stream.state()["epoch"]] += sequences
        step += 1
    tokenizer = tokenizer_of("chatml")
    numbers = [
        sorted(int(tokenizer.decode(row).split("user\n")[1].split()[0]) for row in rows)
        for rows in epochs.values()
    ]
    assert numbers == [usable, usable]
    assert epochs[0] != epochs[1], "another order in the second epoch"


def test_every_window_is_shuffled_in_its_own_way(
    path: Path, tokenizer_of: Callable[..., Any], tmp_path: Path
) -> None:
    same = tmp_path / "same.jsonl"
    same.write_text("\n".join(path.read_text().splitlines()[:4] * 2))
    options: dict[str, Any] = {"window": 4, "rows_per_batch": 4, "gradient_accumulation_steps": 1}
    first, second = (
        step[0][0] for step in taken(stream_of(same, tokenizer_of("chatml"), **options), 0, 2)
    )
    assert sorted(first) == sorted(second)
    assert first != second


def test_keys_are_unique_within_an_epoch(path: Path, tokenizer_of: Callable[..., Any]) -> None:
    stream, keys, step = stream_of(path, tokenizer_of("chatml")), Counter[int](), 0
    while True:
        batches = stream.batches(step)
        if stream.state()["epoch"] == 1:
            break
        keys.update(int(key) for batch in batches for key in batch.key)
        step += 1
    assert set(keys.values()) == {1}


def test_only_one_window_is_read_ahead(
    path: Path, tokenizer_of: Callable[..., Any], tmp_path: Path
) -> None:
    """The second window holds a broken row; the first is given out before anybody looks at it."""
    lines = path.read_text().splitlines()
    late = tmp_path / "late.jsonl"
    late.write_text("\n".join([lines[0]] * 9 + ["broken"]))
    rows = StreamingTokenSet(
        open_source(late, streaming=True),
        ExampleEncoder(tokenizer_of("chatml"), max_length=120),
        window_rows=8,
    )
    stream = StreamingTrainStream(rows, seed=0, rows_per_batch=4, gradient_accumulation_steps=1)
    assert len(taken(stream, 0, 2)) == 2
    with pytest.raises(DataError, match=r"late\.jsonl:10: column 1: not valid JSON"):
        stream.batches(2)


def test_other_data_is_refused(
    path: Path, tokenizer_of: Callable[..., Any], tmp_path: Path
) -> None:
    stream = stream_of(path, tokenizer_of("chatml"))
    taken(stream, 0, 5)
    changed = tmp_path / "qa.jsonl"
    changed.write_text(path.read_text().replace('"question": "', '"question": "so '))
    with pytest.raises(DataError, match="not the data this run was started with, in window"):
        stream_of(changed, tokenizer_of("chatml")).load_state(stream.state())


def test_what_a_stream_cannot_do(
    path: Path, tokenizer_of: Callable[..., Any], tmp_path: Path
) -> None:
    stream = stream_of(path, tokenizer_of("chatml"))
    assert stream.total_steps(3, 10) == 10
    with pytest.raises(ConfigError, match="needs max_steps"):
        stream.total_steps(3)
    with pytest.raises(ValueError, match="step 0 is next, but step 2 was requested"):
        stream.batches(2)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("broken\n")
    with pytest.raises(DataError, match="no usable row; 1 row left out"):
        stream_of(empty, tokenizer_of("chatml"))
