"""The charts that unlearning adds to a report, as data: the frontier of what was forgotten against
what was kept, ROC curves of attacks on membership, relearning. Start and oracle stand in each, where
files say what they have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from lorry.formatting import format_number
from lorry.report.curves import (
    LIMIT,
    ORACLE,
    START,
    ChartPanel,
    CurveSeries,
    MarkShape,
    is_drawable,
    level_guide,
)
from lorry.runs.evals import OracleValues, SuiteRecord
from lorry.runs.layout import SUITES
from lorry.runs.read import RunRecord
from lorry.runs.series import EVALUATION_PREFIX

# above it a KS test does not tell a model from the oracle
FORGET_QUALITY_LEVEL = 0.05
RELEARN_PANELS = {  # what `lorry attack` measures: the suite's name of the same
    "extraction_strength": "extraction_strength",
    "probability": "forget_Q_A_Prob",
    "truth_ratio": "forget_truth_ratio",
}
ORACLE_SIDE = "oracle"  # of attacks.json


@dataclass(frozen=True)
class Frontier:
    """A metric of what was forgotten against one of what was kept. ``own``: what the oracle has of
    it by definition, which its file does not say.
    """

    forgotten: str
    kept: str
    log: bool = False
    level: float | None = None
    own: float | None = None


FRONTIERS = (
    Frontier("forget_quality", "model_utility", log=True, level=FORGET_QUALITY_LEVEL, own=1.0),
    Frontier("extraction_strength", "model_utility"),
    Frontier("extraction_strength", "retain_knowmem_ROUGE"),  # MUSE has no utility
    Frontier("forget_knowmem_ROUGE", "retain_knowmem_ROUGE"),
    Frontier("wmdp_bio", "mmlu"),
    Frontier("wmdp_cyber", "mmlu"),
)


@dataclass(frozen=True)
class FrontierPoint:
    """A point of a frontier: a run, or one adapter of it, with its suite's values and its path
    through the evaluations during training, which one at another weight has none of (``run`` is
    None); ``rows``: {metric: {role: digest of its rows}}.
    """

    label: str
    color: int
    shape: MarkShape
    values: Mapping[str, float]
    run: RunRecord | None = None
    adapter: str | None = None
    rows: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def place(self, frontier: Frontier) -> tuple[float, float] | None:
        """(kept, forgotten), None where one of them is not known."""
        pair = self.values.get(frontier.kept), self.values.get(frontier.forgotten)
        # the oracle's file was not compared with itself
        if pair[1] is None and self.shape == "D":
            pair = pair[0], frontier.own
        return _drawable_pair(*pair) or next(iter(self.path(frontier)[-1:]), None)

    def path(self, frontier: Frontier) -> list[tuple[float, float]]:
        """The places at the evaluations during training that measured both."""
        if self.run is None:
            return []
        # logged in small letters, where the suite's file has capitals
        names = {name.lower(): name for name in self.run.log.names()}
        utilities, forgotten = (
            dict(zip(*self.run.log.series(names.get(wanted, wanted), self.adapter), strict=True))
            for wanted in (
                f"{EVALUATION_PREFIX}{metric}".lower()
                for metric in (frontier.kept, frontier.forgotten)
            )
        )
        pairs = (_drawable_pair(utilities[step], forgotten.get(step)) for step in utilities)
        return [pair for pair in pairs if pair is not None]


def _drawable_pair(x: float | None, y: float | None) -> tuple[float, float] | None:
    if x is None or y is None or not is_drawable(x) or not is_drawable(y):
        return None
    return x, y


def unlearning_panels(runs: Sequence[RunRecord]) -> list[ChartPanel]:
    """Frontiers, ROC curves, relearning: those that the runs' files can fill."""
    points = list(frontier_points(runs))
    frontiers = (
        _frontier_panel(frontier, group, number)
        for frontier in FRONTIERS
        for number, group in enumerate(_by_rows(frontier, points), 1)
    )
    panels = [*frontiers, *_roc_panels(runs), *_relearn_panels(runs)]
    # a chart of nothing but start, oracle and limits says nothing of these runs
    return [panel for panel in panels if any(series.color >= 0 for series in panel.series)]


