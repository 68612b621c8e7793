"""The charts of a report, drawn by matplotlib without a display: `draw_panel` draws one, for the
page (inline_svg.py) and for the PNG, which goes where a page cannot.

What is in a chart is decided in curves.py, its ticks in axes.py; here is only how it looks.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lorry.report.axes import step_axis, value_axis
from lorry.report.curves import (
    LIMIT,
    ORACLE,
    START,
    ChartPanel,
    CurveSeries,
    build_panels,
    is_drawable,
    thin_curve,
)
from lorry.report.unlearning.curves import unlearning_panels
from lorry.runs.ownership import SOFTWARE
from lorry.runs.read import RunRecord
from lorry.visible import make_visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of page.css, light: of curves in the order of their runs, and of the rest.
SERIES_COLORS = (
    "#2a78d6",
    "#e0662f",
    "#12966a",
    "#b98200",
    "#d0568c",
    "#4a3aa7",
    "#4f7f12",
    "#d23b3b",
)
INK, SOFT, FAINT, GRID, CARD, BAD = (
    "#16181d", "#565b66", "#868b96", "#ecedea", "#ffffff", "#b42323",
)  # fmt: skip
PAGE_COLORS = {color: f"var(--c{number})" for number, color in enumerate(SERIES_COLORS)} | {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    FAINT: "var(--faint)",
    GRID: "var(--grid)",
    CARD: "var(--card)",
    BAD: "var(--bad)",
}
DASHES = ("-", "--", ":")  # of the first eight runs, the next, and those after them
# greys and dashes (points of line and gap) of what is no run's own
GREYS = {LIMIT: (FAINT, (0, (1, 2))), START: (SOFT, (0, (5, 3))), ORACLE: (INK, (0, (6, 2, 1, 2)))}
PNG_DPI = 110
PNG_WIDTH, PNG_HEIGHT = 430, 235  # of a chart in the PNG, in points, without its legend
PNG_TITLE = 36  # points above the charts
# points around the curves: the longest labels of ticks, the title, the ticks and the name of x
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 48, 14, 24, 34
CHARACTER_WIDTH = 5.2  # mean width of a character of a legend, in points; generous
LEGEND_LINE = 12  # height in points
MAX_LEGEND_NAME = 44
MAX_PLOT_POINTS = 1500
MAX_NONFINITE_MARKS = 40


def render_png(runs: Sequence[RunRecord]) -> bytes:
    """All panels of the runs in two columns, as the bytes of a PNG file; a note in their place when
    there are none.
    """
    # most of a second, only for those who draw
    from matplotlib.figure import Figure

    built = [*unlearning_panels(runs), *build_panels(runs)]  # as on the page
    panels = [thin_panel(panel, MAX_PLOT_POINTS) for panel in built]
    rows = [panels[at : at + 2] for at in range(0, len(panels), 2)]
    heights = [PNG_HEIGHT + max(legend_height(panel, PNG_WIDTH) for panel in row) for row in rows]
    width, height = 2 * PNG_WIDTH, sum(heights) + PNG_TITLE
    # matplotlib counts in inches of 72 points
    figure = Figure(figsize=(width / 72, height / 72), dpi=PNG_DPI)
    title = escape_label(runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side")
    figure.text(
        0.5,
        1 - PNG_TITLE / 2 / height,
        title if panels else f"{title}: no step has been recorded yet",
        ha="center",
        va="center",
        fontsize=13,
    )
    bottom = float(sum(heights))
    for row, tall in zip(rows, heights, strict=True):
        bottom -= tall
        for column, panel in enumerate(row):
            box = (column * PNG_WIDTH, bottom, PNG_WIDTH, tall)
            draw_panel(add_chart_axes(figure, panel, box), panel, PNG_WIDTH)
    return encode_png(figure)


def render_panel_png(panel: ChartPanel) -> bytes:
    """One chart as the bytes of a PNG file."""
    from matplotlib.figure import Figure

    width, height = 2 * PNG_WIDTH, 2 * PNG_HEIGHT + legend_height(panel, 2 * PNG_WIDTH)
    figure = Figure(figsize=(width / 72, height / 72), dpi=PNG_DPI)
    draw_panel(add_chart_axes(figure, panel, (0, 0, width, height)), panel, width)
    return encode_png(figure)


def add_chart_axes(
    figure: Figure, panel: ChartPanel, box: tuple[float, float, float, float]
) -> Axes:
    """Axes for a chart in a box (left, bottom, width, height) of a figure, in points.

    The margins are fixed: matplotlib's own layout measures every text twice, which takes as long as
    the drawing.
    """
    left, bottom, width, height = box
    top = MARGIN_TOP + legend_height(panel, int(width))
    across, up = (72 * inches for inches in figure.get_size_inches())
    return figure.add_axes(
        (
            (left + MARGIN_LEFT) / across,
            (bottom + MARGIN_BOTTOM) / up,
            (width - MARGIN_LEFT - MARGIN_RIGHT) / across,
            (height - top - MARGIN_BOTTOM) / up,
        )
    )


def encode_png(figure: Figure) -> bytes:
    """The bytes of a PNG file that says in its first bytes that it is ours. A character of a name
    that matplotlib's own font lacks (Chinese, a control character made visible) is a box in it; the
    page has the name.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    out = io.BytesIO()
    with warnings.catch_warnings():
        # one line of it for each such character, naming a file of ours and nothing to do
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from font", category=UserWarning
        )
        FigureCanvasAgg(figure).print_png(out, metadata=SOFTWARE)
    return out.getvalue()


