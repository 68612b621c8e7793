"""Scores of answers: rows, means and intervals against values worked out by hand."""

from __future__ import annotations

import pytest

from lorry.data.reading.content import Conversation, Message
from lorry.errors import DataError
from lorry.evaluate.answers import intervals, means, reference, score_answers, score_rows

SAID = ["The Oslo!", "Lima", "in Kyoto"]
RIGHT: list[str | list[str]] = ["Oslo", ["Lima", "Peru"], "Ghent"]


def test_rows_and_their_means() -> None:
    rows = score_rows(SAID, RIGHT)
    assert rows == {
        "exact_match": [1, 1, 0], "exact_match_strict": [0, 1, 0], "f1": [1, 1, 0],
        "rouge_l": [pytest.approx(2 / 3), 1, 0],  # "the oslo" against "oslo": precision 1/2, recall 1
    }  # fmt: skip
    assert score_answers(SAID, RIGHT) == pytest.approx(
        {"exact_match": 2 / 3, "exact_match_strict": 1 / 3, "f1": 2 / 3, "rouge_l": 5 / 9}
    )
    assert means(rows) == score_answers(SAID, RIGHT)


def test_intervals_hold_their_means_and_follow_the_seed() -> None:
    rows = score_rows(SAID * 10, RIGHT * 10)
    found = intervals(rows)
    for name, mean in means(rows).items():
        low, high = found[name]
        assert low < mean < high
    assert found == intervals(rows) != intervals(rows, seed=1)
    assert intervals(score_rows(["x"] * 10, ["x"] * 10))["f1"] == (1, 1)
    assert intervals(score_rows(["x"] * 9, ["x"] * 9)) == {}


def test_the_reference_is_the_last_thing_said() -> None:
    turns = (
        Message("user", "1"),
        Message("assistant", "a"),
        Message("user", "2"),
        Message("assistant", "b"),
        Message("user", "3"),
    )
    assert reference(Conversation(turns)) == "b"


@pytest.mark.parametrize(("said", "right"), [(["a"], []), ([], []), (["a"], [[]])])
def test_lists_that_do_not_match(said: list[str], right: list[str | list[str]]) -> None:
    with pytest.raises(DataError):
        score_answers(said, right)
