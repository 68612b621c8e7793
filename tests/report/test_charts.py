"""Charts: ticks that people would choose, curves inside their frame, and no value lost to thinning
or smoothing.
"""

from __future__ import annotations

import json
import math
import re
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.formatting import (
    byte_scale,
    format_bytes,
    format_duration,
    format_number,
    format_scientific,
)
from lorry.report.axes import nice_step, step_axis, value_axis
from lorry.report.curves import (
    ChartPanel,
    CurveSeries,
    build_panels,
    is_drawable,
    smooth_curve,
    thin_curve,
)
from lorry.report.inline_svg import render_chart
from lorry.report.plots import clean_text, render_png
from lorry.runs.read import read_readable_runs
from lorry.visible import make_visible
from tests.support.runs import full, metrics

finite = st.floats(-1e299, 1e299)
anything = st.one_of(st.floats(), st.floats(-5, 5))

# all that a chart of the page is made of
CHART_TAGS = {"svg", "title", "desc", "g", "path", "text", "line", "rect"}


def drawn(panel: ChartPanel) -> ElementTree.Element:
    return ElementTree.fromstring(render_chart(panel, "c"))


def series(values: list[float], kind: str = "line", label: str = "") -> CurveSeries:
    return CurveSeries(label, 0, kind, list(range(1, len(values) + 1)), values)  # type: ignore[arg-type]


def with_class(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [e for e in root.iter() if name in e.get("class", "").split()]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.0, 1.0], ("0.0", "0.2", "0.4", "0.6", "0.8", "1.0")),
        ([2.31, 0.2], ("0.0", "0.5", "1.0", "1.5", "2.0", "2.5")),
        ([1e-4, 9.3e-5], ("9.2e-5", "9.4e-5", "9.6e-5", "9.8e-5", "1e-4")),
        ([7.0], ("6.0", "6.5", "7.0", "7.5", "8.0")),
        ([0.0], ("-1.0", "-0.5", "0.0", "0.5", "1.0")),
        ([], ("0.0", "0.2", "0.4", "0.6", "0.8", "1.0")),
        ([1200.0, 1900.0], ("1,200", "1,400", "1,600", "1,800", "2,000")),
    ],
)
def test_ticks_as_a_person_would_set_them(values: list[float], labels: tuple[str, ...]) -> None:
    assert value_axis(values).labels == labels


def test_log_axes_only_where_three_decades_ask_for_them() -> None:
    axis = value_axis([1e-5, 1.0, 100.0], log_if_wide=True)
    assert axis.log
    assert (axis.low, axis.high) == (1e-5, pytest.approx(axis.ticks[-1]))
    assert axis.labels[0] == "1e-5"
    assert not value_axis([1e-5, 1.0, 100.0]).log
    assert not value_axis([0.0, 1e-5, 100.0], log_if_wide=True).log
    decay = [1e-3 * (1 - i / 100) for i in range(99)] + [1e-8]
    assert not value_axis(decay, log_if_wide=True).log  # a linear decay to nothing is no reason


@given(st.lists(finite, min_size=1, max_size=20), st.booleans(), st.booleans())
def test_every_value_lies_on_its_axis(values: list[float], from_zero: bool, log: bool) -> None:
    axis = value_axis(values, from_zero, log)
    room = 1e-6 * (axis.high - axis.low)
    assert all(axis.low - room <= v <= axis.high + room for v in values)
    assert len(axis.ticks) == len(axis.labels) <= 12
    assert list(axis.ticks) == sorted(set(axis.ticks))
    assert len(set(axis.labels)) == len(axis.labels)
    # a label says its tick to 1% of the axis
    for tick, label in zip(axis.ticks, axis.labels, strict=True):
        assert abs(float(label.replace(",", "")) - tick) <= 0.011 * abs(axis.high - axis.low)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=10))
def test_step_ticks_are_whole_and_within(steps: list[int]) -> None:
    axis = step_axis(steps)
    assert all(t == int(t) and min(steps) <= t <= max(steps) for t in axis.ticks)
    assert all(axis.low <= s <= axis.high for s in steps)


