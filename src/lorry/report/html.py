"""The report as one HTML page that needs nothing else: styles, charts and a little script inline,
no address of any server.

Its policy forbids the browser to load or run anything but the script written here, so that a prompt
or an answer that tries to be markup stays text even if escaping ever failed.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Sequence
from importlib import resources

from lorry.formatting import MISSING_VALUE
from lorry.report import sections
from lorry.report.curves import (
    ADAPTER_PANEL_TITLES,
    ChartPanel,
    build_panels,
    describe_undrawn,
)
from lorry.report.inline_svg import render_chart
from lorry.report.markup import SafeHtml, html_tag, join_html
from lorry.report.plots import SERIES_COLORS
from lorry.report.router_sections import router_section
from lorry.report.sweep_sections import sweep_section
from lorry.report.unlearning.curves import unlearning_panels
from lorry.report.unlearning.sections import attack_tables, suite_tables
from lorry.runs import status
from lorry.runs.ownership import GENERATOR
from lorry.runs.read import DamagedRun, RunRecord
from lorry.runs.summary import (
    describe_run_subject,
    figures_by_adapter,
    final_figures,
    run_differences,
)


def render_page(runs: Sequence[RunRecord], damaged: Sequence[DamagedRun] = ()) -> str:
    """The page of one run, or of several side by side; ``damaged``: those that were asked for and
    cannot be read.
    """
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"
    closing = (
        "Written by lorry report from the files of the run. The page opens without a "
        "network and sends nothing."
    )
    parts = [
        _page_header(runs, title),
        _damaged_runs(damaged),
        *(section(runs) for section in PAGE_SECTIONS),
        html_tag("footer", closing),
    ]
    return _html_document(title, join_html(*parts))


def _html_document(title: str, body: SafeHtml) -> str:
    style, script = (
        SafeHtml(resources.files(__package__).joinpath(name).read_text("utf-8"))
        for name in ("page.css", "hover.js")
    )
    # only a script of these bytes (the digest in base64, as the policy has it) runs, so that one in
    # an answer of a model does not
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = (
        f'<meta charset="utf-8">{GENERATOR.decode()}<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    )
    head_and_body = (
        html_tag(
            "head", SafeHtml(head), html_tag("title", f"{title} · Lorry"), html_tag("style", style)
        ),
        html_tag("body", html_tag("main", body), html_tag("script", script)),
    )
    return "<!doctype html>\n" + html_tag("html", *head_and_body, lang="en") + "\n"


def _page_header(runs: Sequence[RunRecord], title: str) -> SafeHtml:
    facts = describe_run_subject(runs[0])
    if len(runs) > 1:
        # what differs has a table of its own, and would be untrue of most runs in the header
        facts = {
            name: value
            for name, value in facts.items()
            if all(describe_run_subject(run).get(name) == value for run in runs)
        }
    rows = [
        html_tag("div", html_tag("dt", name), html_tag("dd", value))
        for name, value in facts.items()
    ]
    notes = [
        html_tag("p", f"{run.name}: {note}", class_="lead notes")
        for run in runs
        for note in run.log.notes
    ]
    return html_tag(
        "header",
        html_tag("p", "Lorry report", class_="eyebrow"),
        html_tag("h1", title),
        html_tag("dl", *rows, class_="facts") if rows else None,
        html_tag(
            "div",
            *(
                badge
                for run in runs
                for badge in _run_badges(run, run.name if len(runs) > 1 else "")
            ),
            class_="badges",
        ),
        *notes,
    )


def _damaged_runs(damaged: Sequence[DamagedRun]) -> SafeHtml | None:
    """The runs that were asked for and cannot be read, and why."""
    if not damaged:
        return None
    reasons = [
        html_tag(
            "p",
            f"{damaged_run.name} is damaged and not shown: {damaged_run.why}",
            class_="lead notes",
        )
        for damaged_run in damaged
    ]
    return html_tag("section", html_tag("h2", "Damaged"), *reasons, id="damaged")


def _run_badges(run: RunRecord, name: str) -> Iterator[SafeHtml]:
    """Where the run stands if it did not finish, and whether it kept its contracts."""
    lead = f"{name}: " if name else ""
    state = status.run_state_of(run)
    if standing := state.sentence():
        yield html_tag(
            "span",
            lead + standing,
            class_="badge failed" if state.state in ("failed", "dead") else "badge",
        )
    failed = [c for c in run.contracts if c.status == "failed"]
    held = sum(c.status == "held" for c in run.contracts)
    if failed:
        yield html_tag(
            "span",
            f"{lead}{len(failed)} of {len(run.contracts)} contracts failed",
            class_="badge failed",
        )
    elif held:
        yield html_tag(
            "span",
            f"{lead}{held} of {len(run.contracts)} contracts held, none failed",
            class_="badge held",
        )
    # of a live run there is nothing to report yet, and no news in that
    elif state.state != "running":
        yield html_tag("span", f"{lead}contracts not reported", class_="badge")


def _figures_section(runs: Sequence[RunRecord]) -> SafeHtml:
    return _figure_tiles(runs[0]) if len(runs) == 1 else _comparison_section(runs)


def _figure_tiles(run: RunRecord) -> SafeHtml:
    tiles = [
        html_tag(
            "div",
            html_tag("div", f.name, class_="name"),
            html_tag(
                "div",
                f.value,
                html_tag("span", f" {f.unit}", class_="unit") if f.unit else None,
                class_="value",
            ),
            html_tag("div", f.note, class_="note"),
            class_="tile",
        )
        for f in final_figures(run)
    ]
    if not tiles:
        return html_tag(
            "section",
            html_tag("h2", "Figures"),
            # an empty part would look like a page that broke off
            html_tag("p", "No step has been recorded yet.", class_="lead"),
            id="figures",
        )
    return html_tag("section", *tiles, class_="tiles", id="figures")


def _comparison_section(runs: Sequence[RunRecord]) -> SafeHtml:
    """The final figures of every run, a run per row, and the settings in which the runs differ."""
    of_runs = [{f.name: f for f in final_figures(run)} for run in runs]
    names = list(dict.fromkeys(name for figures in of_runs for name in figures))
    rows = [
        html_tag(
            "tr",
            html_tag("th", color_swatch(index), run.name, scope="row"),
            *(
                html_tag(
                    "td",
                    figures[name].text if name in figures else MISSING_VALUE,
                    class_="number",
                    title=figures[name].note if name in figures else None,
                )
                for name in names
            ),
        )
        for index, (run, figures) in enumerate(zip(runs, of_runs, strict=True))
    ]
    head = html_tag(
        "tr", html_tag("th", "run"), *(html_tag("th", name, class_="number") for name in names)
    )
    final = html_tag(
        "section", html_tag("h2", "Final figures"), sections.html_table(head, rows), id="figures"
    )
    different = [
        html_tag(
            "tr", html_tag("th", name, scope="row"), *(html_tag("td", value) for value in values)
        )
        for name, values in run_differences(runs)
    ]
    head = html_tag(
        "tr",
        html_tag("th", "setting"),
        *(html_tag("th", color_swatch(i), run.name) for i, run in enumerate(runs)),
    )
    content = (
        sections.html_table(head, different)
        if different
        else html_tag("p", "The settings of these runs are the same.", class_="lead")
    )
    return join_html(
        final, html_tag("section", html_tag("h2", "What differs"), content, id="differences")
    )


def _adapters_section(runs: Sequence[RunRecord]) -> SafeHtml | None:
    """Each adapter's own settings and final figures, with its colour in the charts."""
    owners = [(run, *row) for run in runs for row in figures_by_adapter(run)]
    if not owners:
        return None
    # by name: a job that ended early, or was never evaluated, lacks some
    names = list(dict.fromkeys(f.name for *_, figures in owners for f in figures))
    rows = []
    for index, (run, name, own, figures) in enumerate(owners):
        values = {f.name: f for f in figures}
        cells = [
            html_tag("td", values[n].text, class_="number", title=values[n].note)
            if n in values
            else html_tag("td", MISSING_VALUE)
            for n in names
        ]
        whose = name if len(runs) == 1 else f"{run.name}, {name}"
        rows.append(
            html_tag(
                "tr",
                html_tag("th", color_swatch(index), whose, scope="row"),
                html_tag("td", own or MISSING_VALUE),
                *cells,
            )
        )
    head = html_tag(
        "tr",
        html_tag("th", "adapter"),
        html_tag("th", "its own settings"),
        *(html_tag("th", n, class_="number") for n in names),
    )
    return html_tag(
        "section", html_tag("h2", "Adapters"), sections.html_table(head, rows), id="adapters"
    )


