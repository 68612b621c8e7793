"""Which tokens of a batch count, and which sequences belong together."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.data.batch import TokenizedExample, collate
from lorry.tasks.unlearn.pairing import (
    append_token,
    delayed_weights,
    full_weights,
    repeated_alternates,
    replace_by_alternates,
    role_weights,
    without_first_tokens,
)

weights = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=9)


@settings(max_examples=40)
@given(st.lists(st.tuples(weights, st.integers(0, 3), st.sampled_from(["forget", "retain"])), min_size=1, max_size=5))  # fmt: skip
def test_masks_say_what_a_loop_over_tokens_says(
    rows: list[tuple[list[float], int, str]],
) -> None:
    batch = collate(
        [
            TokenizedExample([7] * (len(w) + 1), [0.0, *w], key=i, role=role)
            for i, (w, _, role) in enumerate(rows)
        ]
    )
    counts = torch.tensor([n for _, n, _ in rows])
    skipped, plain, whole = [], [], []
    for w, n, role in rows:
        seen = 0
        for value in [0.0, *w]:
            seen = seen + 1 if value else 0
            skipped.append(value if seen > n else 0.0)
            plain.append(value if role == "forget" else 0.0)
        whole += [0.0, *[float(role == "forget")] * len(w)]
    assert without_first_tokens(batch, batch.weights, counts).tolist() == skipped
    assert role_weights(batch, "forget").values.tolist() == plain
    assert full_weights(batch, "forget").values.tolist() == whole

    longer = append_token(batch.with_extra(own=role_weights(batch, "forget")), "forget")
    later = delayed_weights(longer, "own").values
    at = 0
    for s, (w, _, role) in enumerate(rows):
        own = [0.0, *w] if role == "forget" else [0.0] * (len(w) + 1)
        size = len(own) + (role == "forget")
        assert longer.segments[s] == (at, at + size)
        assert later[at : at + size].tolist() == [0.0, *own][:size]
        assert longer.weights[at : at + size].tolist() == [0.0, *w, 0.0][:size]
        at += size


def test_an_alternate_takes_the_place_of_a_row_or_lends_it_its_tokens() -> None:
    rows = [
        ("forget", 0, [1, 2, 3, 4, 5], [0.0, 0.0, 1.0, 1.0, 1.0]),
        ("alternate", 0, [1, 2, 8, 9], [0.0, 0.0, 1.0, 1.0]),
        ("retain", 1, [1, 6, 7], [0.0, 1.0, 1.0]),
        ("alternate", 1, [1, 6, 9], [0.0, 1.0, 1.0]),
    ]
    batch = collate(
        [TokenizedExample(t, w, key=k, role=r, group=g) for k, (r, g, t, w) in enumerate(rows)]
    )
    repeated = repeated_alternates(batch, "forget").values
    assert repeated.tolist() == [0, 0, 8, 9, 8, *[0] * 10]
    made = replace_by_alternates(batch, "forget")
    assert made.role == ("forget", "retain", "alternate")
    assert made.tokens.tolist() == [1, 2, 8, 9, 1, 6, 7, 1, 6, 9]
    assert made.key.tolist() == [1, 2, 3]
