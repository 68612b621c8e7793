"""Which curves a report draws, from the metrics of one run or several: charts as data. plots.py
draws them, once for the page and once for the PNG, and nothing else decides what is in a chart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lorry.formatting import byte_scale, format_number
from lorry.runs.read import RunRecord
from lorry.runs.series import EVALUATION_PREFIX, MetricsLog, is_number
from lorry.runs.summary import SUITE_PARTS

TERM_PREFIX = "loss_"  # names of a loss' single terms, and of what is reported like one
SeriesKind = Literal["raw", "line", "points", "mark", "guide"]
MarkShape = Literal["o", "s", "D"]
# colors of what is no run's own: a limit or chance, the start, the oracle
LIMIT, START, ORACLE = -1, -2, -3
# counts of a step; throughput shows what matters of them
NOT_CURVES = {
    "epoch",
    "tokens",
    "supervised_tokens",
    "seconds",
}
SUITE_PARTS_LOGGED = tuple(part.lower() for part in SUITE_PARTS)  # as metrics.jsonl has names
# these in panels of their own
DRAWN_KEYS = NOT_CURVES | {
    "loss",
    "eval_loss",
    "learning_rate",
    "grad_norm",
    "peak_memory_bytes",
}
# values beyond it are treated as infinite: sums and spans of them would overflow
MAX_DRAWABLE = 1e300
MAX_GUIDES = 3  # of starts, and of oracles: more levels than this cannot be told apart
MAX_RAW_SERIES = 3  # with more runs than this only smoothed curves stay readable
# the widest chart has 860 pixels: more means would fall on the same ones
SMOOTH_POINTS = 1000
MAX_DOTS = 60  # more circles than this on a curve would hide it
FEW_POINTS = 10  # shorter series are drawn as they are, since smoothing would hide them


# panels beside the fixed ones: each takes a tenth of a second, and nobody looks at hundreds
MAX_NAMED_PANELS = 40
MAX_ADAPTER_CURVES = 64  # curves of a panel
ADAPTER_PANEL_TITLES = {
    "loss": "Loss of each adapter", "eval_loss": "Held-out loss of each adapter",
    "learning_rate": "Learning rate of each adapter", "grad_norm": "Gradient norm of each adapter",
    "eval_forget_probability": "Forget probability of each adapter",
    "eval_retain_probability": "Retain probability of each adapter",
}  # fmt: skip


@dataclass(frozen=True)
class CurveSeries:
    """One curve: ``label`` says whose it is (empty: the panel's title does), ``color`` is the
    number of its run, or `LIMIT`, `START`, `ORACLE`. A ``guide`` is what the curves are compared with, a thin broken
    line: over the whole width where all its values are the same. A ``mark`` is a filled symbol,
    ``shape`` which one.
    """

    label: str
    color: int
    kind: SeriesKind
    steps: Sequence[float]
    values: Sequence[float]
    in_legend: bool = True
    shape: MarkShape = "o"


@dataclass(frozen=True)
class ChartPanel:
    """One chart: values over ``x_label``, whole numbers unless ``x_whole`` is False. ``from_zero``
    starts its axis there; ``log_if_wide`` takes a log axis when values span three decades, ``log``
    where all are above zero, ``x_log`` the same of x.
    """

    title: str
    unit: str
    series: tuple[CurveSeries, ...]
    from_zero: bool = False
    log_if_wide: bool = False
    x_label: str = "step"
    x_whole: bool = True
    log: bool = False
    x_log: bool = False


def level_guide(label: str, color: int, value: float, places: Sequence[float]) -> CurveSeries:
    """A level that curves over these places are compared with; its number stands in the legend."""
    ends = [min(places), max(places)]
    return CurveSeries(f"{label} {format_number(value)}", color, "guide", ends, [value, value])


def is_drawable(value: float) -> bool:
    """Whether a value has a place on an axis."""
    return abs(value) < MAX_DRAWABLE


def describe_panel(panel: ChartPanel) -> str:
    """The chart in a sentence per curve: where it starts, where it ends, its lowest and highest
    value.
    """
    over = panel.x_label
    sentences = [f"{panel.title} by {'optimizer step' if over == 'step' else over}."]
    for series in panel.series:
        real = [(x, v) for x, v in zip(series.steps, series.values, strict=True) if is_drawable(v)]
        # the thin curve of single steps says what its mean says, with more noise
        if real and series.kind == "guide":
            sentences.append(f"{series.label}.")
        elif real and series.kind != "raw":
            (first, last), values = (real[0], real[-1]), [v for _, v in real]
            start, end = (
                f"{format_number(v)} at {over} {format_number(x)}" for x, v in (first, last)
            )
            spread = f"lowest {format_number(min(values))}, highest {format_number(max(values))}"
            sentences.append(f"{series.label or series.kind}: {start}, {end}, {spread}.")
    return " ".join(sentences)


def build_panels(runs: Sequence[RunRecord]) -> list[ChartPanel]:
    """The charts that the runs' metrics can fill, the loss first, named terms and evaluation
    metrics last.
    """
    # one unit for all runs, by the largest, or curves in MiB and GiB would share an axis
    memory = max((v for run in runs for v in _memory_peaks(run.log) if is_drawable(v)), default=0.0)
    divisor, unit = byte_scale(memory)
    fixed = [
        ChartPanel("Loss", _loss_unit(runs), _loss_series(runs), log_if_wide=True),
        ChartPanel(
            "Learning rate",
            "",
            _point_series(runs, "learning_rate"),
            from_zero=True,
            log_if_wide=True,
        ),
        ChartPanel(
            "Gradient norm",
            "before clipping",
            _smoothed_series(runs, lambda log: log.series("grad_norm")),
            log_if_wide=True,
        ),
        ChartPanel(
            "Throughput", "tokens/s", _smoothed_series(runs, _throughput_points), from_zero=True
        ),
        ChartPanel(
            "Peak memory", unit, _point_series(runs, "peak_memory_bytes", divisor), from_zero=True
        ),
    ]
    names = _named_values(runs)
    # names in the order in which the files have them, so that the same panels come every time
    terms = [_metric_panel(runs, name) for name in names[:MAX_NAMED_PANELS]]
    drawn_panels = [*fixed, *_adapter_panels(runs), *terms]
    return [panel for panel in drawn_panels if any(s.steps for s in panel.series)]


def _named_values(runs: Sequence[RunRecord]) -> list[str]:
    """What metrics.jsonl has under names of its own, without what a suite's metrics are made of."""
    return [
        name
        for name in dict.fromkeys(n for run in runs for n in run.log.names())
        if name not in DRAWN_KEYS
        and not (name.startswith(EVALUATION_PREFIX) and name.endswith(SUITE_PARTS_LOGGED))
    ]


def describe_undrawn(runs: Sequence[RunRecord]) -> str:
    """What `build_panels` leaves out of metrics with very many names, in words; "" where it draws
    all.
    """
    names = _named_values(runs)
    adapters = sum(len(run.log.adapters()) for run in runs)
    left_out = [
        f"{count - most} of {count} {what}"
        for count, most, what in (
            (len(names), MAX_NAMED_PANELS, "named values"),
            (adapters, MAX_ADAPTER_CURVES, "adapters"),
        )
        if count > most
    ]
    return f"Not drawn: {' and '.join(left_out)}; metrics.jsonl has them." if left_out else ""


def _adapter_panels(runs: Sequence[RunRecord]) -> list[ChartPanel]:
    """Loss, held-out loss, rate and gradient norm of each adapter of runs that train several at
    once.
    """
    owners = [(run, adapter) for run in runs for adapter in run.log.adapters()][:MAX_ADAPTER_CURVES]
    panels = []
    for name, title in ADAPTER_PANEL_TITLES.items():
        series = []
        for color, (run, adapter) in enumerate(owners):
            steps, values = run.log.series(name, adapter)
            curve = (
                smooth_curve(steps, values, _smoothing_window(steps))
                if len(steps) > FEW_POINTS
                else (steps, values)
            )
            series.append(
                CurveSeries(
                    adapter if len(runs) == 1 else f"{run.name}, {adapter}", color, "line", *curve
                )
            )
        panels.append(ChartPanel(title, "", tuple(series), log_if_wide=True))
    return panels


def _metric_panel(runs: Sequence[RunRecord], name: str) -> ChartPanel:
    kind = " (evaluation)" if name.startswith(EVALUATION_PREFIX) else ""
    bare = name.removeprefix(EVALUATION_PREFIX)
    if name.startswith(TERM_PREFIX):
        kind, bare = " (term of the loss)", name.removeprefix(TERM_PREFIX)
    title = bare.replace("_", " ") + kind
    if name == f"{TERM_PREFIX}lambda":
        title = "lambda (weight of the retain term)"  # PDU's multiplier, which is no term itself
    if not name.startswith(EVALUATION_PREFIX):
        return ChartPanel(
            title, "", _smoothed_series(runs, lambda log: log.series(name)), log_if_wide=True
        )
    lines = _point_series(runs, name)
    dots = tuple(
        replace(s, kind="points", in_legend=False) for s in lines if len(s.steps) <= MAX_DOTS
    )
    guides = reference_guides(runs, name, [step for line in lines for step in line.steps])
    return ChartPanel(title, "", (*guides, *lines, *dots), log_if_wide=True)


def reference_guides(
    runs: Sequence[RunRecord], name: str, steps: Sequence[float]
) -> list[CurveSeries]:
    """What the start and the oracle have of an evaluation's metric, as far as unlearning runs say:
    the start by the evaluation at step 0, else by its own suite; the oracle by its suite.
    """
    levels: dict[tuple[str, int], dict[float, str]] = {("start", START): {}, ("oracle", ORACLE): {}}
    for run in runs:
        measured = dict(zip(*run.log.series(name), strict=True))
        if run.config.get("task") != "unlearn" or not measured:
            continue
        oracles = [suite.oracle for suite in run.evals.suites if suite.oracle is not None]
        before = measured.get(0)
        of_start = [run.evals.start_values(suite) for suite in run.evals.suites]
        start = suite_value(of_start, name) if before is None else before
        oracle = suite_value([oracle_evals.values for oracle_evals in oracles], name)
        for known, value in zip(levels.values(), (start, oracle), strict=True):
            if value is not None and is_drawable(value):
                known.setdefault(value, run.name)
    return [
        level_guide(what if len(known) == 1 else f"{what} of {owner}", color, value, steps)
        for (what, color), known in levels.items()
        for value, owner in list(known.items())[:MAX_GUIDES]
    ]


def suite_value(suites: Sequence[Mapping[str, float]], evaluation: str) -> float | None:
    """The value of a suite's metric that evaluations during training log as ``evaluation``: there
    it is written small.
    """
    for values in suites:
        for metric, value in values.items():
            if f"{EVALUATION_PREFIX}{metric}".lower() == evaluation.lower():
                return value
    return None


def _memory_peaks(log: MetricsLog) -> list[float]:
    return log.series("peak_memory_bytes")[1]


def _throughput_points(log: MetricsLog) -> tuple[list[int], list[float]]:
    timed = [
        r
        for r in log.training
        if is_number(r.get("tokens")) and is_number(r.get("seconds")) and r["seconds"] > 0
    ]
    return [r["step"] for r in timed], [r["tokens"] / r["seconds"] for r in timed]


def _loss_unit(runs: Sequence[RunRecord]) -> str:
    # of an unlearning method it is anything: a log-ratio, a distance, minus nats
    return "" if any(run.config.get("task") == "unlearn" for run in runs) else "nats per token"


def _loss_series(runs: Sequence[RunRecord]) -> tuple[CurveSeries, ...]:
    evaluated = []
    for color, run in enumerate(runs):
        steps, values = run.log.series("eval_loss")
        if steps:
            evaluated.append(
                CurveSeries(
                    _series_label(runs, run, "evaluation"),
                    color,
                    "points",
                    steps,
                    values,
                    len(runs) == 1,
                )
            )
    return (*_smoothed_series(runs, lambda log: log.series("loss")), *evaluated)


def _series_label(runs: Sequence[RunRecord], run: RunRecord, what: str) -> str:
    """What a curve shows; among several runs, whose it is as well."""
    return what if len(runs) == 1 else f"{run.name}, {what}"


def _point_series(
    runs: Sequence[RunRecord], name: str, divisor: float = 1.0
) -> tuple[CurveSeries, ...]:
    curves = [(color, run.name, *run.log.series(name)) for color, run in enumerate(runs)]
    return tuple(
        CurveSeries(
            label if len(runs) > 1 else "", color, "line", steps, [v / divisor for v in values]
        )
        for color, label, steps, values in curves
        if steps
    )


def _smoothed_series(
    runs: Sequence[RunRecord], pick: Callable[[MetricsLog], tuple[list[int], list[float]]]
) -> tuple[CurveSeries, ...]:
    """The values as they are, thin, under a moving mean; a short series only as it is."""
    raw, lines = [], []
    for color, run in enumerate(runs):
        steps, values = pick(run.log)
        name = run.name if len(runs) > 1 else ""
        if not steps:
            continue
        if len(steps) <= FEW_POINTS:
            lines.append(CurveSeries(name, color, "line", steps, values))
            continue
        if len(runs) <= MAX_RAW_SERIES:
            raw.append(
                CurveSeries(
                    _series_label(runs, run, "each step"),
                    color,
                    "raw",
                    steps,
                    values,
                    len(runs) == 1,
                )
            )
        window = _smoothing_window(steps)
        lines.append(
            CurveSeries(
                name or f"mean of {window} steps",
                color,
                "line",
                *smooth_curve(steps, values, window),
            )
        )
    return (*raw, *lines)


def _smoothing_window(steps: Sequence[float]) -> int:
    """Steps of a moving mean: a twentieth of the series, odd, at least 3."""
    return len(steps) // 40 * 2 + 3


def smooth_curve(
    steps: Sequence[float], values: Sequence[float], window: int
) -> tuple[list[float], list[float]]:
    """The mean over ``window`` steps around each, fewer at the ends; values that have no place on
    an axis are passed over.

    A centred mean and not an exponential one, since that lags behind a falling loss and seems to
    contradict evaluations. Of a long series only about `SMOOTH_POINTS` means are taken, the last
    step's among them: between them it hardly moves.
    """
    half, count = window // 2, len(values)
    chosen = [*range(0, count - 1, math.ceil(count / SMOOTH_POINTS)), count - 1]
    out = []
    for i in chosen:
        around = [v for v in values[max(0, i - half) : i + half + 1] if is_drawable(v)]
        out.append(sum(around) / len(around) if around else math.nan)
    return [steps[i] for i in chosen], out


def thin_curve(
    steps: Sequence[float], values: Sequence[float], most: int
) -> tuple[list[float], list[float]]:
    """At most about ``most`` points that draw the same curve: the lowest and highest of each
    stretch, and every gap.

    A value that is not finite survives as one NaN of its stretch, so that a break in a long curve
    is never smoothed away.
    """
    if len(steps) <= most:
        return list(steps), list(values)
    # two points of each stretch, so half as many stretches as points
    width = math.ceil(2 * len(steps) / most)
    chosen: list[int] = []
    for start in range(0, len(steps), width):
        stretch = range(start, min(start + width, len(steps)))
        finite = [i for i in stretch if is_drawable(values[i])]
        keep = (
            {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
            if finite
            else set()
        )
        keep |= (
            {next(i for i in stretch if not is_drawable(values[i]))}
            if len(finite) < len(stretch)
            else set()
        )
        chosen += sorted(keep | {i for i in (0, len(steps) - 1) if i in stretch})
    return [steps[i] for i in chosen], [values[i] for i in chosen]
