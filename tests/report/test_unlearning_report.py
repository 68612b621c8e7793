"""What a report shows of unlearning: frontier, ROC, relearning, tables, start and oracle beside them,
and files of evals/ that are damaged or speak of something else.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from lorry.errors import DataError
from lorry.report import write_report
from lorry.report.compare import comparison_row
from lorry.report.curves import ORACLE, START, ChartPanel, CurveSeries, build_panels
from lorry.report.html import render_page
from lorry.report.inline_svg import render_chart
from lorry.report.plots import render_png
from lorry.report.unlearning.curves import unlearning_panels
from lorry.report.unlearning.sections import _suite_columns
from lorry.runs.evals import read_attacks, read_suites
from lorry.runs.read import RunRecord, read_readable_runs
from lorry.runs.summary import describe_run_subject, final_figures
from tests.report.test_charts import drawn, sheet_of
from tests.report.test_html import Page
from tests.support.runs import HOSTILE, dump

ROWS = {"forget": "f" * 64, "holdout": "h" * 64}


def record(value: float, **more: Any) -> dict[str, Any]:
    return {"digest": "d" * 64, "model": "m", "rows": ROWS, "agg_value": value, **more}


def attack(value: float, roc: list[list[float]]) -> dict[str, Any]:
    return record(value, auc=value, roc=roc)


def suite(quality: float | None, utility: float, strength: float, auc: float) -> dict[str, Any]:
    found = {
        "forget_Q_A_PARA_Prob": record(0.25),
        "extraction_strength": record(strength),
        "model_utility": record(utility),
        "mia_min_k": attack(auc, [[0.0, 0.0], [0.5, 1.0], [1.0, 1.0]]),
    }
    return found | ({} if quality is None else {"forget_quality": record(quality)})


class Study:
    """runs/start, runs/oracle, and runs that unlearnt over the start, as the verbs leave them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.weights = b"the start's adapter"
        self.start = self.run("start", {"task": "sft"})
        (self.start / "adapter_model.safetensors").write_bytes(self.weights)
        digest = hashlib.sha256(self.weights).hexdigest()
        dump(self.start / "receipt.json", {"adapters": {"default": digest}})
        self.oracle = self.run("oracle", {"task": "sft"})
        self.write(self.oracle, suite(None, 0.6, 0.15, 0.7))
        self.write(self.start, suite(1e-9, 0.7, 0.95, 1.0))

    def run(self, name: str, config: dict[str, Any]) -> Path:
        path = self.root / name
        path.mkdir(parents=True)
        (path / "run.yaml").write_text(json.dumps(config))
        return path

    @staticmethod
    def write(run: Path, content: dict[str, Any], folder: str = "evals") -> None:
        (run / folder).mkdir(parents=True, exist_ok=True)
        dump(run / folder / "TOFU_EVAL.json", content)

    def logs(self) -> dict[str, Any]:
        path = self.oracle / "evals" / "TOFU_EVAL.json"
        said = json.loads(path.read_text())
        text = json.dumps(said, sort_keys=True)
        values = {name: one["agg_value"] for name, one in said.items()}
        return {
            "path": str(path),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "values": values,
        }

    def unlearned(self, name: str, method: str, rate: float, **values: float) -> Path:
        config = {
            "task": "unlearn", "unlearn": {"method": method}, "train": {"learning_rate": rate},
            "model": {"name": str(self.start)},
        }  # fmt: skip
        path = self.run(name, config)
        origin = {"path": str(self.start), "sha256": "0" * 64}
        dump(path / "receipt.json", {"base": {"name": str(self.start), "start": origin}})
        (path / "start_adapter").mkdir()
        (path / "start_adapter" / "adapter_model.safetensors").write_bytes(self.weights)
        content = suite(**{"quality": 0.3, "utility": 0.5, "strength": 0.2, "auc": 0.8, **values})
        content["forget_quality"]["retain_logs"] = self.logs()
        self.write(path, content)
        return path


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path / "runs")


def runs_of(*paths: Path) -> list[RunRecord]:
    runs, damaged = read_readable_runs(paths)
    assert damaged == []
    return runs


def panels(*paths: Path) -> dict[str, ChartPanel]:
    return {panel.title: panel for panel in unlearning_panels(runs_of(*paths))}


def marks(panel: ChartPanel) -> dict[str, tuple[float, float, str, int]]:
    return {
        s.label: (s.steps[0], s.values[0], s.shape, s.color)
        for s in panel.series
        if s.kind == "mark"
    }