def thin_panel(panel: ChartPanel, most: int) -> ChartPanel:
    """The same chart with at most about ``most`` points in a curve."""
    thinned = [thin_curve(series.steps, series.values, most) for series in panel.series]
    return replace(
        panel,
        series=tuple(
            replace(series, steps=steps, values=values)
            for series, (steps, values) in zip(panel.series, thinned, strict=True)
        ),
    )


def draw_panel(axes: Axes, panel: ChartPanel, width: int) -> None:
    """One chart with its title and legend, which is laid out for a figure of ``width`` points."""
    real = [v for series in panel.series for v in series.values if is_drawable(v)]
    values = value_axis(real, panel.from_zero, panel.log_if_wide, log=panel.log)
    places, count = [x for series in panel.series for x in series.steps], width // 100
    steps = (
        step_axis(places, count)
        if panel.x_whole
        else value_axis(places, count=count, log=panel.x_log)
    )
    if values.log:
        axes.set_yscale("log")
    if steps.log:
        axes.set_xscale("log")
    for series in panel.series:
        _draw_curve(axes, series, values.log)
    _mark_nonfinite(axes, panel)
    axes.minorticks_off()
    axes.set_xlim(steps.low, steps.high)
    axes.set_ylim(values.low, values.high)
    axes.set_xticks(steps.ticks, steps.labels)
    axes.set_yticks(values.ticks, values.labels)
    axes.tick_params(labelsize=8, labelcolor=FAINT, left=False, color=FAINT)
    axes.set_xlabel(escape_label(panel.x_label), fontsize=8.5, color=FAINT)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    title = f"{panel.title} ({panel.unit})" if panel.unit else panel.title
    axes.set_title(
        escape_label(title),
        loc="left",
        fontsize=10.5,
        fontweight="bold",
        color=INK,
        pad=7 + legend_height(panel, width),  # points: the legend lies between title and curves
    )
    columns, lines = _legend_shape(panel, width)
    if lines:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            borderaxespad=0.1,
            ncols=columns,
            fontsize=8,
            labelcolor=SOFT,
            frameon=False,
            borderpad=0,
            labelspacing=0.4,
        )


def series_color(series: CurveSeries) -> str:
    """The colour of its run; a grey for what is no run's."""
    if series.color < 0:
        return GREYS[series.color][0]
    return SERIES_COLORS[series.color % len(SERIES_COLORS)]


