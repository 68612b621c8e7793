"""Metrics of unlearning against scipy, values worked out by hand, and the TOFU authors' logs."""

from __future__ import annotations

import itertools
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lorry.errors import DataError, NonFiniteError
from lorry.evaluate.metrics.fluency import repeated_ngrams, token_entropy
from lorry.evaluate.metrics.membership import (
    attack_auc,
    attack_roc,
    gradient_norm_score,
    loss_score,
    min_k_plus_plus_score,
    min_k_score,
    privacy_leakage,
    reference_score,
    zlib_score,
)
from lorry.evaluate.metrics.memorization import (
    exact_memorization,
    extraction_strength,
    mean_loss,
    probability,
    probability_with_options,
)
from lorry.evaluate.metrics.unlearning import (
    TRUTH_RATIO_FORMS,
    forget_quality,
    model_utility,
    relative_difference,
    truth_ratio,
)
from lorry.evaluate.metrics.words import rouge_l, rouge_n

SETS = ("eval_log.json", "eval_real_author_wo_options.json", "eval_real_world_wo_options.json")
few = st.floats(0.0, 3.0).map(lambda value: round(value, 1))  # so that there are ties


def load_log(shared_data: Path, model: str) -> dict[str, Any]:
    file = shared_data / "tofu" / "ref_eval" / f"llama2-7b_{model}_wd0.01.json"
    loaded: dict[str, Any] = json.loads(file.read_text())
    return loaded


def ratios_of(log: dict[str, Any]) -> list[float]:
    pairs = zip(log["avg_paraphrased_loss"], log["average_perturb_loss"], strict=True)
    return [truth_ratio(good, wrong) for good, wrong in pairs]


# --- the authors' published logs (TOFU, Llama-2-7B)


def test_forget_quality_of_the_published_logs(shared_data: Path) -> None:
    full, oracle = (load_log(shared_data, m)["eval_log_forget.json"] for m in ("full", "retain90"))
    assert len(full["truth_ratio"]) == 300
    assert ratios_of(full) == pytest.approx(full["truth_ratio"], rel=1e-6)
    got = forget_quality(ratios_of(full), ratios_of(oracle))
    assert got == pytest.approx(1.834e-21, rel=5e-4)
    truth = stats.ks_2samp(ratios_of(full), ratios_of(oracle), method="exact").pvalue
    assert got == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize(("model", "utility"), [("full", 0.62268), ("retain90", 0.61374)])
def test_model_utility_of_the_published_logs(shared_data: Path, model: str, utility: float) -> None:
    logs, parts = load_log(shared_data, model), []
    for name in SETS:
        log = logs[name]
        if name == "eval_log.json":
            probabilities = [probability(loss) for loss in log["avg_gt_loss"]]
        else:
            pairs = zip(log["avg_gt_loss"], log["average_perturb_loss"], strict=True)
            probabilities = [probability_with_options(right, wrong) for right, wrong in pairs]
        kept = [TRUTH_RATIO_FORMS["true_better"](t) for t in ratios_of(log)]
        parts += [float(numpy.mean(v)) for v in (probabilities, log["rougeL_recall"], kept)]
    assert model_utility(parts) == pytest.approx(utility, abs=5e-6)
    assert model_utility(parts) == pytest.approx(float(stats.hmean(parts)), rel=1e-12)


def test_rouge_of_all_published_answers(shared_data: Path) -> None:
    seen = 0
    for log in load_log(shared_data, "full").values():
        columns = log["generated_text"], log["rouge1_recall"], log["rougeL_recall"]
        for (_, generation, gold), one, longest in zip(*columns, strict=True):
            assert rouge_n(generation, gold, 1, stemmer=True).recall == one
            assert rouge_l(generation, gold, stemmer=True).recall == longest
            seen += 1
    assert seen == 817


# --- forget quality


@given(
    st.integers(1, 30).flatmap(lambda n: st.tuples(*[st.lists(few, min_size=n, max_size=n)] * 2))
)
def test_forget_quality_is_scipys_exact_test(pair: tuple[list[float], list[float]]) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        truth = stats.ks_2samp(*pair, method="exact").pvalue
    # scipy leaves its exact formula, with a warning, where p rounds to 1
    truth = 1.0 if any("Exact calculation unsuccessful" in str(w.message) for w in said) else truth
    assert forget_quality(*pair) == pytest.approx(truth, rel=1e-9, abs=1e-300)


def test_forget_quality_counts_orders() -> None:
    """All 20 orders of 3 and 3 values: the share that parts them at least as far."""
    orders = list(itertools.combinations(range(6), 3))
    gaps = []
    for ours in orders:
        theirs = [v for v in range(6) if v not in ours]
        steps = [sum(v <= at for v in ours) - sum(v <= at for v in theirs) for at in range(6)]
        gaps.append(max(map(abs, steps)))
    for ours, gap in zip(orders, gaps, strict=True):
        theirs = [v for v in range(6) if v not in ours]
        share = sum(other >= gap for other in gaps) / len(orders)
        assert forget_quality(ours, theirs) == pytest.approx(share)


def test_forget_quality_at_both_ends() -> None:
    rows = [0.5 + at / 1000 for at in range(400)]
    assert forget_quality(rows, rows) == 1.0
    # collapse: every ratio beyond the oracle's
    assert forget_quality(rows, [1e9] * 400) == pytest.approx(2 / math.comb(800, 400), rel=1e-12)
    assert forget_quality([math.inf] * 3, [1.0, 2.0, 3.0]) == pytest.approx(0.1)
    with pytest.raises(DataError, match="got 400 and 200"):
        forget_quality(rows, rows[:200])
    with pytest.raises(DataError):
        forget_quality([], [])
    with pytest.raises(NonFiniteError):
        forget_quality([math.nan], [1.0])


# --- truth ratio and utility


def test_truth_ratio_is_geometric() -> None:
    wrong = [0.2, 0.05]
    t = truth_ratio(-math.log(0.4), [-math.log(p) for p in wrong])
    assert t == pytest.approx(math.sqrt(0.2 * 0.05) / 0.4)  # .25; the arithmetic mean gives .3125
    assert {name: form(t) for name, form in TRUTH_RATIO_FORMS.items()} == pytest.approx(
        {"closer_to_1_better": 0.25, "true_better": 0.75, "prob_mean": 0.8}
    )
    assert TRUTH_RATIO_FORMS["closer_to_1_better"](4.0) == 0.25
    assert TRUTH_RATIO_FORMS["true_better"](4.0) == 0.0
    assert [form(math.inf) for form in TRUTH_RATIO_FORMS.values()] == [0, 0, 0]
    assert [form(0.0) for form in TRUTH_RATIO_FORMS.values()] == [0, 1, 1]
    # where every probability is 0 in a double, the ratio still is what it is
    assert truth_ratio(1000.0, [1000.0 + math.log(4)]) == pytest.approx(0.25)
    assert truth_ratio(2000.0, [0.0]) == sys.float_info.max
    with pytest.raises(DataError, match="wrong answer"):
        truth_ratio(1.0, [])


def test_model_utility_is_a_harmonic_mean() -> None:
    assert model_utility([1.0, 0.5]) == pytest.approx(2 / 3)
    assert model_utility([1.0, 0.0, 0.5]) == 0.0
    for bad in ([], [0.5, -0.1]):
        with pytest.raises(DataError):
            model_utility(bad)
    with pytest.raises(NonFiniteError):
        model_utility([math.inf])


def test_relative_difference() -> None:
    assert relative_difference(0.9, 0.6) == pytest.approx(50)
    with pytest.raises(DataError):
        relative_difference(0.9, 0)


# --- memorization


def test_probabilities() -> None:
    assert mean_loss([-1.0, -3.0]) == 2.0
    assert probability(2.0) == pytest.approx(math.exp(-2))
    losses = [-math.log(p) for p in (0.4, 0.3, 0.1)]
    assert probability_with_options(losses[0], losses[1:]) == pytest.approx(0.5)
    assert probability_with_options(1000.0, [1000.0]) == pytest.approx(0.5)
    assert probability_with_options(5000.0, [1.0]) < 1e-300
    for call in (lambda: mean_loss([]), lambda: probability_with_options(1.0, [])):
        with pytest.raises(DataError):
            call()


@pytest.mark.parametrize(
    ("hits", "memorized", "strength", "peers"),
    [
        ("1111", 1, 1, 1),
        ("0111", 3 / 4, 3 / 4, 3 / 4),
        ("1101", 3 / 4, 1 / 4, 1 / 4),
        ("0001", 1 / 4, 1 / 4, 1 / 4),
        ("1110", 3 / 4, 0, 1 / 4),
        ("0000", 0, 0, 1 / 4),
        ("1", 1, 1, 1),
        ("0", 0, 0, 1),
    ],
)
def test_memorization(hits: str, memorized: float, strength: float, peers: float) -> None:
    row = [hit == "1" for hit in hits]
    assert exact_memorization(row) == memorized
    assert extraction_strength(row) == strength
    assert extraction_strength(row, peer_floor=True) == peers