def method_and_rate(run: RunRecord, adapter: str | None = None) -> str:
    """How a run, or one of its adapters, unlearnt: ``NPO, rate 1e-4``; empty where it did not."""
    method = run.settings_group("unlearn", adapter).get("method")
    if run.config.get("task") != "unlearn" or method is None:
        return ""
    rate = run.settings_group("train", adapter).get("learning_rate")
    return f"{method}, rate {format_number(rate)}" if rate is not None else str(method)


def frontier_points(runs: Sequence[RunRecord]) -> Iterator[FrontierPoint]:
    """Every run or adapter with a suite, or measured by one while it trained; then the starts and
    oracles of these that are none of the runs themselves.
    """
    places = {run.path.resolve(): run for run in runs}
    origins = [(run.evals.origin.resolve(), run) for run in runs if run.evals.origin is not None]
    starts = {path for path, _ in origins}
    # with the suite that was compared with it, whose rows are its rows
    oracles: dict[Path, tuple[OracleValues, SuiteRecord]] = {}
    for run in runs:
        for suite in run.evals.suites:
            if suite.oracle is not None:
                oracles.setdefault(run_of_logs(suite.oracle), (suite.oracle, suite))
    labels = start_labels(runs)
    for color, (path, run) in enumerate(places.items()):
        adapters = run.log.adapters()
        suites = run.evals.suites
        # without one a run may still have been measured by a suite while it trained
        if not any(suite.part in ("", *adapters) for suite in suites):
            suites = (SuiteRecord("", "", {}, {}, {}), *suites)
        for part in dict.fromkeys(suite.part for suite in suites):
            values = {n: v for s in suites if s.part == part for n, v in s.values.items()}
            rows = {n: r for s in suites if s.part == part for n, r in s.rows.items()}
            name = part.rpartition("/")[2]  # of WEIGHT/ADAPTER
            adapter = name if name in adapters else None
            # at another weight it is another model: not what trained, no start, no oracle
            trained = part in ("", *adapters)
            shape: MarkShape = "o"
            if trained:
                shape = "s" if path in starts else "D" if path in oracles else "o"
            whose = {"s": "start: ", "D": "oracle: ", "o": ""}[shape] + run.name
            how = method_and_rate(run, adapter)
            label = ", ".join(text for text in (whose, part, how) if text)
            yield FrontierPoint(
                label, color, shape, values, run if trained else None, adapter, rows
            )
    seen = set[tuple[Path, str]]()
    for path, run in origins:
        for part in dict.fromkeys(suite.part for suite in run.evals.suites):
            own = [suite for suite in run.evals.suites if suite.part == part]
            rows = {n: r for suite in own for n, r in suite.rows.items()}
            # once for all runs that were asked the same
            if path not in places and (path, str(rows)) not in seen:
                seen.add((path, str(rows)))
                values = {n: v for s in own for n, v in run.evals.start_values(s).items()}
                yield FrontierPoint(f"start: {labels[path]}", START, "s", values, rows=rows)
    for path, (oracle, suite) in oracles.items():
        if path not in places:
            label = f"oracle: {path.name}"
            yield FrontierPoint(label, ORACLE, "D", oracle.values, rows=suite.rows)


def start_labels(runs: Sequence[RunRecord]) -> dict[Path, str]:
    """{a start's directory: its name}, with as much of the path as tells starts of one name apart."""
    paths = {run.evals.origin.resolve() for run in runs if run.evals.origin is not None}
    labels = {}
    for path in paths:
        same = [other for other in paths if other.name == path.name]
        pair = [other for other in same if other.parent.name == path.parent.name]
        labels[path] = (
            path.name if len(same) == 1
            else f"{path.parent.name}/{path.name}" if len(pair) == 1
            else str(path)
        )  # fmt: skip
    return labels