@given(st.floats(1e-300, 1e300))
def test_a_nice_step_is_the_next_round_one(rough: float) -> None:
    step = nice_step(rough)
    assert rough * (1 - 1e-6) <= step <= 2.5 * rough
    assert float(f"{step:.3e}".split("e")[0]) in (1.0, 2.0, 2.5, 5.0)


@given(st.lists(anything, max_size=300), st.integers(20, 80))
def test_thinning_keeps_extremes_ends_and_gaps(values: list[float], most: int) -> None:
    steps = list(range(len(values)))
    kept_steps, kept = thin_curve(steps, values, most)
    assert kept_steps == sorted(set(kept_steps))
    assert all(repr(values[int(s)]) == repr(v) for s, v in zip(kept_steps, kept, strict=True))
    assert len(kept) <= 1.5 * most + 5
    real = [v for v in values if is_drawable(v)]
    if real:
        shown = [v for v in kept if is_drawable(v)]
        assert (min(shown), max(shown)) == (min(real), max(real))
    if values:
        assert (kept_steps[0], kept_steps[-1]) == (0, len(values) - 1)
    assert any(not is_drawable(v) for v in kept) == any(not is_drawable(v) for v in values)


@given(
    st.lists(st.one_of(st.floats(-100, 100), st.just(math.nan)), min_size=1, max_size=40),
    st.sampled_from([3, 5, 17, 99]),
)
def test_smoothing_is_the_plain_mean_around_each_step(values: list[float], window: int) -> None:
    steps, out = smooth_curve(range(len(values)), values, window)
    assert steps == list(range(len(values)))
    for i, mean in enumerate(out):
        around = [
            v for j, v in enumerate(values) if abs(i - j) <= window // 2 and not math.isnan(v)
        ]
        assert (
            mean == pytest.approx(sum(around) / len(around), abs=1e-9)
            if around
            else math.isnan(mean)
        )


def test_smoothing_a_long_series_takes_fewer_points_and_the_last() -> None:
    steps, out = smooth_curve(range(50_000), [float(i) for i in range(50_000)], 2501)
    assert len(steps) <= 1001
    assert steps[-1] == 49_999
    assert out[100] == pytest.approx(steps[100])


def test_a_chart_is_well_formed_and_says_what_it_shows() -> None:
    root = drawn(ChartPanel("Loss", "nats", (series([3.0, 2.0, 1.0], label="run"),)))
    assert root.get("role") == "img"
    texts = {e.get("id"): e.text for e in root if e.get("id")}
    assert texts["c-title"] == "Loss"
    assert (
        texts["c-desc"]
        == "Loss by optimizer step. run: 3 at step 1, 1 at step 3, lowest 1, highest 3."
    )
    assert (root.get("aria-labelledby") or "").split() == ["c-title", "c-desc"]
    shown = [e.text for e in root.iter("text")]
    assert {"Loss (nats)", "run", "step"} <= set(shown)
    # nothing that a page cannot have twice, or that another chart could be mixed up with
    assert {e.tag for e in root.iter()} <= CHART_TAGS
    assert [e.get("id") for e in root.iter() if e.get("id")] == ["c-title", "c-desc"]


def sheet_of(root: ElementTree.Element) -> tuple[dict[str, float], dict[str, Any]]:
    """(place of the sheet over the curves, the values it carries)."""
    (sheet,) = with_class(root, "sheet")
    place = {k: float(sheet.get(k, "")) for k in ("x", "y", "width", "height")}
    return place, json.loads(sheet.get("data-curves", ""))


def curve_points(root: ElementTree.Element, color: int = 0) -> list[list[tuple[float, float]]]:
    """The points of each piece of the curve of a run, in the chart's units."""
    found = []
    for path in root.iter("path"):
        if f"stroke: var(--c{color})" in path.get("style", "") and not path.get("transform"):
            for piece in path.get("d", "").split("M")[1:]:
                numbers = [float(one) for one in re.findall(r"-?[\d.]+", piece)]
                found.append(list(zip(numbers[::2], numbers[1::2], strict=True)))
    return found