def test_a_frontier_has_the_run_its_start_and_its_oracle(study: Study) -> None:
    run = study.unlearned("npo", "NPO", 1e-4)
    shown = panels(run)
    assert marks(shown["Frontier: forget quality"]) == {
        "npo, NPO, rate 1e-4": (0.5, 0.3, "o", 0),
        "start: start": (0.7, 1e-9, "s", START),
        # the oracle against itself: nothing tells them apart
        "oracle: oracle": (0.6, 1.0, "D", ORACLE),
    }
    level = shown["Frontier: forget quality"].series[0]
    assert (level.kind, set(level.values)) == ("guide", {0.05})
    strengths = marks(shown["Frontier: extraction strength"])
    assert strengths["oracle: oracle"] == (0.6, 0.15, "D", ORACLE)


def test_a_start_or_oracle_among_the_runs_stands_there_once(study: Study) -> None:
    paths = [
        study.start,
        study.oracle,
        study.unlearned("npo", "NPO", 1e-4),
        study.unlearned("slow", "NPO", 3e-5, quality=0.01),
    ]
    assert marks(panels(*paths)["Frontier: forget quality"]) == {
        "start: start": (0.7, 1e-9, "s", 0),
        "oracle: oracle": (0.6, 1.0, "D", 1),
        "npo, NPO, rate 1e-4": (0.5, 0.3, "o", 2),
        "slow, NPO, rate 3e-5": (0.5, 0.01, "o", 3),
    }
    roc = panels(*paths)["ROC of mia_min_k"]
    assert [s.label for s in roc.series if s.kind == "line"] == [
        "start: AUC 1", "oracle: AUC 0.7", "npo: AUC 0.8", "slow: AUC 0.8",
    ]  # fmt: skip
    page = Page(render_page(runs_of(*paths)))
    assert [h for h in page.text["th"] if h.startswith(("start", "oracle"))].count("start") >= 1
    assert "start: start" not in page.text["th"]
    assert "oracle of npo" not in page.text["th"]


def test_a_start_that_is_another_adapter_by_now_is_not_shown(study: Study) -> None:
    """Trained anew under the same name: what its suite says is not of what the run was made from."""
    run = study.unlearned("npo", "NPO", 1e-4)
    dump(study.start / "receipt.json", {"adapters": {"default": "9" * 64}})
    assert "start: start" not in marks(panels(run)["Frontier: forget quality"])
    assert "start: start" not in Page(render_page(runs_of(run))).text["th"]


def test_an_oracle_that_says_something_else_by_now_has_no_curve(study: Study) -> None:
    """Its values were written down when they were compared with, and stay."""
    run = study.unlearned("npo", "NPO", 1e-4)
    roc = panels(run)["ROC of mia_min_k"]
    assert [s.label for s in roc.series] == [
        "chance", "run: AUC 0.8", "start: AUC 1", "oracle: AUC 0.7",
    ]  # fmt: skip
    study.write(study.oracle, suite(None, 0.1, 0.9, 0.4))
    shown = panels(run)
    assert [s.label for s in shown["ROC of mia_min_k"].series][-1] == "start: AUC 1"
    assert marks(shown["Frontier: extraction strength"])["oracle: oracle"][:2] == (0.6, 0.15)


def test_curves_of_other_rows_are_not_drawn_beside(study: Study) -> None:
    run = study.unlearned("npo", "NPO", 1e-4)
    other = suite(1e-9, 0.7, 0.95, 1.0)
    other["mia_min_k"]["rows"] = {**ROWS, "forget": "0" * 64}
    study.write(study.start, other)
    labels = [s.label for s in panels(run)["ROC of mia_min_k"].series]
    assert labels == ["chance", "run: AUC 0.8", "oracle: AUC 0.7"]


def test_runs_asked_other_rows_share_no_frontier(study: Study) -> None:
    """forget05 beside forget10: one chart would compare what cannot be compared."""
    five, ten = study.unlearned("five", "NPO", 1e-4), study.unlearned("ten", "NPO", 1e-4)
    content = json.loads((ten / "evals" / "TOFU_EVAL.json").read_text())
    for one in content.values():
        one["rows"] = {**ROWS, "forget": "0" * 64}
    study.write(ten, content)
    shown = panels(five, ten)
    first, second = (
        set(marks(shown[f"Frontier: extraction strength{what}"]))
        for what in ("", " (other rows, 2)")
    )
    assert first == {"five, NPO, rate 1e-4", "start: start", "oracle: oracle"}
    assert second == {"ten, NPO, rate 1e-4"}
    page = Page(render_page(runs_of(five, ten)))
    assert "Measured on different rows from column to column" in page.all_text()
    # nor is what the start was asked a start for them
    figures = {f.name: f.note for f in final_figures(runs_of(ten)[0])}
    assert figures["extraction strength"] == "TOFU, oracle 0.15"
    assert "start: start" not in Page(render_page(runs_of(ten))).text["th"]