def test_memorization_of_nothing() -> None:
    for metric in (exact_memorization, extraction_strength):
        with pytest.raises(DataError):
            metric([])


# --- membership


def test_attack_scores_by_hand() -> None:
    row = [-1.0, -5.0, -2.0, -4.0, -3.0]
    assert loss_score(row) == 3.0
    assert min_k_score(row) == 4.5  # 40% of 5 tokens: -5 and -4
    assert min_k_score(row, 0.05) == 5.0  # at least one
    assert min_k_score(row, 1.0) == 3.0
    assert reference_score(row, [-1.0, -1.0]) == 2.0
    # one byte, and eight of header, block and checksum
    assert zlib_score(row, "a") == pytest.approx(3 / 9)
    # z-scores 1, -2, 0, -1.5, 0: the two least are -2 and -1.5
    z = min_k_plus_plus_score(row, [-2.0, -3.0, -2.0, -1.0, -3.0], [1.0, 1.0, 4.0, 4.0, 1.0])
    assert z == pytest.approx(1.75)
    assert min_k_plus_plus_score([0.0], [-1e-4], [0.0]) == pytest.approx(-0.1)  # variance 1e-6
    assert gradient_norm_score([1.0, 3.0]) == 2.0
    for call in (lambda: min_k_score([]), lambda: gradient_norm_score([])):
        with pytest.raises(DataError):
            call()


@given(st.lists(few, min_size=1, max_size=12), st.lists(few, min_size=1, max_size=12))
def test_auc_is_that_of_all_pairs_and_of_the_curve(seen: list[float], new: list[float]) -> None:
    wins = [(b > a) + (b == a) / 2 for a in seen for b in new]
    auc = attack_auc(seen, new)
    assert auc == pytest.approx(sum(wins) / len(wins))
    truth = stats.mannwhitneyu(new, seen, method="asymptotic").statistic
    assert auc == pytest.approx(truth / len(wins))
    curve = attack_roc(seen, new)
    assert (curve[0], curve[-1]) == ((0, 0), (1, 1))
    area = sum((c - a) * (b + d) / 2 for (a, b), (c, d) in itertools.pairwise(curve))
    assert auc == pytest.approx(area)


def test_auc_tells_members() -> None:
    """A higher score: less likely a member. 1 where rows to forget still look like members."""
    assert attack_auc([0.1, 0.2], [0.3, 0.4]) == 1.0
    assert attack_auc([0.3], [0.1]) == 0.0
    with pytest.raises(DataError, match="got 1 and 0"):
        attack_auc([0.1], [])
    with pytest.raises(NonFiniteError):
        attack_auc([math.nan], [0.1])


def test_privacy_leakage() -> None:
    assert privacy_leakage(1.0) == -100  # all leaks
    assert privacy_leakage(0.5) == 0
    assert privacy_leakage(0.0) == 100
    # MUSE writes AUC the other way round: News .477 there is 1 - .477 here
    assert privacy_leakage(0.9, 1 - 0.477) == pytest.approx(100 * (0.1 - 0.477) / 0.477)
    with pytest.raises(DataError):
        privacy_leakage(0.5, 1.0)


# --- fluency


@given(st.lists(st.integers(0, 5), min_size=2, max_size=30))
def test_token_entropy_is_scipys(tokens: list[int]) -> None:
    counts = numpy.unique(tokens, return_counts=True)[1]
    truth = stats.entropy(counts, base=2) / math.log2(len(tokens))
    assert token_entropy(tokens) == pytest.approx(truth, abs=1e-12)


def test_fluency_by_hand() -> None:
    assert token_entropy([7] * 8) == 0.0
    assert token_entropy([1, 2, 3, 4]) == pytest.approx(1.0)
    assert token_entropy([1]) == token_entropy([]) == 0.0
    assert repeated_ngrams([1, 2, 3, 4] * 3) == pytest.approx(5 / 9)  # 9 4-grams, 4 different
    assert repeated_ngrams(range(10)) == 0.0
    assert repeated_ngrams([1, 1, 1]) == 0.0
