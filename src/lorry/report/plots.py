"""The report's curves as a PNG, for places where a page cannot go; drawn by matplotlib without a
display.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorry.report.axes import is_wide
from lorry.report.curves import ChartPanel, CurveSeries, build_panels, is_drawable, thin_curve
from lorry.runs.ownership import SOFTWARE
from lorry.runs.read import RunRecord
from lorry.visible import make_visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# page.css, light
PLOT_COLORS = (
    "#2a78d6",
    "#e0662f",
    "#12966a",
    "#b98200",
    "#d0568c",
    "#4a3aa7",
    "#4f7f12",
    "#d23b3b",
)
MAX_PLOT_POINTS = 1500


def render_png(runs: Sequence[RunRecord]) -> bytes:
    """All panels of the runs in two columns, as the bytes of a PNG file; a note in their place when
    there are none.
    """
    # most of a second, only for those who draw
    from matplotlib.backends.backend_agg import (
        FigureCanvasAgg,
    )
    from matplotlib.figure import Figure

    drawn = build_panels(runs)
    rows = max(1, (len(drawn) + 1) // 2)
    figure = Figure(figsize=(12, 3.2 * rows + 0.6), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"
    figure.suptitle(
        escape_mathtext(title)
        if drawn
        else f"{escape_mathtext(title)}: no step has been recorded yet",
        fontsize=13,
    )
    for index, panel in enumerate(drawn):
        _draw_panel(figure.add_subplot(rows, 2, index + 1), panel)
    out = io.BytesIO()
    canvas.print_png(out, metadata=SOFTWARE)
    return out.getvalue()


def _draw_panel(axes: Axes, panel: ChartPanel) -> None:
    for series in panel.series:
        _draw_curve(axes, series)
    axes.set_title(
        escape_mathtext(panel.title + (f" ({panel.unit})" if panel.unit else "")),
        loc="left",
        fontsize=10,
        fontweight="bold",
    )
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#ecedea")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    real = [v for s in panel.series for v in s.values if is_drawable(v)]
    if panel.log_if_wide and is_wide(real):
        axes.set_yscale("log")
    elif panel.from_zero and real and min(real) >= 0 and max(real) > 0:
        axes.set_ylim(0, max(real) * 1.08)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, fontsize=8, frameon=False)


def _draw_curve(axes: Axes, series: CurveSeries) -> None:
    steps, values = thin_curve(series.steps, series.values, MAX_PLOT_POINTS)
    shown = [v if is_drawable(v) else float("nan") for v in values]
    named = series.label and series.in_legend
    marker = "o" if series.kind == "points" or len(steps) == 1 else None
    axes.plot(
        steps,
        shown,
        color=PLOT_COLORS[series.color % len(PLOT_COLORS)],
        label=escape_mathtext(series.label) if named else "_",
        linewidth={"raw": 0.8, "line": 1.8, "points": 0}[series.kind],
        alpha=0.4 if series.kind == "raw" else 1,
        marker=marker,
        markersize=5,
        markerfacecolor="white" if series.kind == "points" else None,
    )


def escape_mathtext(text: str) -> str:
    """Text that matplotlib will not take for a formula or, by a leading underscore, leave out of
    the legend.
    """
    escaped = make_visible(text).replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped
