"""The report as one HTML page that needs nothing else: styles, charts and a little script inline, no address of any server.

Its policy forbids the browser to load or run anything but the script written here, so that a prompt or an answer that
tries to be markup stays text even if escaping ever failed.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from importlib import resources

from lorry.formatting import NOTHING
from lorry.report import sections
from lorry.report.curves import BY_ADAPTER, not_drawn, panels
from lorry.report.markup import Html, join, tag
from lorry.report.svg import COLORS, chart
from lorry.runs import status
from lorry.runs.ownership import GENERATOR
from lorry.runs.read import Damaged, Run
from lorry.runs.summary import about, by_adapter, differences, figures


def page(runs: Sequence[Run], damaged: Sequence[Damaged] = ()) -> str:
    """The page of one run, or of several side by side; ``damaged``: those that were asked for and cannot be read."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"
    parts = [
        _header(runs, title),
        _damaged(damaged),
        _tiles(runs[0]) if len(runs) == 1 else _comparison(runs),
        _adapters(runs),
        _curves(runs),
        sections.evaluation(runs),
        sections.samples(runs),
        sections.training_rows(runs),
        sections.contracts(runs),
        sections.settings(runs),
        sections.receipts(runs),
        tag("footer", "Made by lorry report from the files of the run. It opens without a network and sends nothing."),
    ]
    return _document(title, join(*parts))


def _document(title: str, body: Html) -> str:
    style, script = (Html(resources.files(__package__).joinpath(name).read_text("utf-8")) for name in ("page.css", "hover.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = (
        f'<meta charset="utf-8">{GENERATOR.decode()}<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    )
    head_and_body = (
        tag("head", Html(head), tag("title", f"{title} · Lorry"), tag("style", style)),
        tag("body", tag("main", body), tag("script", script)),
    )
    return "<!doctype html>\n" + tag("html", *head_and_body, lang="en") + "\n"


def _header(runs: Sequence[Run], title: str) -> Html:
    facts = about(runs[0])
    if len(runs) > 1:
        facts = {name: value for name, value in facts.items() if all(about(run).get(name) == value for run in runs)}
    rows = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts.items()]
    notes = [tag("p", f"{run.name}: {note}", class_="lead notes") for run in runs for note in run.log.notes]
    return tag(
        "header",
        tag("p", "Lorry report", class_="eyebrow"),
        tag("h1", title),
        tag("dl", *rows, class_="facts") if rows else None,
        tag("div", *(badge for run in runs for badge in _badges(run, run.name if len(runs) > 1 else "")), class_="badges"),
        *notes,
    )


def _damaged(damaged: Sequence[Damaged]) -> Html | None:
    """The runs that were asked for and cannot be read, and why."""
    if not damaged:
        return None
    said = [tag("p", f"{one.name} is damaged and left out: {one.why}", class_="lead notes") for one in damaged]
    return tag("section", tag("h2", "Damaged"), *said, id="damaged")


def _badges(run: Run, name: str) -> Iterator[Html]:
    """Where the run stands if it did not finish, and whether it kept its contracts."""
    lead = f"{name}: " if name else ""
    state = status.of(run)
    if standing := state.sentence():
        yield tag("span", lead + standing, class_="badge failed" if state.state in ("failed", "dead") else "badge")
    failed = [c for c in run.contracts if c.status == "failed"]
    held = sum(c.status == "held" for c in run.contracts)
    if failed:
        yield tag("span", f"{lead}{len(failed)} of {len(run.contracts)} contracts failed", class_="badge failed")
    elif held:
        yield tag("span", f"{lead}{held} of {len(run.contracts)} contracts held, none failed", class_="badge held")
    elif state.state != "running":
        yield tag("span", f"{lead}contracts not reported", class_="badge")


def _tiles(run: Run) -> Html:
    tiles = [
        tag(
            "div",
            tag("div", f.name, class_="name"),
            tag("div", f.value, tag("span", f" {f.unit}", class_="unit") if f.unit else None, class_="value"),
            tag("div", f.note, class_="note"),
            class_="tile",
        )
        for f in figures(run)
    ]
    if not tiles:
        return tag("section", tag("h2", "Figures"), tag("p", "No step has been recorded yet.", class_="lead"), id="figures")
    return tag("section", *tiles, class_="tiles", id="figures")


def _comparison(runs: Sequence[Run]) -> Html:
    """The final figures of every run, a run per row, and the settings in which the runs differ."""
    of_runs = [{f.name: f for f in figures(run)} for run in runs]
    names = list(dict.fromkeys(name for one in of_runs for name in one))
    rows = [
        tag("tr", tag("th", swatch(index), run.name, scope="row"), *(
            tag("td", one[name].text if name in one else NOTHING, class_="number", title=one[name].note if name in one else None)
            for name in names
        ))
        for index, (run, one) in enumerate(zip(runs, of_runs, strict=True))
    ]  # fmt: skip
    head = tag("tr", tag("th", "run"), *(tag("th", name, class_="number") for name in names))
    final = tag("section", tag("h2", "Final figures"), sections.table(head, rows), id="figures")
    different = [
        tag("tr", tag("th", name, scope="row"), *(tag("td", value) for value in values)) for name, values in differences(runs)
    ]
    head = tag("tr", tag("th", "setting"), *(tag("th", swatch(i), run.name) for i, run in enumerate(runs)))
    content = (
        sections.table(head, different) if different else tag("p", "The settings of these runs are the same.", class_="lead")
    )
    return join(final, tag("section", tag("h2", "What differs"), content, id="differences"))


def _adapters(runs: Sequence[Run]) -> Html | None:
    """Each adapter's own settings and final figures, with its colour in the charts."""
    owners = [(run, *row) for run in runs for row in by_adapter(run)]
    if not owners:
        return None
    names = list(dict.fromkeys(f.name for *_, found in owners for f in found))
    rows = []
    for index, (run, name, own, found) in enumerate(owners):
        values = {f.name: f for f in found}
        cells = [
            tag("td", values[n].text, class_="number", title=values[n].note) if n in values else tag("td", NOTHING) for n in names
        ]
        whose = name if len(runs) == 1 else f"{run.name}, {name}"
        rows.append(tag("tr", tag("th", swatch(index), whose, scope="row"), tag("td", own or NOTHING), *cells))
    head = tag("tr", tag("th", "adapter"), tag("th", "its own settings"), *(tag("th", n, class_="number") for n in names))
    return tag("section", tag("h2", "Adapters"), sections.table(head, rows), id="adapters")


def swatch(index: int) -> Html:
    """A run's colour in the charts, as a small square."""
    return tag("span", class_=f"swatch c{index % COLORS}")


def _curves(runs: Sequence[Run]) -> Html | None:
    drawn = panels(runs)
    if not drawn:
        return None
    charts = []
    for index, panel in enumerate(drawn):
        wide = panel.title in ("Loss", BY_ADAPTER["loss"])
        drawing = chart(panel, f"chart-{index}", 1110, 330) if wide else chart(panel, f"chart-{index}")
        charts.append(tag("figure", drawing, class_="wide" if wide else None))
    lead = "Thin lines are single steps, thick lines the mean of the steps around; circles are evaluations."
    left_out = tag("p", said, class_="lead notes") if (said := not_drawn(runs)) else None
    return tag(
        "section", tag("h2", "Curves"), tag("p", lead, class_="lead"), left_out, tag("div", *charts, class_="charts"), id="curves"
    )
