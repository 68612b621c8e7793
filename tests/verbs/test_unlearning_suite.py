"""`lorry eval suite=tofu`: every metric against padded transformers and PEFT with plain loops, files
in open-unlearning's shape, resuming by metric, and each bad input refused before anything is
written.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from rouge_score import rouge_scorer
from scipy import stats

from lorry.adapters.mix import Mix
from lorry.evaluate.unlearning import suite as suites
from lorry.evaluate.unlearning.tofu import TOFU_METRICS, TOFU_SUITE
from tests.support.padded import PaddedModel
from tests.support.tofuworld import read_json, tofu_rows, write_tofu
from tests.support.verbworld import CHATML, CONTEXT, World, lorry, tokenizer, write_rows

SETTINGS = (
    "suite=tofu",
    "forget_split=forget05",
    "dtype=float32",
    "max_new_tokens=12",
    "threads=1",
)
FIELDS = {"Q_A": "answer", "Q_A_PARA": "paraphrased_answer", "Q_A_PERT": "perturbed_answer"}


@pytest.fixture(scope="module")
def world(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """With a run of its own: what is measured is kept in the run, which others look into."""
    run = tmp_path_factory.mktemp("own") / "people"
    return replace(world, run=Path(shutil.copytree(world.run, run)))


@pytest.fixture(scope="module")
def tofu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tofu(tmp_path_factory.mktemp("tofu"))


@pytest.fixture(scope="module")
def oracle(world: World, tofu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of a model that never saw the rows: the base."""
    folder = tmp_path_factory.mktemp("oracle")
    named = "metrics=[forget_truth_ratio,mia_min_k,mia_loss]"
    assert (
        lorry("eval", world.base, *SETTINGS, f"local.tofu={tofu}", named, f"output_dir={folder}")
        == 0
    )
    return folder / "TOFU_EVAL.json"