def _dash(series: CurveSeries) -> str | tuple[int, tuple[int, ...]]:
    if series.color < 0:
        return GREYS[series.color][1]
    return DASHES[series.color // len(SERIES_COLORS) % len(DASHES)]


def _draw_curve(axes: Axes, series: CurveSeries, log: bool) -> None:
    # what has no place on the axis is a gap
    shown = [v if is_drawable(v) and (v > 0 or not log) else math.nan for v in series.values]
    if series.kind == "guide" and len(set(series.values)) == 1:
        # behind the curves, and over the whole width: the axis may reach beyond their ends
        axes.axhline(
            shown[0], color=series_color(series), linestyle=_dash(series), linewidth=1.1, zorder=1,
            label=_legend_name(series) or "_",
        )  # fmt: skip
        return
    dots = series.kind in ("points", "mark")
    axes.plot(
        series.steps,
        shown,
        color=series_color(series),
        label=_legend_name(series) or "_",  # matplotlib leaves names with an underscore out
        linestyle=_dash(series),
        linewidth={"raw": 0.8, "line": 1.8, "points": 0, "mark": 0, "guide": 1.1}[series.kind],
        alpha=0.45 if series.kind == "raw" else 1,
        marker=series.shape if dots or _has_lone_point(shown) else None,
        markevery=None if dots else _lone_points(shown),
        markersize={"points": 5, "mark": 7}.get(series.kind, 3),
        markerfacecolor=CARD if series.kind == "points" else None,
        # nothing lies outside of the axes, and at their edge a line keeps its width
        clip_on=False,
        solid_capstyle="round",
    )


def _lone_points(values: Sequence[float]) -> list[int]:
    """Places of values between two gaps, through which no line goes."""
    # framed by gaps: the first and the last value may stand alone as well
    gaps = [True, *map(math.isnan, values), True]
    return [at for at in range(len(values)) if gaps[at] and not gaps[at + 1] and gaps[at + 2]]


def _has_lone_point(values: Sequence[float]) -> bool:
    return bool(_lone_points(values))


def _mark_nonfinite(axes: Axes, panel: ChartPanel) -> None:
    """A cross on the upper edge at each step whose value is NaN or infinite: a gap alone is easily
    missed.
    """
    steps = dict.fromkeys(
        step
        for series in panel.series
        for step, value in zip(series.steps, series.values, strict=True)
        if not is_drawable(value)
    )
    if not steps:
        return
    # a run that diverged has thousands: a bar of crosses says no more than forty
    shown = list(steps)[:MAX_NONFINITE_MARKS]
    edge = axes.get_xaxis_transform()  # x in steps, y as a share of the height
    axes.plot(shown, [1] * len(shown), "x", color=BAD, markersize=5, transform=edge, clip_on=False)
    axes.text(
        1, 0.97, "× not a number", transform=axes.transAxes, ha="right", va="top", fontsize=8,
        color=FAINT,
    )  # fmt: skip


def legend_height(panel: ChartPanel, width: int) -> int:
    """Points that the legend of a chart takes in a figure of so many."""
    return LEGEND_LINE * _legend_shape(panel, width)[1]


def _legend_shape(panel: ChartPanel, width: int) -> tuple[int, int]:
    """(columns, lines) of the legend; matplotlib makes columns but does not count them."""
    names = [name for series in panel.series if (name := _legend_name(series))]
    if not names:
        return 1, 0
    longest = max(map(len, names))
    columns = max(
        1,
        min(
            len(names),
            int((width - MARGIN_LEFT - MARGIN_RIGHT) // (40 + CHARACTER_WIDTH * longest)),
        ),
    )
    return columns, -(-len(names) // columns)


def _legend_name(series: CurveSeries) -> str:
    """What the legend says of a curve; empty where it says nothing."""
    if not series.label or not series.in_legend:
        return ""
    name = series.label
    return escape_label(name if len(name) <= MAX_LEGEND_NAME else name[: MAX_LEGEND_NAME - 1] + "…")


def clean_text(text: str) -> str:
    """One line of text that XML can hold."""
    line = " ".join(make_visible(text).split())
    return line.translate({0xFFFE: "\ufffd", 0xFFFF: "\ufffd"})


def escape_label(text: str) -> str:
    """Text that matplotlib will not take for a formula or, by a leading underscore, leave out of
    the legend.
    """
    escaped = clean_text(text).replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped
