"""BLEU and chrF: values by hand and by sacreBLEU's own corpus functions; intervals against a plain
loop that calls them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.evaluate.metrics.corpus import CORPUS_METRICS, bleu_of_sums
from lorry.evaluate.metrics.registry import measure_metrics

pytestmark = pytest.mark.usefixtures("intervals_of_any_rows")

LIBRARY = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}
ROWS = [
    ("The cat sat on the mat.", ["The cat is on the mat.", "There is a cat on the mat."]),
    (
        "It is a guide to action which ensures that the military obeys.",
        ["It is a guide to action that ensures that it obeys."],
    ),
    ("", ["nobody said a word", "silence"]),
    (
        "Der Hund schläft heute lange.",
        ["Der Hund schlief gestern lange.", "Heute schläft der Hund lange.", "Er schläft."],
    ),
    ("猫在家里睡觉", ["猫在家睡觉"]),
    ("one two three four five six", ["one two three four five seven"]),
]
text = st.text("abc é猫.", max_size=12)
rows = st.lists(st.tuples(text, st.lists(text, min_size=1, max_size=3)), min_size=1, max_size=4)


def by_library(name: str, pairs: list[tuple[str, list[str]]]) -> float:
    most = max(len(references) for _, references in pairs)
    columns = [[r[n] if n < len(r) else None for _, r in pairs] for n in range(most)]
    return LIBRARY[name](
        [said for said, _ in pairs], columns, **({"force": True} if name == "bleu" else {})
    ).score


def measured(name: str, pairs: list[tuple[str, list[str]]], seed: int = 0):
    return measure_metrics([name], [p for p, _ in pairs], [r for _, r in pairs], seed=seed)[name]


@pytest.mark.parametrize(
    ("said", "reference", "expected"),
    [
        ("a b c d e", "a b c d f", (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25),
        (
            "a b c d",
            "a b c d e f g h",
            math.exp(1 - 8 / 4),
        ),  # all right, half as long: the brevity penalty alone
        (
            "a b c x d",
            "a b c y d",
            (4 / 5 * 2 / 4 * 1 / 3 * (1 / 2) / 2) ** 0.25,
        ),  # no 4-gram: half a match
        (
            "a x b y c",
            "a v b w c",
            (3 / 5 * (1 / 2) / 4 * (1 / 4) / 3 * (1 / 8) / 2) ** 0.25,
        ),  # then a quarter, an eighth
        ("a b c", "a b c", 0.0),  # no 4-gram was said
        ("x y z w", "a b c d", 0.0),
    ],
)
def test_bleu_by_hand(said: str, reference: str, expected: float) -> None:
    found = measured("bleu", [(said, [reference])])
    assert found.value == pytest.approx(100 * expected)
    # one row: every resample is that row
    assert found.interval == pytest.approx((100 * expected, 100 * expected))


def test_bleu_clips_as_in_the_paper() -> None:
    # Papineni et al. 2002, section 2.1, example 2: seven times "the" has modified unigram precision
    # 2/7, bigrams none.
    pair = ("the the the the the the the", ["the cat is on the mat", "there is a cat on the mat"])
    assert measured("bleu", [pair]).value == pytest.approx(
        100 * (2 / 7 * (1 / 2) / 6 * (1 / 4) / 5 * (1 / 8) / 4) ** 0.25
    )


def test_chrf_by_hand() -> None:
    # "ab" of "abc": precision 1 and 1, recall 2/3 and 1/2, and no longer n-gram said; F2 = 5 P R /
    # (4 P + R).
    recall = (2 / 3 + 1 / 2) / 2
    found = measured("chrf", [("ab", ["abc"])])
    assert found.value == pytest.approx(100 * 5 * recall / (4 + recall))
    assert found.interval == pytest.approx((found.value, found.value))


@pytest.mark.parametrize("name", LIBRARY)
def test_values_and_intervals_are_those_of_a_plain_loop(name: str) -> None:
    found = measured(name, ROWS, seed=5)
    assert found.value == pytest.approx(by_library(name, ROWS), abs=1e-9)
    random = numpy.random.default_rng(5)
    scores = [
        by_library(name, [ROWS[i] for i in random.integers(len(ROWS), size=len(ROWS))])
        for _ in range(1000)
    ]
    assert found.interval == pytest.approx(tuple(numpy.percentile(scores, [2.5, 97.5])), abs=1e-9)
    assert found.interval[0] < found.value < found.interval[1]
    assert found.rows is None


def test_signatures_say_how_the_number_was_made() -> None:
    version = f"version:{sacrebleu.__version__}"
    assert (
        measured("bleu", ROWS[:1]).signature
        == f"nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|{version}"
    )
    assert (
        measured("chrf", ROWS).signature
        == f"nrefs:var|case:mixed|eff:yes|nc:6|nw:0|space:no|{version}"
    )


@settings(max_examples=40)
@given(rows)
def test_any_text_scores_as_the_library_scores_it(pairs: list[tuple[str, list[str]]]) -> None:
    for name in LIBRARY:
        one = measured(name, pairs[:1])
        # our formula against the library's
        assert one.interval == pytest.approx((one.value, one.value), abs=1e-9)
        found = measured(name, pairs)
        assert found.value == pytest.approx(by_library(name, pairs), abs=1e-9)
        assert measured(name, pairs[::-1]).value == pytest.approx(found.value, abs=1e-9)
        assert all(0 <= value <= 100 + 1e-9 for value in (found.value, *found.interval))


@given(
    st.lists(st.integers(0, 6), min_size=4, max_size=4),
    st.lists(st.integers(0, 9), min_size=4, max_size=4),
    st.integers(0, 40),
)
def test_bleu_of_counts_equals_the_librarys(
    shared: list[int], more: list[int], expected: int
) -> None:
    total = [s + m for s, m in zip(shared, more, strict=True)]
    for order in range(1, 4):  # no text has 3-grams without 2-grams
        total[order] = total[order] if total[order - 1] else 0
        shared[order] = min(shared[order], total[order])
    ours = bleu_of_sums(numpy.array([[total[0], expected, *shared, *total]], dtype=float))[0]
    theirs = sacrebleu.metrics.BLEU.compute_bleu(
        list(shared), list(total), total[0], expected, smooth_method="exp"
    ).score
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_real_sentences(shared_data: Path) -> None:
    lines = (shared_data / "common_gen/commongen.dev.jsonl").read_text().splitlines()[:200]
    scenes = [json.loads(line)["scene"] for line in lines]
    pairs = [(scene[0], scene[1:]) for scene in scenes if len(scene) > 1]
    for name in CORPUS_METRICS:
        found = measured(name, pairs)
        assert found.value == pytest.approx(by_library(name, pairs), abs=1e-9)
        assert (
            found.value - 8 < found.interval[0] < found.value < found.interval[1] < found.value + 8
        )
        assert measured(name, [(scene[0], scene) for scene in scenes]).value == pytest.approx(100)
