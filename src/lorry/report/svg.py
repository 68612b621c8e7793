"""Line charts as SVG written by hand: axes with round ticks, units, a legend, and a title and
description for readers who cannot see them. Colours come from the page's style sheet, so that one
chart serves light and dark.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lorry.formatting import format_number
from lorry.report.axes import ChartAxis, step_axis, value_axis
from lorry.report.curves import ChartPanel, CurveSeries, is_drawable, thin_curve
from lorry.report.markup import SafeHtml, html_tag, join_html

SVG_COLOR_COUNT = 8  # of the style sheet; further runs take them again with another dash
CHARACTER_WIDTH = (
    6.2  # mean width of a character at the font size of the charts, in the chart's units
)
LEGEND_LINE = 18
MAX_LEGEND_NAME = 44
MAX_CURVE_MARKS = 40


@dataclass(frozen=True)
class ChartFrame:
    """Where the curves lie inside a chart, in its units, with the scales that put them there."""

    left: float
    top: float
    width: float
    height: float
    steps: ChartAxis
    values: ChartAxis

    def x(self, step: float) -> float:
        """The horizontal place of a step."""
        return round(self.left + self.steps.place(step) * self.width, 1)

    def y(self, value: float) -> float:
        """The vertical place of a value."""
        return round(self.top + (1 - self.values.place(value)) * self.height, 1)


def render_chart(panel: ChartPanel, name: str, width: int = 560, height: int = 250) -> SafeHtml:
    """One chart; ``name`` must differ between the charts of a page. The legend makes it taller when
    it needs lines.
    """
    curves = [_thin_series(series, width) for series in panel.series]
    entries = _legend_entries(panel)
    lines = _wrap_legend(entries, width)
    total = height + LEGEND_LINE * max(0, len(lines) - 1)
    frame = _chart_frame(panel, curves, width, total, top=30 + LEGEND_LINE * len(lines))
    return html_tag(
        "svg",
        html_tag("title", panel.title, id=f"{name}-title"),
        html_tag("desc", describe_panel(panel), id=f"{name}-desc"),
        html_tag(
            "text",
            panel.title,
            html_tag("tspan", f"  {panel.unit}", class_="unit"),
            x=0,
            y=16,
            class_="title",
        ),
        *_legend_markup(lines),
        *_axes_markup(frame),
        *(part for series in curves for part in _curve_markup(series, frame)),
        *_nonfinite_marks(curves, frame),
        _hover_sheet(panel, curves, frame),
        class_="chart",
        viewBox=f"0 0 {width} {total}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )


def describe_panel(panel: ChartPanel) -> str:
    """The chart in a sentence per curve: where it starts, where it ends, its lowest and highest
    value.
    """
    sentences = []
    for series in panel.series:
        real = [(s, v) for s, v in zip(series.steps, series.values, strict=True) if is_drawable(v)]
        if real and series.kind != "raw":
            (first, start), (last, end) = real[0], real[-1]
            values = [v for _, v in real]
            spread = f"lowest {format_number(min(values))}, highest {format_number(max(values))}"
            label = series.label or series.kind
            sentences.append(
                f"{label}: {format_number(start)} at step {format_number(first)}, {format_number(end)} at step {format_number(last)}, {spread}."
            )
    return " ".join([f"{panel.title} by optimizer step.", *sentences])


def _thin_series(series: CurveSeries, width: int) -> CurveSeries:
    steps, values = thin_curve(series.steps, series.values, most=width)
    return replace(series, steps=steps, values=values)


def _chart_frame(
    panel: ChartPanel, curves: Sequence[CurveSeries], width: int, height: int, top: float
) -> ChartFrame:
    real = [v for s in curves for v in s.values if is_drawable(v)]
    values = value_axis(real, panel.from_zero, panel.log_if_wide)
    steps = step_axis([x for s in curves for x in s.steps], count=width // 100)
    left = 12 + CHARACTER_WIDTH * max(len(label) for label in values.labels)
    return ChartFrame(left, top, width - left - 12, height - top - 40, steps, values)


def _legend_entries(panel: ChartPanel) -> list[tuple[CurveSeries, str]]:
    return [
        (s, s.label if len(s.label) <= MAX_LEGEND_NAME else s.label[: MAX_LEGEND_NAME - 1] + "…")
        for s in panel.series
        if s.label and s.in_legend
    ]


def _wrap_legend(
    entries: Sequence[tuple[CurveSeries, str]], width: int
) -> list[list[tuple[float, CurveSeries, str]]]:
    """Lay legend entries out in lines: (x, series, text) each."""
    lines: list[list[tuple[float, CurveSeries, str]]] = []
    x = float(width)
    for series, text in entries:
        needed = 38 + CHARACTER_WIDTH * len(text)
        if x + needed > width or not lines:
            lines.append([])
            x = 0.0
        lines[-1].append((x, series, text))
        x += needed
    return lines


def _legend_markup(lines: Sequence[Sequence[tuple[float, CurveSeries, str]]]) -> Iterator[SafeHtml]:
    for index, line in enumerate(lines):
        y = 36 + LEGEND_LINE * index
        for x, series, text in line:
            if series.kind == "points":
                yield html_tag("circle", cx=x + 9, cy=y - 4, r=3.5, class_=_series_classes(series))
            else:
                yield html_tag("path", d=f"M{x} {y - 4}h18", class_=_series_classes(series))
            yield html_tag("text", text, x=x + 24, y=y, class_="legend")


def _series_classes(series: CurveSeries) -> str:
    return f"curve {series.kind} c{series.color % SVG_COLOR_COUNT} d{series.color // SVG_COLOR_COUNT % 3}"


def _axes_markup(frame: ChartFrame) -> Iterator[SafeHtml]:
    right, bottom = frame.left + frame.width, frame.top + frame.height
    for tick, label in zip(frame.values.ticks, frame.values.labels, strict=True):
        y = frame.y(tick)
        yield html_tag(
            "line",
            x1=frame.left,
            x2=right,
            y1=y,
            y2=y,
            class_="base" if tick == frame.values.low else "grid",
        )
        yield html_tag("text", label, x=frame.left - 7, y=y + 4, class_="tick end")
    for tick, label in zip(frame.steps.ticks, frame.steps.labels, strict=True):
        x = frame.x(tick)
        # A label at the very edge would stand out of the chart; it is set flush with the edge
        # instead.
        edge = "end" if x + CHARACTER_WIDTH * len(label) / 2 > right + 11 else "middle"
        yield html_tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="base")
        yield html_tag(
            "text",
            label,
            x=right + 11 if edge == "end" else x,
            y=bottom + 17,
            class_=f"tick {edge}",
        )
    yield html_tag(
        "text", "step", x=frame.left + frame.width / 2, y=bottom + 33, class_="tick middle"
    )


def _curve_markup(series: CurveSeries, frame: ChartFrame) -> Iterator[SafeHtml]:
    places = [
        (frame.x(s), frame.y(v)) if is_drawable(v) and (v > 0 or not frame.values.log) else None
        for s, v in zip(series.steps, series.values, strict=True)
    ]
    if series.kind == "points":
        for place in places:
            if place:
                yield html_tag(
                    "circle", cx=place[0], cy=place[1], r=3.5, class_=_series_classes(series)
                )
        return
    pieces: list[str] = []
    for before, place, after in zip([None, *places], places, [*places[1:], None], strict=False):
        if place is None:
            continue
        pieces.append(f"{'L' if before else 'M'}{place[0]:g} {place[1]:g}")
        if not before and not after:
            pieces.append("h0")  # a lone point between gaps: its round ends make a dot
    if pieces:
        lone = " lone" if len(places) == 1 else ""
        yield html_tag("path", d="".join(pieces), class_=_series_classes(series) + lone)


def _nonfinite_marks(curves: Sequence[CurveSeries], frame: ChartFrame) -> Iterator[SafeHtml]:
    """A cross on the upper edge at each step whose value is NaN or infinite: a gap alone is easily
    missed.
    """
    steps = dict.fromkeys(
        (frame.x(x), s.color)
        for s in curves
        for x, v in zip(s.steps, s.values, strict=True)
        if not is_drawable(v)
    )
    for x, color in list(steps)[:MAX_CURVE_MARKS]:
        cross = f"M{x - 3.5:g} {frame.top + 1:g}l7 7m0 -7l-7 7"
        yield html_tag("path", d=cross, class_=f"unreal c{color % SVG_COLOR_COUNT}")
    if steps:
        yield html_tag(
            "text",
            "× not a number",
            x=frame.left + frame.width,
            y=frame.top + 20,
            class_="tick end",
        )


def _hover_sheet(panel: ChartPanel, curves: Sequence[CurveSeries], frame: ChartFrame) -> SafeHtml:
    """An invisible sheet over the curves that carries their values for the page's script."""
    data = [
        {
            "label": s.label or panel.title,
            "color": s.color % SVG_COLOR_COUNT,
            "steps": list(s.steps),
            "values": [format_number(v) for v in s.values],
        }
        for s in curves
    ]
    ends = {"low": frame.steps.low, "high": frame.steps.high}
    # An empty title keeps the browser from showing the chart's own title as a tooltip.
    return join_html(
        html_tag("line", class_="cursor", y1=frame.top, y2=frame.top + frame.height, x1=0, x2=0),
        html_tag(
            "rect",
            html_tag("title"),
            class_="sheet",
            x=frame.left,
            y=frame.top,
            width=frame.width,
            height=frame.height,
            data_curves=json.dumps({**ends, "series": data}, separators=(",", ":")),
        ),
    )