def test_evaluations_during_training_are_a_path_and_levels(study: Study) -> None:
    run = study.unlearned("npo", "NPO", 1e-4)
    lines: list[dict[str, Any]] = [
        {"step": 0, "eval_forget_quality": 1e-8, "eval_model_utility": 0.7,
         "eval_forget_probability": 0.9, "eval_retain_kept": 1.0, "eval_wf_q_a_pert_prob": 0.1},
        {"step": 1, "loss": 2.0, "loss_forget": 1.5, "loss_lambda": 50.0},
        {"step": 1, "eval_forget_quality": 1e-3, "eval_model_utility": 0.6,
         "eval_forget_probability": 0.4, "eval_retain_kept": 0.8},
        {"step": 2, "eval_forget_quality": 0.2, "eval_forget_probability": 0.1},
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = [s for s in panels(run)["Frontier: forget quality"].series if s.kind == "line"]
    # step 2 has no utility, and so no place
    assert [(list(s.steps), list(s.values)) for s in path] == [([0.7, 0.6], [1e-8, 1e-3])]
    curves = {p.title: p for p in build_panels(runs_of(run))}
    assert curves["Loss"].unit == ""
    assert "forget (term of the loss)" in curves
    assert not any("pert" in title for title in curves)
    assert curves["lambda (weight of the retain term)"].series[0].values == [50.0]
    guides = {
        title: [s.label for s in curves[title].series if s.kind == "guide"]
        for title in ("forget probability (evaluation)", "model utility (evaluation)")
    }
    assert guides == {
        "forget probability (evaluation)": ["start 0.9"],
        "model utility (evaluation)": ["start 0.7", "oracle 0.6"],
    }


def attacks_file(run: Path) -> None:
    point = {"extraction_strength": 0.1, "probability": 0.2, "truth_ratio": 0.6}
    curve = [{"step": 0, **point}, {"step": 5, "loss": 3.0, **point, "probability": 0.5}]
    content = {
        "written_by": "lorry attack",
        "relearn": {
            "rows": ROWS["forget"],
            "curves": {"run": curve, "oracle": [{**p, "probability": 0.1} for p in curve]},
            "robustness": {"probability": 0.25},
        },
        "quantize": {
            "rows": ROWS["forget"],
            "values": {"run": {"none": point, "nf4": {**point, "probability": 0.75}}},
            "robustness": {"probability": 0.875},
        },
    }
    dump(run / "evals" / "attacks.json", content)


def test_relearning_is_drawn_beside_the_oracle_and_the_start(study: Study) -> None:
    run = study.unlearned("npo", "NPO", 1e-4)
    attacks_file(run)
    shown = panels(run)
    lines = {
        s.label: (list(s.steps), list(s.values), s.color)
        for s in shown["Relearning: probability"].series
        if s.kind == "line"
    }
    assert lines == {
        "run": ([0, 5], [0.2, 0.5], 0),
        "oracle": ([0, 5], [0.1, 0.1], ORACLE),
    }
    guides = [s.label for s in shown["Relearning: extraction strength"].series if s.color == START]
    assert guides == ["start, all rows 0.95"]
    page = Page(render_page(runs_of(run)))
    assert "nf4, run" in page.text["th"]
    assert {"0.75", "0.25", "0.875"} <= set(page.text["td"])
    # another split's start is no level of these rows
    other = suite(1e-9, 0.7, 0.95, 1.0)
    other["extraction_strength"]["rows"] = {"forget": "0" * 64}
    study.write(study.start, other)
    series = panels(run)["Relearning: extraction strength"].series
    assert [s.label for s in series if s.color == START] == []


def test_tables_and_figures_have_the_suites_values(study: Study) -> None:
    run = study.unlearned("npo", "NPO", 1e-4)
    (record_of_run,) = runs_of(run)
    figures = {f.name: (f.value, f.note) for f in final_figures(record_of_run)}
    assert figures["model utility"] == ("0.5", "TOFU, start 0.7, oracle 0.6")
    assert figures["forget quality"] == ("0.3", "TOFU, start 1e-9")
    page = Page(render_page([record_of_run]))
    assert page.ids().count("unlearning") == 1
    heads = page.text["th"]
    at = heads.index("metric")
    assert heads[at : at + 5] == ["metric", "start: start", "npo", "oracle", "forget quality"]
    # what metrics are made of is left to the file
    assert "forget Q A PARA Prob" not in heads
    assert describe_run_subject(record_of_run)["method"] == "NPO"
    row = comparison_row(record_of_run)
    assert row["TOFU: extraction_strength"] == 0.2


def test_adapters_and_weights_have_points_of_their_own(study: Study) -> None:
    run = study.unlearned("npo", "NPO", 1e-4)
    study.write(run, suite(0.9, 0.55, 0.3, 0.5), "evals/weight0.5")
    # of an evaluation during training metrics.jsonl speaks
    study.write(run, suite(0.9, 0.1, 0.1, 0.5), "evals/step-00000005")
    shown = marks(panels(run)["Frontier: extraction strength"])
    assert shown["npo, weight0.5, NPO, rate 1e-4"] == (0.55, 0.3, "o", 0)
    assert len(shown) == 4


def test_another_weight_has_no_training_path_and_is_no_oracle(study: Study) -> None:
    """What its suite was not asked is not known; the path is that of the whole adapter."""
    run = study.unlearned("npo", "NPO", 1e-4)
    lines = [
        {"step": step, "eval_extraction_strength": strength, "eval_model_utility": 0.6}
        for step, strength in ((2, 0.9), (4, 0.2))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    study.write(run, {"extraction_strength": record(0.55)}, "evals/weight0.5")
    study.write(study.oracle, {"model_utility": record(0.4)}, "evals/weight0.5")
    panel = panels(run, study.oracle)["Frontier: extraction strength"]
    assert set(marks(panel)) == {"npo, NPO, rate 1e-4", "start: start", "oracle: oracle"}
    (path,) = (s for s in panel.series if s.kind == "line")
    assert (path.label, list(path.values)) == ("npo, NPO, rate 1e-4", [0.9, 0.2])
    quality = marks(panels(run, study.oracle)["Frontier: forget quality"])
    assert "oracle, weight0.5" not in str(sorted(quality))


def test_starts_of_one_name_and_oracles_stand_side_by_side(tmp_path: Path) -> None:
    """By their directory: the second run's start is not the first one's."""
    one, two = Study(tmp_path / "one"), Study(tmp_path / "two")
    two.write(two.start, suite(1e-9, 0.6, 0.77, 0.9))
    two.write(two.oracle, suite(None, 0.5, 0.1, 0.65))
    runs = runs_of(one.unlearned("a", "NPO", 1e-4), two.unlearned("b", "NPO", 1e-4))
    columns = dict(_suite_columns(runs, "TOFU"))
    assert list(columns) == [
        "start: one/start", "start: two/start", "a", "b", "oracle of a", "oracle of b",
    ]  # fmt: skip
    strengths = [columns[f"start: {name}/start"]["extraction_strength"] for name in ("one", "two")]
    assert strengths == [0.95, 0.77]
    roc = {panel.title: panel for panel in unlearning_panels(runs)}["ROC of mia_min_k"]
    assert [s.label for s in roc.series] == [
        "chance", "a: AUC 0.8", "b: AUC 0.8", "start: one/start: AUC 1",
        "start: two/start: AUC 0.9", "oracle of a: AUC 0.7", "oracle of b: AUC 0.65",
    ]  # fmt: skip


def test_roc_curves_of_other_rows_have_a_chart_of_their_own(study: Study) -> None:
    five, ten = study.unlearned("five", "NPO", 1e-4), study.unlearned("ten", "NPO", 1e-4)
    content = json.loads((ten / "evals" / "TOFU_EVAL.json").read_text())
    for one in content.values():
        one["rows"] = {**ROWS, "forget": "0" * 64}
    study.write(ten, content)
    shown = panels(five, ten)
    assert [s.label for s in shown["ROC of mia_min_k"].series] == [
        "chance", "five: AUC 0.8", "start: AUC 1", "oracle: AUC 0.7",
    ]  # fmt: skip
    other = [s.label for s in shown["ROC of mia_min_k (other rows, 2)"].series]
    assert other == ["chance", "ten: AUC 0.8"]


def test_a_start_asked_at_another_weight_alone_is_no_start(study: Study) -> None:
    run = study.unlearned("npo", "NPO", 1e-4)
    attacks_file(run)
    (study.start / "evals" / "TOFU_EVAL.json").unlink()
    study.write(study.start, suite(1e-9, 0.7, 0.3, 0.66), "evals/weight0.5")
    shown = panels(run)
    labels = [s.label for s in shown["ROC of mia_min_k"].series]
    assert labels == ["chance", "run: AUC 0.8", "oracle: AUC 0.7"]
    series = shown["Relearning: extraction strength"].series
    assert [s.label for s in series if s.color == START] == []


def test_a_run_of_several_adapters_has_its_start_and_its_weights(study: Study) -> None:
    """Copies of the start lie in the adapters' folders; suites by weight and by adapter."""
    run = study.unlearned("two", "NPO", 1e-4)
    (run / "evals" / "TOFU_EVAL.json").unlink()
    copy = (run / "start_adapter").rename(run / "copy") / "adapter_model.safetensors"
    said = json.loads((run / "receipt.json").read_text())
    dump(run / "receipt.json", {**said, "adapters": {"slow": "1" * 64, "fast": "2" * 64}})
    lines = [{"step": 1, "adapters": {"slow": {"loss": 1.0}, "fast": {"loss": 2.0}}}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, strength in (("slow", 0.4), ("fast", 0.2)):
        inside = run / name / "start_adapter"
        inside.mkdir(parents=True)
        (inside / "adapter_model.safetensors").write_bytes(copy.read_bytes())
        study.write(run, suite(0.3, 0.5, strength, 0.8), f"evals/{name}")
    study.write(run, suite(0.3, 0.6, 0.7, 0.9), "evals/weight0.5/fast")
    study.write(run, suite(0.3, 0.1, 0.1, 0.1), "evals/step-00000002/fast")
    (found,) = runs_of(run)
    assert found.evals.origin == study.start
    assert [s.part for s in found.evals.suites] == ["fast", "slow", "weight0.5/fast"]
    shown = marks(panels(run)["Frontier: extraction strength"])
    assert {label: place[:2] for label, place in shown.items()} == {
        "two, fast, NPO, rate 1e-4": (0.5, 0.2),
        "two, slow, NPO, rate 1e-4": (0.5, 0.4),
        "two, weight0.5/fast, NPO, rate 1e-4": (0.6, 0.7),
        "start: start": (0.7, 0.95),
    }
    heads = [head for head, _ in _suite_columns([found], "TOFU")]
    assert heads == ["start: start", "two, fast", "two, slow", "two, weight0.5/fast"]
    # one adapter that stands on something else: the run has no one start
    (run / "slow" / "start_adapter" / "adapter_model.safetensors").write_bytes(b"another")
    assert runs_of(run)[0].evals.origin is None


def test_marks_lie_where_the_numbers_say(study: Study) -> None:
    run = study.unlearned("npo", "NPO", 1e-4, quality=1e-4)
    panel = panels(run)["Frontier: forget quality"]
    root = drawn(panel)
    place, data = sheet_of(root)
    (left, height), (right, same) = level_ends(root, "faint")
    assert (left, right) == pytest.approx((place["x"], place["x"] + place["width"]), abs=0.1)
    assert height == same
    # from the start's 1e-9 by two decades a tick: up to 10
    share = (1 - math.log10(0.05)) / 10
    assert height == pytest.approx(place["y"] + share * place["height"], abs=0.2)
    assert data["name"] == "model utility"
    assert [s["label"] for s in data["series"]] == [
        "npo, NPO, rate 1e-4", "start: start", "oracle: oracle",
    ]  # fmt: skip
    assert render_png(runs_of(run)).startswith(b"\x89PNG")


def level_ends(root: Any, color: str) -> list[tuple[float, float]]:
    """The ends of the first broken line of a grey, which is the level and not the legend's sample."""
    for path in root.iter("path"):
        style = path.get("style", "")
        if f"var(--{color})" in style and "dasharray" in style:
            numbers = [
                float(one) for one in path.get("d", "").replace("M", "").split() if one != "L"
            ]
            return list(zip(numbers[::2], numbers[1::2], strict=True))
    raise AssertionError("no level is drawn")


def test_a_guide_spans_the_chart_and_is_told_in_words() -> None:
    curve = CurveSeries("run", 0, "line", [0.0, 1.0], [0.2, 0.4])
    guide = CurveSeries("start 0.9", START, "guide", [0.0, 1.0], [0.9, 0.9])
    panel = ChartPanel("p", "", (curve, guide), x_whole=False, x_label="share")
    root = drawn(panel)
    place, _ = sheet_of(root)
    # the axis ends at 0 and 1
    heights = [height for _, height in level_ends(root, "soft")]
    assert heights == pytest.approx([place["y"] + 0.1 * place["height"]] * 2, abs=0.2)
    words = next(e.text for e in root if e.tag == "desc")
    assert words == (
        "p by share. run: 0.2 at share 0, 0.4 at share 1, lowest 0.2, highest 0.4. start 0.9."
    )
    assert [s["label"] for s in sheet_of(root)[1]["series"]] == ["run"]
    assert "start 0.9" in render_chart(panel, "c")


DAMAGED = [
    (
        "TOFU_EVAL.json",
        '{"a": {"agg_value": "high"}}',
        r"a\.agg_value is 'high' instead of a number",
    ),
    ("TOFU_EVAL.json", '{"a": 3}', r"TOFU_EVAL\.json: a: expected a JSON object, got int"),
    (
        "TOFU_EVAL.json",
        '{"a": {"agg_value": 1, "roc": [[0]]}}',
        r"a\.roc: a point has to be a list of two shares",
    ),
    ("TOFU_EVAL.json", '{"a": {"agg_value": 1, "rows": {"forget": 1}}}', r"a\.rows\.forget is '1'"),
    ("TOFU_EVAL.json", '{"a": {"agg_value": NaN}}', "NaN"),
    (
        "TOFU_EVAL.json",
        '{"a": {"agg_value": 1, "retain_logs": {}}}',
        r"retain_logs\.path is 'None'",
    ),
    (
        "TOFU_EVAL.json",
        '{"a": {"agg_value": 1, "retain_logs": {"path": "\\u0000", "sha256": "", "values": {}}}}',
        "retain_logs.path is not a path",
    ),
    ("TOFU_EVAL.json", "[", "TOFU_EVAL"),
    ("attacks.json", '{"relearn": {"curves": {"run": [{"loss": 1}]}}}', "a point has no step"),
    ("attacks.json", '{"relearn": {"curves": {"run": 1}}}', r"relearn\.run is not a list"),
    ("attacks.json", '{"quantize": {"values": {"run": {"nf4": {"a": "b"}}}}}', r"nf4\.a is 'b'"),
]


@pytest.mark.parametrize(("file", "content", "why"), DAMAGED)
def test_a_damaged_file_of_evals_names_the_place_and_hides_no_other_run(
    file: str, content: str, why: str, study: Study
) -> None:
    run = study.unlearned("npo", "NPO", 1e-4)
    (run / "evals" / file).write_text(content)
    runs, damaged = read_readable_runs([study.oracle, run])
    assert [one.name for one in runs] == ["oracle"]
    assert [one.name for one in damaged] == ["npo"]
    with pytest.raises(DataError, match=why):
        (read_suites if file == "TOFU_EVAL.json" else read_attacks)(run)


def test_a_damaged_start_or_oracle_is_a_note(study: Study) -> None:
    run = study.unlearned("npo", "NPO", 1e-4)
    (study.start / "evals" / "TOFU_EVAL.json").write_text("{")
    (study.oracle / "evals" / "TOFU_EVAL.json").write_text("{")
    text = Page(render_page(runs_of(run))).all_text()
    assert "the values of the start are not shown" in text
    assert "the oracle's curves are not shown" in text
    page = write_report([run])
    assert page.is_file()


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_names_stay_text(hostile: str, tmp_path: Path) -> None:
    study = Study(tmp_path / "runs")
    run = study.unlearned("npo", hostile, 1e-4)
    content = json.loads((run / "evals" / "TOFU_EVAL.json").read_text())
    plain = hostile.replace("\0", "")
    logs = {"path": f"/{plain}", "sha256": hostile, "values": {hostile: 0.5}}
    content |= {hostile: attack(0.5, [[0.0, 0.0], [1.0, 1.0]])}
    content["forget_quality"]["retain_logs"] = logs
    study.write(run, content, f"evals/{plain.replace('/', '')}")
    attacks_file(run)
    shown = Page(render_page(runs_of(run)))
    assert {element for element, _ in shown.elements}.isdisjoint({"img", "b", "iframe"})
    assert len(shown.text["script"]) == 1
    assert not any(name.startswith("on") for _, a in shown.elements for name in a)