def dots(root: ElementTree.Element, color: str) -> list[tuple[float, float]]:
    """The places of markers with a stroke of a colour."""
    return [
        (float(x), float(y))
        for path in root.iter("path")
        if f"stroke: var(--{color})" in path.get("style", "")
        for x, y in re.findall(r"translate\((\S+) (\S+)\)", path.get("transform", ""))
    ]


@settings(max_examples=12, deadline=None)
@given(st.lists(anything, min_size=1, max_size=60))
def test_curves_stay_inside_the_frame(values: list[float]) -> None:
    root = drawn(ChartPanel("p", "", (series(values), series(values, "points")), log_if_wide=True))
    place, data = sheet_of(root)
    for x, y in [*(p for piece in curve_points(root) for p in piece), *dots(root, "c0")]:
        assert place["x"] - 0.11 <= x <= place["x"] + place["width"] + 0.11
        assert place["y"] - 0.11 <= y <= place["y"] + place["height"] + 0.11
    # the pointer is told once what line and circles say
    assert [len(s["x"]) for s in data["series"]] == [len(values)]
    assert [s["values"] for s in data["series"]] == [[format_number(v) for v in values]]


def test_gaps_break_the_line_and_are_marked() -> None:
    root = drawn(ChartPanel("p", "", (series([1.0, 2.0, math.nan, 4.0, math.inf, 6.0, 7.0]),)))
    place, _ = sheet_of(root)
    pieces = [piece for piece in curve_points(root) if len(piece) > 1]
    assert [len(piece) for piece in pieces] == [2, 2]
    at = [place["x"] + place["width"] * share for share in (2 / 6, 4 / 6)]
    assert [x for x, _ in dots(root, "bad")] == pytest.approx(at, abs=0.1)
    # step 4 stands alone
    assert [x for x, _ in dots(root, "c0")] == pytest.approx(
        [place["x"] + place["width"] / 2], abs=0.1
    )
    assert "× not a number" in [e.text for e in root.iter("text")]


def test_the_curve_lies_where_the_numbers_say() -> None:
    root = drawn(ChartPanel("p", "", (series([0.0, 5.0, 10.0]),)))
    place, data = sheet_of(root)
    ((first, second, third),) = curve_points(root)
    bottom, middle = place["y"] + place["height"], place["x"] + place["width"] / 2
    assert first == pytest.approx((place["x"], bottom), abs=0.1)
    assert second == pytest.approx((middle, place["y"] + place["height"] / 2), abs=0.1)
    assert third == pytest.approx((place["x"] + place["width"], place["y"]), abs=0.1)
    assert (data["low"], data["high"], data["name"]) == (1, 3, "step")
    heights = {e.text: float(e.get("y", "")) for e in root.iter("text")}
    # a label's baseline lies half its height below the tick
    assert heights["0"] - heights["10"] == pytest.approx(place["height"], abs=0.2)


def test_many_runs_wrap_their_legend_and_keep_their_plot() -> None:
    few, many = (
        drawn(
            ChartPanel(
                "p",
                "",
                tuple(
                    CurveSeries(f"a run with a long name {i}" * 2, i, "line", [1, 2], [1, 2])
                    for i in range(n)
                ),
            )
        )
        for n in (1, 12)
    )
    heights = [sheet_of(root)[0]["height"] for root in (few, many)]
    assert heights[0] == pytest.approx(heights[1])
    labels = [e for e in many.iter("text") if (e.text or "").startswith("a run")]
    assert all(len(e.text or "") <= 44 for e in labels)
    assert len({(e.get("x"), e.get("y")) for e in labels}) == 12
    top = min(float(e.get("y", "")) for e in labels)
    assert top > next(float(e.get("y", "")) for e in many.iter("text") if e.text == "p")
    # the ninth run has the colour of the first, and another dash
    styles = [e.get("style", "") for e in many.iter("path")]
    blue = [one for one in styles if "stroke: var(--c0)" in one]
    assert {"dasharray" in one for one in blue} == {True, False}


