"""Metrics against hand-computed values, TOFU's published ROUGE numbers and plain
re-implementations.
"""

from __future__ import annotations

import json
import math
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.errors import DataError
from lorry.evaluate.metrics.registry import (
    bootstrap_interval,
    corpus_perplexity,
    exact_match,
    mean_scores,
    normalize_answer,
    rouge_l,
    score_each,
    token_f1,
)

pytestmark = pytest.mark.usefixtures("intervals_of_any_rows")

words = st.lists(st.sampled_from(["red", "green", "blue", "owl", "lamp", "7", "stone"]), max_size=9)
ascii_text = st.text(
    string.ascii_letters + string.digits + string.punctuation + " \t\n", max_size=40
)


def squad_normalise(text: str) -> str:
    """The official SQuAD 1.1 steps, written again from their description."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def lcs_length(one: list[str], other: list[str]) -> int:
    """Longest common subsequence by the textbook recurrence, on a full table."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
            )
    return table[-1][-1]


def test_normalise_by_hand() -> None:
    assert normalize_answer("  The  Cat, sat on AN old mat! ") == "cat sat on old mat"
    assert normalize_answer("another theatre") == "another theatre"  # articles only as whole words
    assert normalize_answer("“Café” – the end…") == "café end"
    assert normalize_answer("Cafe\u0301") == normalize_answer("Café")
    assert normalize_answer("$5.00") == "500"


def test_a_text_of_articles_alone_is_kept() -> None:
    assert normalize_answer("A.") == "a"
    assert exact_match("The", "A") == 0.0
    assert exact_match("(A)", "A") == 1.0


@given(ascii_text)
def test_normalise_is_squads_on_ascii(text: str) -> None:
    assert normalize_answer(text) == squad_normalise(text) or squad_normalise(text) == ""


@given(st.text(max_size=40))
def test_normalise_never_leaves_double_spaces_or_punctuation(text: str) -> None:
    out = normalize_answer(text)
    assert out == " ".join(out.split())
    assert not set(out) & set(string.punctuation)


def test_exact_match_and_strict() -> None:
    assert exact_match("the Ladder of Rain.", "The ladder of rain") == 1.0
    assert exact_match("the Ladder of Rain.", "The ladder of rain", strict=True) == 0.0
    assert exact_match(" same \n", "same", strict=True) == 1.0
    assert exact_match("a  b", "a b", strict=True) == 0.0
    assert exact_match("Rome", ["Paris", "rome!"]) == 1.0
    assert exact_match("Roma", ["Paris", "rome!"]) == 0.0


def test_token_f1_by_hand() -> None:
    # red once, owl once
    assert token_f1("the red owl", "a red red owl") == pytest.approx(2 * 2 / (2 + 3))
    assert token_f1("", "owl") == 0.0
    assert token_f1("!!", "...") == 1.0
    assert token_f1("red", ["green", "red lamp"]) == pytest.approx(2 / 3)


def test_rouge_l_by_hand() -> None:
    # Lin 2004, section 3.1: "police killed the gunman" against two candidates.
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(
        (0.75, 0.75, 0.75)
    )
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(
        (0.5, 0.5, 0.5)
    )
    assert rouge_l("police kill the gunman", "police killed the gunman", stemmer=True).recall == 1.0
    assert rouge_l("one two", "one two three four") == pytest.approx((1.0, 0.5, 2 / 3))
    assert rouge_l("", "one") == (0.0, 0.0, 0.0)


def test_rouge_l_reads_scripts_the_library_drops() -> None:
    assert rouge_l("кот сидит дома", "кот сидит на крыше").recall == pytest.approx(2 / 4)
    assert rouge_l("猫在家", "猫在屋顶").recall == pytest.approx(2 / 4)
    assert rouge_l("pandas", "кот") == (0.0, 0.0, 0.0)