def run_of_logs(oracle: OracleValues) -> Path:
    """The directory of the run whose evals/ the oracle's file lies in; of another file, its folder."""
    folder = Path(oracle.path).parent.resolve()
    return folder.parent if folder.name == SUITES else folder


def _by_rows(frontier: Frontier, points: Sequence[FrontierPoint]) -> list[list[FrontierPoint]]:
    """Points of the same rows: numbers of another split have no place in one chart. Those that say
    no rows (of a run that is still training) stand in each.
    """
    groups: dict[str, list[FrontierPoint]] = {}
    for point in points:
        rows = point.rows.get(frontier.forgotten)
        if rows:
            groups.setdefault(str(sorted(rows.items())), [])
    for point in points:
        rows = point.rows.get(frontier.forgotten)
        for key, group in groups.items():
            if not rows or key == str(sorted(rows.items())):
                group.append(point)
    return list(groups.values()) or [list(points)]


def _frontier_panel(frontier: Frontier, points: Sequence[FrontierPoint], number: int) -> ChartPanel:
    series: list[CurveSeries] = []
    drawn = set[tuple[str, tuple[float, float] | None]]()
    for point in points:
        path, place = point.path(frontier), point.place(frontier)
        # a start of several runs, of which one was asked for more metrics than the other
        if (point.label, place) in drawn:
            continue
        drawn.add((point.label, place))
        if len(path) > 1:
            utilities, forgotten = zip(*path, strict=True)
            series.append(
                CurveSeries(point.label, point.color, "line", utilities, forgotten, False)
            )
            series.append(
                CurveSeries(point.label, point.color, "points", utilities, forgotten, False)
            )
        if place is not None:
            x, y = place
            series.append(
                CurveSeries(point.label, point.color, "mark", [x], [y], shape=point.shape)
            )
    places = [x for curve in series for x in curve.steps]
    if frontier.level is not None and places:
        series.insert(
            0, level_guide("distinguishable from the oracle below", LIMIT, frontier.level, places)
        )
    other = f" (other rows, {number})" if number > 1 else ""
    title = f"Frontier: {_plain(frontier.forgotten)}{other}"
    return ChartPanel(
        title, "", tuple(series), log=frontier.log, x_whole=False, x_label=_plain(frontier.kept)
    )


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _roc_panels(runs: Sequence[RunRecord]) -> Iterator[ChartPanel]:
    """A chart per attack and rows: how many of the rows never seen a threshold finds, against how
    many of the forgotten ones it takes for such.
    """
    owners = [(color, run, s) for color, run in enumerate(runs) for s in run.evals.suites]
    labels = start_labels(runs)
    for attack in dict.fromkeys(name for _, _, suite in owners for name in suite.rocs):
        # of another split they are no curves to compare
        groups: dict[str, list[tuple[int, RunRecord, SuiteRecord]]] = {}
        for owner in owners:
            if attack in owner[2].rocs:
                groups.setdefault(str(sorted(owner[2].rows[attack].items())), []).append(owner)
        for number, group in enumerate(groups.values(), 1):
            # above the diagonal forgotten rows still look like members, below it they are shunned
            series = [CurveSeries("chance", LIMIT, "guide", [0.0, 1.0], [0.0, 1.0])]
            for color, run, suite in group:
                name = ", ".join(text for text in (run.name, suite.part) if text)
                label = name if len(owners) + len(runs) > 2 else "run"
                series.append(_roc_curve(label, color, suite, attack))
            other = f" (other rows, {number})" if number > 1 else ""
            yield ChartPanel(
                f"ROC of {attack}{other}", "share of holdout rows",
                (*series, *_roc_beside(runs, labels, group, attack)),
                x_label="share of forget rows", x_whole=False,
            )  # fmt: skip