@settings(max_examples=15, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20))
def test_any_name_is_text_of_the_chart(title: str, label: str) -> None:
    """Among them dollars, which matplotlib takes for formulas, and what XML cannot hold."""
    root = drawn(ChartPanel(title, "", (series([1.0, 2.0], label=label),)))
    assert {e.tag for e in root.iter()} <= CHART_TAGS
    shown = ["".join((e.text or "").split()) for e in root.iter("text")]
    assert "".join(clean_text(title).split()) in [*shown, ""]
    assert sheet_of(root)[1]["series"][0]["label"] == clean_text(label or title)


def test_panels_of_one_run_and_of_several(tmp_path: Path) -> None:
    runs = read_readable_runs([full(tmp_path / name, steps=40) for name in "abcd"])[0]
    one = {p.title: p for p in build_panels(runs[:1])}
    assert [s.kind for s in one["Loss"].series] == ["raw", "line", "points"]
    assert one["Throughput"].series[0].values[0] == pytest.approx(800 / 1.25)
    assert one["Peak memory"].unit == "GiB"
    assert one["Peak memory"].series[0].values[0] == 3.0
    assert "tokens" not in one
    four = {p.title: p for p in build_panels(runs)}
    assert [s.label for s in four["Loss"].series if s.in_legend] == ["a", "b", "c", "d"]
    # four raw curves would hide each other
    assert {s.kind for s in four["Loss"].series} == {
        "line",
        "points",
    }


def test_a_name_that_the_font_lacks_is_no_news(tmp_path: Path) -> None:
    """A warning of matplotlib's for each of its characters stood on standard error."""
    runs, _ = read_readable_runs([full(tmp_path / name) for name in ("日本語", "bell\a")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert render_png(runs).startswith(b"\x89PNG")


def test_runs_of_several_adapters_show_each(tmp_path: Path) -> None:
    lines = [
        {
            "step": i,
            "loss": 2.0,
            "adapters": {"a": {"loss": 1.0 * i, "grad_norm": 0.5}, "b": {"loss": "NaN"}},
        }
        for i in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = {p.title: p.series for p in build_panels(read_readable_runs([tmp_path])[0])}
    assert [(s.label, s.color, s.steps) for s in shown["Loss of each adapter"]] == [
        ("a", 0, [1, 2]),
        ("b", 1, [1, 2]),
    ]
    assert shown["Loss of each adapter"][0].values == [1.0, 2.0]
    assert [len(s.steps) for s in shown["Gradient norm of each adapter"]] == [2, 0]


def test_short_series_are_drawn_as_they_are(tmp_path: Path) -> None:
    metrics(tmp_path / "r", 4)
    loss = build_panels(read_readable_runs([tmp_path / "r"])[0])[0]
    assert [(s.kind, len(s.steps)) for s in loss.series] == [("line", 4)]


def test_numbers_as_people_read_them() -> None:
    shown = {
        0: "0",
        12345: "12,345",
        0.5: "0.5",
        1234.5: "1,234",
        2.3e-5: "2.3e-5",
        1.5e6: "1.5e6",
        math.nan: "NaN",
        True: "True",
    }
    assert {value: format_number(value) for value in shown} == shown
    assert format_number(-math.inf) == "-∞"
    assert format_number(None) == "–"
    assert format_scientific(1e-300, 2) == "1e-300"
    times = {
        0.04: "0.0 s",
        59.9: "59.9 s",
        59.96: "1 min 00 s",
        252: "4 min 12 s",
        3600: "1 h 00 min",
        11_100: "3 h 05 min",
    }
    assert {seconds: format_duration(seconds) for seconds in times} == times
    assert [format_bytes(b) for b in (0, 1023, 2**20, 2.31 * 2**30, None)] == [
        "0 B",
        "1023 B",
        "1.00 MiB",
        "2.31 GiB",
        "–",
    ]
    assert byte_scale(math.inf) == (1.0, "B")


@given(st.text())
def test_visible_text_can_be_printed_and_encoded(text: str) -> None:
    shown = make_visible(text)
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown
    )
    shown.encode("utf-8")
    assert len(shown) == len(text)