@pytest.fixture(scope="module")
def measured(
    world: World, tofu: Path, oracle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(EVAL, SUMMARY) of all metrics of the run, into its own folder."""
    run = Path(shutil.copytree(world.run, tmp_path_factory.mktemp("run") / "people"))
    named = f"metrics={json.dumps(list(TOFU_METRICS))}"
    logs = f"retain_logs_path={oracle}"
    assert lorry("eval", run, *SETTINGS, f"local.tofu={tofu}", logs, named) == 0
    return read_json(run / "evals" / "TOFU_EVAL.json"), read_json(
        run / "evals" / "TOFU_SUMMARY.json"
    )


def gradient_norm(model: PaddedModel, question: str, answer: str) -> float:
    """Mean over LoRA's matrices of the norm of the gradient of the answer's mean loss by autograd."""
    prompt, right = model.prompt(question), model.words(answer).input_ids
    matrices = [p for name, p in model.model.named_parameters() if "lora_" in name]
    for matrix in matrices:
        matrix.requires_grad_(True)
    logits = model.model(input_ids=torch.tensor([prompt + right])).logits[0, len(prompt) - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(right))
    return float(numpy.mean([float(g.norm()) for g in torch.autograd.grad(loss, matrices)]))


def losses(model: PaddedModel, rows: list[dict[str, Any]], field: str) -> list[list[float]]:
    found = []
    for row in rows:
        texts = row[field] if isinstance(row[field], list) else [row[field]]
        pairs = [(row["question"], text) for text in texts]
        found.append([float(-one["logp"].mean()) for one in model.answers(pairs)])
    return found


def by_transformers(model: PaddedModel, oracle: PaddedModel) -> dict[str, float]:
    """The value of every metric, by loops over rows."""
    sets = tofu_rows()
    roles = {"forget": "forget05", "retain": "retain", "ra": "real_authors", "wf": "world_facts"}
    out: dict[str, float] = {}
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    for role, name in roles.items():
        rows = sets[f"{name}_perturbed"]
        by_field = {kind: losses(model, rows, field) for kind, field in FIELDS.items()}
        for kind in FIELDS if role in ("forget", "retain") else ("Q_A", "Q_A_PERT"):
            out[f"{role}_{kind}_Prob"] = float(
                numpy.mean([numpy.exp(-numpy.array(row)).mean() for row in by_field[kind]])
            )
        said = [model.say(row["question"]) for row in rows]
        kinds = ("Q_A", "Q_A_PARA", "Q_A_PERT") if role == "forget" else ("Q_A",)
        for kind in kinds:
            recalls = []
            for row, text in zip(rows, said, strict=True):
                golds = row[FIELDS[kind]]
                golds = golds if isinstance(golds, list) else [golds]
                recalls.append(numpy.mean([scorer.score(g, text)["rougeL"].recall for g in golds]))
            out[f"{role}_{kind}_ROUGE"] = float(numpy.mean(recalls))
        right = by_field["Q_A_PARA" if role in ("forget", "retain") else "Q_A"]
        pairs = list(zip(right, by_field["Q_A_PERT"], strict=True))
        t = numpy.array(
            [stats.gmean(numpy.exp(-numpy.array(b))) / math.exp(-a[0]) for a, b in pairs]
        )
        if role == "forget":
            out["forget_truth_ratio"] = float(numpy.minimum(t, 1 / t).mean())
            theirs = [
                math.exp(a[0] - numpy.mean(b))
                for a, b in zip(
                    losses(oracle, rows, "paraphrased_answer"),
                    losses(oracle, rows, "perturbed_answer"),
                    strict=True,
                )
            ]
            out["forget_quality"] = float(stats.ks_2samp(t, theirs, method="exact").pvalue)
        else:
            out[f"{role}_Truth_Ratio"] = float(numpy.maximum(0, 1 - t).mean())
        if role in ("ra", "wf"):
            shares = [
                math.exp(-a[0]) / (math.exp(-a[0]) + numpy.exp(-numpy.array(b)).sum())
                for a, b in zip(by_field["Q_A"], by_field["Q_A_PERT"], strict=True)
            ]
            out[f"{role}_Q_A_Prob_normalised"] = float(numpy.mean(shares))
    nine = [
        out[name]
        for role in ("retain", "ra", "wf")
        for name in (
            f"{role}_Q_A_Prob" if role == "retain" else f"{role}_Q_A_Prob_normalised",
            f"{role}_Q_A_ROUGE",
            f"{role}_Truth_Ratio",
        )
    ]
    out["model_utility"] = float(stats.hmean(nine)) if min(nine) > 0 else 0.0
    return out | attacks(model, oracle)


def attacks(model: PaddedModel, oracle: PaddedModel) -> dict[str, float]:
    """EM, ES and AUCs (by Mann-Whitney's U) of forget rows against the holdout."""
    out: dict[str, float] = {}
    sets = {"forget": tofu_rows()["forget05_perturbed"], "holdout": tofu_rows()["holdout05"]}
    scores: dict[str, dict[str, list[float]]] = {}
    for role, rows in sets.items():
        pairs = [(row["question"], row["answer"]) for row in rows]
        found, theirs = model.answers(pairs), oracle.answers(pairs)
        kept: dict[str, list[float]] = {}
        for row, one, other in zip(rows, found, theirs, strict=True):
            z = (one["logp"] - one["mean"]) / numpy.sqrt(numpy.maximum(one["variance"], 1e-6))
            size = len(zlib.compress(row["answer"].encode()))
            least = {}
            for name, values in (("mia_min_k", one["logp"]), ("mia_min_k_plus_plus", z)):
                inner = numpy.sort(values[:-1])  # without the end of turn
                least[name] = -inner[: max(1, int(0.4 * len(inner)))].mean()
            each = {
                "mia_loss": -one["logp"].mean(),
                "mia_zlib": -one["logp"].mean() / size,
                "mia_gradnorm": gradient_norm(model, row["question"], row["answer"]),
                "mia_reference": other["logp"].mean() - one["logp"].mean(),
                **least,
            }
            for name, value in each.items():
                kept.setdefault(name, []).append(float(value))
        for name, values in kept.items():
            scores.setdefault(name, {})[role] = values
        if role == "forget":
            hits = [one["hit"][:-1] for one in found]
            out["exact_memorization"] = float(numpy.mean([hit.mean() for hit in hits]))
            strengths = []
            for hit in hits:
                first = next((k for k in range(len(hit)) if hit[k:].all()), len(hit))
                strengths.append(1 - first / len(hit))
            out["extraction_strength"] = float(numpy.mean(strengths))
    out |= {f"{name}.{role}": v[role][0] for name, v in scores.items() for role in v}
    for name, by_role in scores.items():
        wins = stats.mannwhitneyu(by_role["holdout"], by_role["forget"]).statistic
        out[name] = wins / (len(by_role["holdout"]) * len(by_role["forget"]))
    return out


def oracle_auc(oracle: Path) -> float:
    """By Mann-Whitney's U, from the rows' scores."""
    scores = read_json(oracle)["mia_min_k"]
    new, old = (
        [r["score"] for r in scores[role]["value_by_index"].values()]
        for role in ("holdout", "forget")
    )
    return float(stats.mannwhitneyu(new, old).statistic) / (len(new) * len(old))


def test_every_metric_is_that_of_padded_transformers(
    world: World, oracle: Path, measured: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    base = PaddedModel(world.base, None)
    truth = by_transformers(PaddedModel(world.base, world.run), base)
    found, summary = measured
    ours = {"forget_Q_A_gibberish", "privleak", "rel_diff"}
    for name in [name for name in truth if "." in name]:  # an AUC alone is coarse: scores, too
        metric, role = name.split(".")
        score = found[metric][role]["value_by_index"]["0"]["score"]
        assert score == pytest.approx(truth.pop(name), rel=5e-4, abs=1e-6), name
    assert set(summary) == set(TOFU_METRICS) == set(truth) | ours
    assert {name: summary[name] for name in truth} == pytest.approx(truth, rel=2e-4)
    theirs = oracle_auc(oracle)
    auc = truth["mia_min_k"]
    assert auc == 1.0  # four rows learnt by heart: there is something to be told
    assert summary["privleak"] == pytest.approx(100 * (theirs - auc) / (1 - theirs))
    assert summary["rel_diff"] == pytest.approx(100 * (auc - theirs) / theirs)
    assert summary["extraction_strength"] == 1.0


def test_files_have_the_shape_of_open_unlearnings(
    measured: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    found, summary = measured
    assert summary == {name: record["agg_value"] for name, record in found.items()}
    shapes = {
        "forget_Q_A_Prob": {"prob", "avg_loss"},
        "ra_Q_A_Prob_normalised": {"prob"},
        "forget_truth_ratio": {"score"},
        "extraction_strength": {"score"},
        "retain_Q_A_ROUGE": {
            "rouge1_recall", "rougeL_f1", "rougeL_recall", "input", "ground_truth", "generation",
        },
    }  # fmt: skip
    for name, keys in shapes.items():
        rows = found[name]["value_by_index"]
        assert list(rows) == [str(at) for at in range(len(rows))]
        assert all(set(row) == keys for row in rows.values())
    wrong = found["forget_Q_A_PERT_Prob"]["value_by_index"]["0"]
    assert len(wrong["prob"]) == len(wrong["avg_loss"]) == 5
    said = found["forget_Q_A_ROUGE"]["value_by_index"]["0"]
    assert (said["input"], said["generation"]) == ("Where does Mara live?", "Mara lives in Oslo.")
    attack = found["mia_min_k"]
    assert attack["agg_value"] == attack["auc"]
    assert [len(attack[role]["value_by_index"]) for role in ("forget", "holdout")] == [3, 4]
    assert attack["roc"][0] == [0, 0]
    assert attack["roc"][-1] == [1, 1]
    assert len(found["model_utility"]["parts"]) == 9
    assert "not the score of open-unlearning" in found["forget_Q_A_gibberish"]["note"]
    assert set(found["forget_truth_ratio"]["agg_by_form"]) == {
        "closer_to_1_better", "true_better", "prob_mean",
    }  # fmt: skip


def published(path: Path, ours: Path, **changed: Any) -> Path:
    """A log as open-unlearning writes it: without what ours has beside."""
    plain = {
        name: {
            key: value for key, value in record.items() if key not in ("digest", "model", "rows")
        }
        for name, record in read_json(ours).items()
    }
    path.write_text(json.dumps(plain | changed))
    return path


def test_a_published_log_is_an_oracle(
    world: World, tofu: Path, oracle: Path, measured: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    logs = published(tmp_path / "theirs.json", oracle, extra={"agg_value": math.nan})
    asked = ("metrics=[forget_quality,privleak]", f"retain_logs_path={logs}")
    assert (
        lorry("eval", world.run, *SETTINGS, f"local.tofu={tofu}", *asked, f"output_dir={tmp_path}")
        == 0
    )
    summary = read_json(tmp_path / "TOFU_SUMMARY.json")
    for name in ("forget_quality", "privleak"):
        assert summary[name] == measured[1][name]


def test_what_was_compared_with_an_oracle_says_with_which(
    measured: tuple[dict[str, Any], dict[str, Any]], oracle: Path
) -> None:
    values = {name: record["agg_value"] for name, record in read_json(oracle).items()}
    for name, record in measured[0].items():
        if name in ("forget_quality", "privleak", "rel_diff", "mia_reference"):
            logs = record["retain_logs"]
            assert (logs["path"], logs["values"]) == (str(oracle.resolve()), values)
            # of what the file says: written anew with other spaces it is the same oracle
            text = json.dumps(read_json(oracle), sort_keys=True)
            assert logs["sha256"] == hashlib.sha256(text.encode()).hexdigest()
        else:
            assert "retain_logs" not in record


def test_a_finished_metric_is_not_measured_again(
    world: World, tofu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    measured: list[str] = []
    plain = suites.SuiteInputs

    def spied(*parts: Any) -> suites.SuiteInputs:
        measured.append("one")
        return plain(*parts)

    monkeypatch.setattr(suites, "SuiteInputs", spied)
    folder = tmp_path / "out"

    def evaluate(*more: str) -> int:
        measured.clear()
        asked = ("eval", world.base, *SETTINGS, f"local.tofu={data}", f"output_dir={folder}", *more)
        assert lorry(*asked) == 0
        return len(measured)

    data = tofu
    assert evaluate("metrics=[extraction_strength,forget_truth_ratio]") == 4
    first = (folder / "TOFU_EVAL.json").read_bytes()
    assert evaluate("metrics=[extraction_strength,forget_truth_ratio]") == 0
    assert (folder / "TOFU_EVAL.json").read_bytes() == first
    assert "4 of 4 metrics were measured before" in capfd.readouterr().err
    assert evaluate("metrics=[forget_Q_A_Prob]") == 1  # and the others stay
    assert len(read_json(folder / "TOFU_SUMMARY.json")) == 5
    assert evaluate("metrics=[extraction_strength]", "peer_masks=true") == 1
    assert evaluate("metrics=[forget_Q_A_Prob]", "question_key=paraphrased_question") == 1
    assert list(read_json(folder / "TOFU_SUMMARY.json")) == ["forget_Q_A_Prob"]  # of other rows
    rows = tofu_rows()
    rows["forget05_perturbed"][0]["answer"] = "Mara lives in Paris."
    data = write_tofu(tmp_path / "other", rows)
    assert evaluate("metrics=[forget_Q_A_Prob]") == 1


def test_another_model_has_its_own_numbers(world: World, tofu: Path, tmp_path: Path) -> None:
    asked = (*SETTINGS, f"local.tofu={tofu}", f"output_dir={tmp_path / 'out'}")
    assert lorry("eval", world.base, *asked, "metrics=[exact_memorization,forget_Q_A_Prob]") == 0
    before = read_json(tmp_path / "out" / "TOFU_SUMMARY.json")
    assert lorry("eval", world.run, *asked, "metrics=[forget_Q_A_Prob]") == 0
    after = read_json(tmp_path / "out" / "TOFU_SUMMARY.json")
    assert list(after) == ["forget_Q_A_Prob"]
    assert after["forget_Q_A_Prob"] > 0.3 > before["forget_Q_A_Prob"]


def test_limit_is_of_generation_alone(world: World, tofu: Path, tmp_path: Path) -> None:
    named = "metrics=[forget_Q_A_ROUGE,forget_truth_ratio]"
    assert (
        lorry(
            "eval",
            world.base,
            *SETTINGS,
            f"local.tofu={tofu}",
            named,
            "limit=1",
            f"output_dir={tmp_path}",
        )
        == 0
    )
    found = read_json(tmp_path / "TOFU_EVAL.json")
    assert len(found["forget_Q_A_ROUGE"]["value_by_index"]) == 1
    assert len(found["forget_truth_ratio"]["value_by_index"]) == 3


def test_usual_metrics_without_an_oracle(
    world: World, tofu: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lorry("eval", world.base, *SETTINGS, f"local.tofu={tofu}", f"output_dir={tmp_path}") == 0
    summary = read_json(tmp_path / "TOFU_SUMMARY.json")
    assert set(TOFU_SUITE.default) - set(summary) == {"forget_quality"}
    assert "forget_quality not computed: give retain_logs_path" in capfd.readouterr().err


def drop(field: str, split: str) -> Callable[[dict[str, Any]], None]:
    def change(rows: dict[str, Any]) -> None:
        rows[split][1][field] = [] if field == "perturbed_answer" else ""

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop("perturbed_answer", "forget05_perturbed"),
            "forget05_perturbed.json:2: no wrong answers",
        ),
        (drop("answer", "holdout05"), "holdout05.json:2: no text in 'answer'"),
        (drop("paraphrased_answer", "retain_perturbed"), "retain_perturbed.json:2: no text"),
        (lambda rows: rows.pop("holdout05"), "no holdout05: membership"),
        (lambda rows: rows.pop("world_facts_perturbed"), "has no world_facts_perturbed.json"),
        (lambda rows: rows.update(holdout05=[]), "holdout05"),
    ],
)
def test_bad_rows_are_one_error(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    rows = tofu_rows()
    change(rows)
    data, out = write_tofu(tmp_path / "tofu", rows), tmp_path / "out"
    code = lorry("eval", world.base, *SETTINGS, f"local.tofu={data}", f"output_dir={out}")
    assert code in (2, 3)
    assert message in capfd.readouterr().err
    assert not out.exists()


def broken(**changed: Any) -> Callable[[dict[str, Any]], None]:
    return lambda logs: logs["forget_truth_ratio"].update(changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logs: logs.pop("forget_truth_ratio"), "no forget_truth_ratio in it (it has"),
        (lambda logs: logs.pop("mia_min_k"), "no mia_min_k in it"),
        (broken(value_by_index={str(at): {"score": 0.5} for at in range(40)}), "40 rows (those of forget01), but 3"),
        (broken(value_by_index={str(at): {"score": 0.5} for at in range(1, 4)}), "not numbered from 0 to 2"),
        (broken(value_by_index={"0": {"score": 0.5}, "1": {"score": None}, "2": {}}), "forget_truth_ratio.1 is None"),
        (broken(value_by_index={"0": {"score": math.nan}, "1": {}, "2": {}}), "forget_truth_ratio.0 is nan"),
        (broken(value_by_index=[0.5, 0.5, 0.5]), "has no value_by_index"),
    ],
)  # fmt: skip
def test_an_oracle_of_something_else_is_one_error(
    world: World, tofu: Path, oracle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    change: Any, message: str,
) -> None:  # fmt: skip
    logs = read_json(published(tmp_path / "logs.json", oracle))
    change(logs)
    (tmp_path / "logs.json").write_text(json.dumps(logs))
    asked = (f"local.tofu={tofu}", f"retain_logs_path={tmp_path / 'logs.json'}")
    assert lorry("eval", world.base, *SETTINGS, *asked, f"output_dir={tmp_path / 'out'}") == 3
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("metric", ["privleak", "rel_diff", "mia_reference"])
def test_an_oracle_of_another_holdout_is_one_error(
    metric: str, world: World, oracle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As many rows, other texts: the area under the curve is of other rows."""
    rows = tofu_rows()
    rows["holdout05"][0]["answer"] = "Nils lives in Paris."
    data, out = write_tofu(tmp_path / "tofu", rows), tmp_path / "out"
    asked = (f"local.tofu={data}", f"retain_logs_path={oracle}", f"metrics=[{metric}]")
    assert lorry("eval", world.base, *SETTINGS, *asked, f"output_dir={out}") == 3
    assert "was measured on other rows" in capfd.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("text", ["", '{"a": 1', "[]", '{"forget_quality": 0.5}'])
def test_a_damaged_oracle_is_one_error(
    world: World, tofu: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "logs.json").write_text(text)
    asked = (f"local.tofu={tofu}", f"retain_logs_path={tmp_path / 'logs.json'}")
    assert lorry("eval", world.base, *SETTINGS, *asked, f"output_dir={tmp_path / 'out'}") == 3
    assert "logs.json" in capfd.readouterr().err


def test_our_own_oracle_has_to_be_of_the_same_rows(
    world: World, oracle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As many rows, but others: only the digest tells."""
    rows = tofu_rows()
    rows["forget05_perturbed"].reverse()
    data = write_tofu(tmp_path / "tofu", rows)
    asked = (f"local.tofu={data}", f"retain_logs_path={oracle}", f"output_dir={tmp_path / 'out'}")
    assert lorry("eval", world.base, *SETTINGS, *asked) == 3
    assert "forget_truth_ratio was measured on other rows" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["metrics=[forget_qualty]"], "no 'forget_qualty' (did you mean 'forget_quality'?)"),
        (["metrics=[forget_quality]"], "give its EVAL.json as retain_logs_path"),
        (["forget_split=forget07"], "TOFU has forget01, forget05, forget10"),
        (["temperature=1"], "suite=tofu fixes its own"),
        (["data=x.jsonl"], "one of these"),
        (["output_dir=x.json"], "name a folder"),
        (["local.tofu=nowhere"], "is not a folder"),
    ],
)
def test_wrong_settings(
    world: World, tofu: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    asked: list[str], message: str,
) -> None:  # fmt: skip
    usual = [f"local.tofu={tofu}", f"output_dir={tmp_path / 'out'}"]
    assert lorry("eval", world.base, *SETTINGS, *usual, *asked) in (2, 3)
    assert message in capfd.readouterr().err


def test_a_plain_model_needs_a_folder(
    world: World, tofu: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lorry("eval", world.base, *SETTINGS, f"local.tofu={tofu}") == 2
    assert "give output_dir=FOLDER" in capfd.readouterr().err


def test_gradients_are_an_adapters(
    world: World, tofu: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = (f"local.tofu={tofu}", "metrics=[mia_gradnorm]", f"output_dir={tmp_path / 'out'}")
    assert lorry("eval", world.base, *SETTINGS, *asked) == 2
    assert "mia_gradnorm needs an adapter" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_of_somebody_else_stay(
    world: World, tofu: Path, oracle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    theirs = published(tmp_path / "TOFU_EVAL.json", oracle)
    before = theirs.read_bytes()
    assert lorry("eval", world.base, *SETTINGS, f"local.tofu={tofu}", f"output_dir={tmp_path}") == 2
    assert "TOFU_EVAL.json" in capfd.readouterr().err
    assert theirs.read_bytes() == before


def test_rows_that_do_not_fit_the_context_are_one_error(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = tofu_rows()
    rows["forget05_perturbed"][2]["question"] = "Where? " * 200
    data = write_tofu(tmp_path / "tofu", rows)
    asked = (f"local.tofu={data}", f"output_dir={tmp_path / 'out'}", "metrics=[forget_Q_A_Prob]")
    assert lorry("eval", world.base, *SETTINGS, *asked) == 3
    assert "forget05_perturbed.json:3: question and answer are longer" in capfd.readouterr().err


def test_several_adapters_have_a_folder_each(
    world: World, tofu: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        shutil.copytree(world.run, tmp_path / "both" / name)
    asked = (*SETTINGS, f"local.tofu={tofu}", "metrics=[forget_Q_A_Prob]")
    asked = (*asked, f"adapter={tmp_path / 'both'}", f"output_dir={tmp_path / 'out'}")
    (tmp_path / "out" / "two").mkdir(parents=True)
    theirs = tmp_path / "out" / "two" / "TOFU_EVAL.json"
    theirs.write_text("{}")
    assert lorry("eval", world.base, *asked) == 2
    assert "TOFU_EVAL.json" in capfd.readouterr().err
    assert not (tmp_path / "out" / "one").exists()
    theirs.unlink()
    assert lorry("eval", world.base, *asked) == 0
    values = [read_json(tmp_path / "out" / n / "TOFU_SUMMARY.json") for n in ("one", "two")]
    assert values[0] == values[1]
    assert values[0]["forget_Q_A_Prob"] > 0.3


@pytest.mark.parametrize(
    ("template", "closing"),
    [
        (CHATML, 1),  # the end of turn is one token
        (CHATML.replace("<|im_end|>", "END!"), 5),  # four tokens of plain text, and the end of text
        (None, 1),  # no template: the end of text
    ],
)
def test_what_looks_at_answers_leaves_their_whole_end_out(
    world: World, template: str | None, closing: int
) -> None:
    from lorry.data.encoding.encode import ExampleEncoder
    from lorry.evaluate.unlearning.rows import SuiteRow
    from lorry.evaluate.unlearning.scores import score_answer_tokens
    from lorry.generation.scorer import ModelScorer
    from lorry.models.loading.load import load_model

    model = load_model(str(world.base), dtype="float32", add_note=print).model
    words = tokenizer(template)
    encoder = ExampleEncoder(words, max_length=CONTEXT)
    row = SuiteRow("here:1", "Where does Mara live?", {})
    (one,) = score_answer_tokens(
        ModelScorer(model), encoder, [(row, "Mara lives in Oslo.")], Mix.none()
    )
    answer = words("Mara lives in Oslo.").input_ids
    assert len(one.log_probs[one.answer]) == len(answer)
    assert one.closing == len(one.log_probs) - len(answer) == closing


def test_one_split_is_the_same_rows_wherever_it_lies(tmp_path: Path) -> None:
    """Derived splits, against slices of the whole."""
    from lorry.evaluate.unlearning.rows import load_tofu_split

    def numbered(first: int, count: int) -> list[dict[str, Any]]:
        return [{"question": f"q{at}", "answer": "a"} for at in range(first, first + count)]

    write_rows(tmp_path / "full.json", numbered(0, 4000))
    write_rows(tmp_path / "forget10.json", numbered(3600, 400))
    write_rows(tmp_path / "forget10_perturbed.json", numbered(3600, 400))
    spans = {
        "full": (0, 4000), "retain90": (0, 3600), "retain95": (0, 3800), "retain99": (0, 3960),
        "forget01": (3960, 4000), "forget05": (3800, 4000), "forget10": (3600, 4000),
        "forget05_perturbed": (3800, 4000), "forget01_perturbed": (3960, 4000),
        "holdout05": (3600, 3800), "holdout01": (3920, 3960),
    }  # fmt: skip
    for name, (first, stop) in spans.items():
        rows, note = load_tofu_split(name, {"tofu": str(tmp_path)})
        got = [row.values["question"] for row in rows]
        assert got == [f"q{at}" for at in range(first, stop)], name
        assert bool(note) == name.startswith("holdout")


def test_derived_splits_are_the_published_ones(shared_data: Path, tmp_path: Path) -> None:
    """forget05 and forget01 from full alone, against their own files."""
    from lorry.evaluate.unlearning.rows import load_tofu_split

    shutil.copy(shared_data / "tofu" / "full.json", tmp_path)
    for name in ("forget01", "forget05", "forget10", "retain90"):
        theirs, _ = load_tofu_split(name, {"tofu": str(shared_data / "tofu")})
        ours, _ = load_tofu_split(name, {"tofu": str(tmp_path)})
        assert [row.values for row in ours] == [row.values for row in theirs]