def color_swatch(index: int) -> SafeHtml:
    """A run's colour in the charts, as a small square."""
    return html_tag("span", class_=f"swatch c{index % len(SERIES_COLORS)}")


def _curves_section(runs: Sequence[RunRecord]) -> SafeHtml | None:
    drawn = build_panels(runs)
    if not drawn:
        return None
    lead = "Thin lines are single steps, thick lines the mean of the steps around; circles are evaluations."
    left_out = (
        html_tag("p", undrawn, class_="lead notes") if (undrawn := describe_undrawn(runs)) else None
    )
    return html_tag(
        "section",
        html_tag("h2", "Curves"),
        html_tag("p", lead, class_="lead"),
        left_out,
        _chart_grid(drawn, "chart"),
        id="curves",
    )


def _chart_grid(panels: Sequence[ChartPanel], name: str) -> SafeHtml:
    """Charts two in a row; ``name`` begins the ids of their titles."""
    charts = []
    for index, panel in enumerate(panels):
        # the loss is what a report is opened for: it has a line of the page for itself
        wide = panel.title in ("Loss", ADAPTER_PANEL_TITLES["loss"])
        drawing = (
            render_chart(panel, f"{name}-{index}", 860, 250)
            if wide
            else render_chart(panel, f"{name}-{index}")
        )
        charts.append(html_tag("figure", drawing, class_="wide" if wide else None))
    return html_tag("div", *charts, class_="charts")


