"""`measure_metrics`: ROUGE against Lin's definition and the library, intervals of row means, and
what it refuses.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from lorry.errors import ConfigError, DataError
from lorry.evaluate.metrics.bootstrap import resampled_sums
from lorry.evaluate.metrics.registry import (
    CORPUS_METRICS,
    ROW_METRICS,
    bootstrap_interval,
    check_metrics,
    exact_match,
    measure_metrics,
    rouge_n,
)

pytestmark = pytest.mark.usefixtures("intervals_of_any_rows")

words = st.lists(st.sampled_from(["red", "green", "blue", "owl", "7", "кот", "дом"]), max_size=7)
strange = st.text("aZ é猫к.#1,$%\n", max_size=10)
PREDICTIONS = ["The red owl.", "green lamp 7", "nothing alike"]
REFERENCES = [["the red owl."], ["a green lamp 8", "lamp 7"], ["a blue stone 9", "10"]]
CONCEPTS = [["owl", "red"], ["lamp", "owl"], ["stone"]]


def plain_rouge(predicted: list[str], expected: list[str], n: int) -> tuple[float, float, float]:
    """Lin 2004, equation 1, and its precision and F1, by counting."""
    grams = [
        Counter(tuple(w[i : i + n]) for i in range(len(w) - n + 1)) for w in (predicted, expected)
    ]
    shared, said, asked = (
        sum((grams[0] & grams[1]).values()),
        sum(grams[0].values()),
        sum(grams[1].values()),
    )
    return shared / max(said, 1), shared / max(asked, 1), 2 * shared / max(said + asked, 1)


def test_rouge_n_by_hand() -> None:
    # Lin 2004, section 3.1: S1 and S2 and S3; ROUGE-2 cannot tell S2 from S3 (one bigram of three).
    gold = "police killed the gunman"
    assert rouge_n("police kill the gunman", gold, 2) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert rouge_n("the gunman kill police", gold, 2) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert rouge_n("police kill the gunman", gold, 1) == pytest.approx((3 / 4, 3 / 4, 3 / 4))
    assert rouge_n("police kill the gunman", gold, 1, stemmer=True).recall == 1.0
    assert rouge_n("кот сидит дома", "кот сидит на крыше", 2).recall == pytest.approx(1 / 3)


@given(words, st.lists(words, min_size=1, max_size=3), st.integers(1, 2))
def test_rouge_n_counts_words_and_takes_the_best(
    predicted: list[str], expected: list[list[str]], n: int
) -> None:
    russian = [
        sum(w in ("кот", "дом") for w in e) * 3
        > sum(len(w) for w in e if w.isascii() and w.isalpha())
        for e in expected
    ]
    plain = [w for w in predicted if w.isascii()]
    each = [
        plain_rouge(predicted if other else plain, e if other else [w for w in e if w.isascii()], n)
        for e, other in zip(expected, russian, strict=True)
    ]
    found = rouge_n(" ".join(predicted), [" ".join(e) for e in expected], n)
    assert found == pytest.approx(tuple(max(column) for column in zip(*each, strict=True)))


def test_rouge_of_real_sentences_is_the_librarys(shared_data: Path) -> None:
    lines = (shared_data / "common_gen/commongen.dev.jsonl").read_text().splitlines()[:60]
    scenes = [json.loads(line)["scene"] for line in lines]
    names = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    found = measure_metrics(list(names), [s[0] for s in scenes], [s[1:] or s for s in scenes])
    scorer = rouge_scorer.RougeScorer(list(names.values()))
    for ours, theirs in names.items():
        best = [scorer.score_multi(s[1:] or s, s[0])[theirs].fmeasure for s in scenes]
        assert found[ours].rows == pytest.approx(best)
        assert found[ours].value == pytest.approx(sum(best) / len(best))


def test_each_metric_by_hand() -> None:
    found = measure_metrics(
        [n for n in ROW_METRICS if n != "number_match"], PREDICTIONS, REFERENCES, concepts=CONCEPTS
    )
    assert found["exact_match"].rows == [1, 0, 0]
    assert found["exact_match_strict"].rows == [0, 0, 0]
    assert found["token_f1"].rows == pytest.approx([1, 2 * 2 / 5, 0])
    assert found["rouge_1"].rows == pytest.approx([1, 2 * 2 / 5, 0])
    assert found["rouge_2"].rows == pytest.approx([1, 2 * 1 / 3, 0])
    assert found["rouge_l"].rows == pytest.approx([1, 2 * 2 / 5, 0])
    assert found["coverage"].rows == [1, 0.5, 0]
    assert found["coverage"].value == 0.5
    assert measure_metrics(["number_match"], PREDICTIONS[1:], REFERENCES[1:])[
        "number_match"
    ].rows == [1, 0]


def test_intervals_of_row_means_are_those_of_a_plain_loop() -> None:
    found = measure_metrics(["token_f1"], PREDICTIONS, REFERENCES, seed=11)["token_f1"]
    random = numpy.random.default_rng(11)
    means = [sum(found.rows[i] for i in random.integers(3, size=3)) / 3 for _ in range(1000)]
    assert found.interval == pytest.approx(tuple(numpy.percentile(means, [2.5, 97.5])))
    assert found.interval == bootstrap_interval(found.rows, seed=11)


def test_many_rows_are_resampled_in_blocks_that_change_nothing() -> None:
    values = numpy.random.default_rng(0).random(3000)
    random = numpy.random.default_rng(4)
    drawn = [random.integers(3000, size=3000) for _ in range(800)]  # three blocks
    expected = numpy.percentile([values[i].mean() for i in drawn], [2.5, 97.5])
    assert bootstrap_interval(values, seed=4, resamples=800) == pytest.approx(
        tuple(expected), abs=1e-12
    )
    table = numpy.stack([values, numpy.arange(3000)], axis=1)
    assert resampled_sums(table, 4, 800) == pytest.approx(
        numpy.stack([table[i].sum(axis=0) for i in drawn])
    )


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(strange, st.lists(strange.map("1{}".format), min_size=1, max_size=3)),
        min_size=1,
        max_size=4,
    )
)
def test_every_metric_on_any_text(pairs: list[tuple[str, list[str]]]) -> None:
    names = [*ROW_METRICS, *CORPUS_METRICS]
    concepts = [["a", "1"]] * len(pairs)
    found = measure_metrics(names, [p for p, _ in pairs], [r for _, r in pairs], concepts=concepts)
    assert list(found) == names
    turned = measure_metrics(
        names, [p for p, _ in pairs[::-1]], [r for _, r in pairs[::-1]], concepts=concepts
    )
    other = measure_metrics(
        [n for n in names if n != "chrf"],
        [p for p, _ in pairs],
        [r[::-1] for _, r in pairs],
        concepts=concepts,
    )
    for name, one in found.items():
        top = 100 if name in CORPUS_METRICS else 1
        assert all(
            -1e-9 <= value <= top + 1e-9 for value in (one.value, *one.interval, *(one.rows or []))
        )
        assert turned[name].value == pytest.approx(one.value, abs=1e-9)
        # chrF takes the first of equals
        assert name == "chrf" or other[name].value == pytest.approx(one.value, abs=1e-9)
    perfect = measure_metrics(
        names, [r[0] for _, r in pairs], [r for _, r in pairs], concepts=[["1"]] * len(pairs)
    )
    assert (
        perfect["exact_match_strict"].value
        == perfect["number_match"].value
        == perfect["exact_match"].value
        == 1
    )


def test_a_string_is_one_reference() -> None:
    assert (
        measure_metrics(["exact_match"], ["owl"], ["owl"])["exact_match"].value
        == exact_match("owl", "owl")
        == 1.0
    )
    assert measure_metrics(["bleu"], ["a b c d"], ["a b c d"])["bleu"].value == pytest.approx(100)


def test_it_is_enough_that_some_reference_has_a_number() -> None:
    assert (
        measure_metrics(["number_match"], ["It is 4."], [["four", "4"]])["number_match"].value
        == 1.0
    )


def test_coverage_needs_no_references() -> None:
    assert (
        measure_metrics(["coverage"], ["an owl"], [[]], concepts=[["owl"]])["coverage"].value == 1.0
    )


def test_an_unknown_metric_lists_what_exists() -> None:
    with pytest.raises(
        ConfigError, match=r"no metric 'rouge_3' .did you mean 'rouge_[12l]'"
    ) as caught:
        measure_metrics(["bleu", "rouge_3"], ["a"], [["a"]])
    assert all(name in str(caught.value) for name in [*ROW_METRICS, *CORPUS_METRICS])


@pytest.mark.parametrize(
    ("names", "references", "concepts", "message"),
    [
        (["bleu"], [], (), "no rows"),
        (["bleu"], [["a"], []], (), r"example 1 has no reference \(1 such\)"),
        (
            ["number_match"],
            [["4"], ["four", "vier"]],
            (),
            "example 1 has no reference with a number",
        ),
        (
            ["coverage"],
            [["a"], ["a"]],
            (),
            r"example 0 has no concepts of letters or digits \(2 such\)",
        ),
        (["coverage"], [["a"], ["a"]], [["owl"], ["owl", "?!"]], "example 1 has no concepts"),
        (["coverage"], [["a"], ["a"]], [["owl"]], "2 rows and 1 lists of concepts"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(names, references, concepts, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_metrics(names, references, concepts=concepts)
    with pytest.raises(DataError, match=message):
        measure_metrics(names, ["x"] * len(references), references, concepts=concepts)


def test_predictions_and_references_must_pair() -> None:
    with pytest.raises(DataError, match="2 predictions and 1 references"):
        measure_metrics(["bleu"], ["a", "b"], [["a"]])


def test_importing_loads_no_library() -> None:
    heavy = ("torch", "nltk", "numpy", "sacrebleu", "simplemma", "rouge_score")
    code = f"import sys, lorry.evaluate.metrics.registry; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
