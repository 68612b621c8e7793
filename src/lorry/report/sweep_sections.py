"""What a sweep found, on the page of a run that is a pass of it: which to take, loss by learning rate,
every combination ranked."""

from __future__ import annotations

from collections.abc import Sequence

from lorry.errors import DataError
from lorry.formatting import MISSING_VALUE, format_number
from lorry.report.inline_svg import render_chart
from lorry.report.markup import SafeHtml, html_tag
from lorry.report.sections import html_table
from lorry.report.sweep import Combination, combine_seeds, rate_panel
from lorry.runs.read import RunRecord
from lorry.runs.sweeps import SweepRecord, find_sweep

MOST_ROWS = 200  # combinations of a table


def sweep_section(runs: Sequence[RunRecord]) -> SafeHtml | None:
    """Of each sweep that the runs are passes of."""
    parts, seen = list[SafeHtml](), set[str]()
    for run in runs:
        try:
            sweep = find_sweep(run.path, run.described_jobs)
        except DataError as error:
            # the run itself is whole, and its page is worth having
            parts.append(html_tag("p", str(error), class_="lead notes"))
            continue
        if sweep is not None and str(sweep.path) not in seen:
            seen.add(str(sweep.path))
            parts += _sweep_parts(sweep, f"chart-sweep-{len(seen)}")
    return html_tag("section", html_tag("h2", "Sweep"), *parts, id="sweep") if parts else None


def _sweep_parts(sweep: SweepRecord, chart: str) -> list[SafeHtml]:
    ranked = combine_seeds(sweep.jobs, sweep.loss)
    parts = [html_tag("p", line, class_="lead") for line in sweep.advice]
    if (panel := rate_panel(ranked, held_out=sweep.held_out)) is not None:
        drawing = html_tag("figure", render_chart(panel, chart, 860, 250), class_="wide")
        parts.append(html_tag("div", drawing, class_="charts"))
    loss = "held-out loss" if sweep.held_out else "last training loss"
    columns = ("combination", "settings", loss, "seeds", "parameters")
    head = html_tag(
        "tr",
        *(html_tag("th", name, class_="number" if at > 1 else None) for at, name in enumerate(columns)),
    )  # fmt: skip
    parts.append(html_table(head, map(_row, ranked[:MOST_ROWS])))
    if len(ranked) > MOST_ROWS:
        left_out = f"and {len(ranked) - MOST_ROWS} more, in sweep.json"
        parts.append(html_tag("p", left_out, class_="lead notes"))
    return parts


def _row(one: Combination) -> SafeHtml:
    numbers = (one.describe_loss(), str(len(one.losses)), format_number(one.parameters))
    return html_tag(
        "tr",
        html_tag("th", one.name, scope="row"),
        html_tag("td", one.describe_settings() or MISSING_VALUE),
        *(html_tag("td", text, class_="number") for text in numbers),
    )
