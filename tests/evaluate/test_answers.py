"""Scores of answers: rows, means and intervals against values worked out by hand."""

from __future__ import annotations

import pytest

from lorry.data.reading.content import ChatMessage, Conversation
from lorry.errors import DataError
from lorry.evaluate.answers import (
    mean_answer_scores,
    metric_intervals,
    metric_means,
    reference_answer,
    score_answer_rows,
)

SAID = ["The Oslo!", "Lima", "in Kyoto"]
RIGHT: list[str | list[str]] = ["Oslo", ["Lima", "Peru"], "Ghent"]


def test_rows_and_their_means() -> None:
    rows = score_answer_rows(SAID, RIGHT)
    assert rows == {
        "exact_match": [1, 1, 0],
        "exact_match_strict": [0, 1, 0],
        "f1": [1, 1, 0],
        "rouge_l": [
            pytest.approx(2 / 3),
            1,
            0,
        ],  # "the oslo" against "oslo": precision 1/2, recall 1
    }
    assert mean_answer_scores(SAID, RIGHT) == pytest.approx(
        {"exact_match": 2 / 3, "exact_match_strict": 1 / 3, "f1": 2 / 3, "rouge_l": 5 / 9}
    )
    assert metric_means(rows) == mean_answer_scores(SAID, RIGHT)


def test_intervals_hold_their_means_and_follow_the_seed() -> None:
    rows = score_answer_rows(SAID * 10, RIGHT * 10)
    found = metric_intervals(rows)
    for name, mean in metric_means(rows).items():
        low, high = found[name]
        assert low < mean < high
    assert found == metric_intervals(rows) != metric_intervals(rows, seed=1)
    assert metric_intervals(score_answer_rows(["x"] * 10, ["x"] * 10))["f1"] == (1, 1)
    assert metric_intervals(score_answer_rows(["x"] * 9, ["x"] * 9)) == {}


def test_the_reference_is_the_last_thing_said() -> None:
    turns = (
        ChatMessage("user", "1"),
        ChatMessage("assistant", "a"),
        ChatMessage("user", "2"),
        ChatMessage("assistant", "b"),
        ChatMessage("user", "3"),
    )
    assert reference_answer(Conversation(turns)) == "b"


@pytest.mark.parametrize(("said", "right"), [(["a"], []), ([], []), (["a"], [[]])])
def test_lists_that_do_not_match(said: list[str], right: list[str | list[str]]) -> None:
    with pytest.raises(DataError):
        mean_answer_scores(said, right)