def _unlearning_section(runs: Sequence[RunRecord]) -> SafeHtml | None:
    """What suites and attacks found: charts, then the numbers."""
    drawn = unlearning_panels(runs)
    tables = [*suite_tables(runs), *attack_tables(runs)]
    if not drawn and not tables:
        return None
    lead = (
        "Squares are starts, diamonds are oracles (models trained without the "
        "forget set); a line through circles follows a run through its "
        "evaluations. A run close to the oracle has forgotten; a value below the "
        "oracle's is not better."
    )
    return html_tag(
        "section",
        html_tag("h2", "Unlearning"),
        html_tag("p", lead, class_="lead"),
        _chart_grid(drawn, "chart-unlearning") if drawn else None,
        *tables,
        id="unlearning",
    )


# Every part of the page between header and footer, in order: a function from the runs to markup, or
# None where the runs have nothing of the kind. A new one reads what it needs from `RunRecord`, or
# through a reader of its own file in runs/read.py, and stands here and nowhere else.
PageSection = Callable[[Sequence[RunRecord]], SafeHtml | None]
PAGE_SECTIONS: tuple[PageSection, ...] = (
    _figures_section,
    sweep_section,
    _adapters_section,
    _unlearning_section,
    _curves_section,
    router_section,
    sections.evaluation_section,
    sections.samples_section,
    sections.training_rows_section,
    sections.contracts_section,
    sections.settings_section,
    sections.receipts_section,
)