def _roc_beside(
    runs: Sequence[RunRecord],
    labels: Mapping[Path, str],
    group: Sequence[tuple[int, RunRecord, SuiteRecord]],
    attack: str,
) -> Iterator[CurveSeries]:
    """The curves of each start and oracle of these runs that is none of the runs itself, of the same
    rows only.
    """
    shown = {run.path.resolve() for run in runs}
    starts: dict[Path, SuiteRecord] = {}
    oracles: dict[str, tuple[str, SuiteRecord]] = {}
    for _, run, suite in group:
        own = suite.rows[attack]
        origin = run.evals.origin.resolve() if run.evals.origin is not None else None
        start = run.evals.start_suite(suite.title)
        # one that is among the runs has its curve there
        if origin is not None and origin not in shown and _has_roc(start, attack, own):
            starts.setdefault(origin, start)
        if suite.oracle is not None and run_of_logs(suite.oracle) not in shown:
            oracle = run.evals.oracles.get(suite.oracle.sha256)
            if _has_roc(oracle, attack, own):
                name = ", ".join(text for text in (run.name, suite.part) if text)
                oracles.setdefault(suite.oracle.sha256, (name, oracle))
    for path, start in starts.items():
        label = "start" if len(starts) == 1 else f"start: {labels[path]}"
        yield _roc_curve(label, START, start, attack)
    for name, oracle in oracles.values():
        label = "oracle" if len(oracles) == 1 else f"oracle of {name}"
        yield _roc_curve(label, ORACLE, oracle, attack)


def _has_roc(
    suite: SuiteRecord | None, attack: str, rows: Mapping[str, str]
) -> TypeGuard[SuiteRecord]:
    return suite is not None and bool(suite.rocs.get(attack)) and suite.rows[attack] == rows


def _roc_curve(label: str, color: int, suite: SuiteRecord, attack: str) -> CurveSeries:
    forgotten, unseen = zip(*suite.rocs[attack], strict=True)
    auc = format_number(suite.values[attack])
    return CurveSeries(f"{label}: AUC {auc}", color, "line", forgotten, unseen)


def _relearn_panels(runs: Sequence[RunRecord]) -> Iterator[ChartPanel]:
    """What comes back by fine-tuning on a part of the rows: the others' metrics by step."""
    attacked = [
        (color, run, run.evals.attacks)
        for color, run in enumerate(runs)
        if run.evals.attacks is not None and run.evals.attacks.relearn
    ]
    for metric, in_suite in RELEARN_PANELS.items():
        series: list[CurveSeries] = []
        beside: dict[tuple[str, tuple[float, ...]], CurveSeries] = {}
        for color, run, attacks in attacked:
            for side, curve in attacks.relearn.items():
                points = [(p["step"], p[metric]) for p in curve if metric in p]
                if not points:
                    continue
                steps, values = zip(*points, strict=True)
                if side == ORACLE_SIDE:
                    # runs of one study were attacked beside one oracle
                    reference_curve = CurveSeries(side, ORACLE, "line", steps, values)
                    beside.setdefault((side, values), reference_curve)
                    continue
                name = run.name if len(runs) > 1 else side
                series.append(CurveSeries(name, color, "line", steps, values))
                series.append(CurveSeries(name, color, "points", steps, values, False))
                start = _start_value(run, in_suite, attacks.rows.get("relearn"))
                if start is not None and is_drawable(start):
                    guide = level_guide("start, all rows", START, start, steps)
                    beside.setdefault(("start", (start,)), guide)
        yield ChartPanel(f"Relearning: {_plain(metric)}", "", (*series, *beside.values()))


def _start_value(run: RunRecord, metric: str, rows: str | None) -> float | None:
    """The start's value of a metric of these very rows, as it is and at no other weight."""
    return next(
        (
            suite.values[metric]
            for suite in run.evals.start
            if not suite.part
            and metric in suite.values
            and suite.rows[metric].get("forget") == rows
        ),
        None,
    )