@given(words, words)
def test_rouge_l_equals_a_plain_lcs(predicted: list[str], expected: list[str]) -> None:
    score = rouge_l(" ".join(predicted), " ".join(expected))
    common = lcs_length(predicted, expected)
    assert score.precision == pytest.approx(common / len(predicted) if predicted else 0)
    assert score.recall == pytest.approx(common / len(expected) if expected else 0)
    assert score.fmeasure == pytest.approx(
        2 * common / (len(predicted) + len(expected)) if common else 0
    )


@given(words, st.lists(words, min_size=1, max_size=4))
def test_several_references_give_the_best(predicted: list[str], expected: list[list[str]]) -> None:
    text, references = " ".join(predicted), [" ".join(e) for e in expected]
    assert token_f1(text, references) == max(token_f1(text, r) for r in references)
    assert exact_match(text, references) == max(exact_match(text, r) for r in references)
    assert rouge_l(text, references).recall == max(rouge_l(text, r).recall for r in references)


def test_rouge_l_equals_tofus_published_recall(shared_data: Path) -> None:
    logs = json.loads((shared_data / "tofu/ref_eval/llama2-7b_full_wd0.01.json").read_text())
    rows = []
    for log in (
        logs["eval_log.json"],
        logs["eval_real_author_wo_options.json"],
        logs["eval_real_world_wo_options.json"],
    ):
        rows += list(zip(log["generated_text"], log["rougeL_recall"], strict=True))[:100]
    assert len({published for _, published in rows}) >= 10  # not a column of ones
    for (_, generated, gold), published in rows:
        assert rouge_l(generated, gold, stemmer=True).recall == pytest.approx(published, abs=1e-12)


def test_perplexity() -> None:
    assert corpus_perplexity(3 * math.log(7.0), 3) == pytest.approx(7.0)
    assert corpus_perplexity(0.0, 5) == 1.0
    assert corpus_perplexity(1e9, 1) == math.inf
    assert math.isnan(corpus_perplexity(math.nan, 4))
    with pytest.raises(DataError, match="at least one supervised token"):
        corpus_perplexity(1.0, 0)


def test_bootstrap_is_seeded_and_covers() -> None:
    values = [0.0, 1.0] * 200
    low, high = bootstrap_interval(values, seed=3)
    assert (low, high) == bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    half = 1.96 * 0.5 / math.sqrt(len(values))  # the normal approximation of a proportion
    assert low == pytest.approx(0.5 - half, abs=0.01)
    assert high == pytest.approx(0.5 + half, abs=0.01)
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)


@settings(max_examples=25)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.integers(0, 2**31))
def test_bootstrap_stays_within_the_values(values: list[float], seed: int) -> None:
    low, high = bootstrap_interval(values, seed, resamples=50)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_bootstrap_refuses_what_has_no_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval(values)


def test_summarise_averages_each_metric() -> None:
    predictions = ["The red owl.", "green lamp", "nothing alike"]
    references = ["the red owl.", ["green lamp", "lamp"], "blue stone"]
    out = mean_scores(predictions, references)
    assert out["count"] == 3
    assert out["exact_match"] == pytest.approx(2 / 3)
    assert out["exact_match_strict"] == pytest.approx(1 / 3)
    assert out["token_f1"] == out["rouge_l"] == out["rouge_l_recall"] == pytest.approx(2 / 3)
    each = score_each(predictions, references)
    assert each["rouge_l"] == [1.0, 1.0, 0.0]
    assert set(out) == {"count", *each}


def test_summarise_refuses_uneven_or_empty_input() -> None:
    with pytest.raises(DataError, match="2 predictions and 1 references"):
        mean_scores(["a", "b"], ["a"])
    with pytest.raises(DataError, match="above 0"):
        mean_scores([], [])
    with pytest.raises(DataError, match="example 1 has no reference"):
        mean_scores(["a", "b"], ["a", []])


def test_metrics_import_no_torch() -> None:
    code = "import sys, lorry.evaluate.metrics.registry; sys.exit('torch' in sys.modules or 'nltk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
