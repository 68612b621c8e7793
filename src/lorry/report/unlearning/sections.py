"""The tables of what suites of unlearning and attacks found, beside the start and the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorry.formatting import MISSING_VALUE, format_number
from lorry.report.markup import SafeHtml, html_tag
from lorry.report.sections import html_table
from lorry.report.unlearning.curves import run_of_logs, start_labels
from lorry.runs.evals import SuiteRecord
from lorry.runs.read import RunRecord
from lorry.runs.summary import SUITE_FIGURES, SUITE_PARTS


def suite_tables(runs: Sequence[RunRecord]) -> list[SafeHtml]:
    """A table per suite: a metric a line, with the start's value, each run's and the oracle's."""
    parts: list[SafeHtml] = []
    for title in dict.fromkeys(suite.title for run in runs for suite in run.evals.suites):
        columns = _suite_columns(runs, title)
        names = dict.fromkeys(name for _, values in columns for name in values)
        # what a reader looks for first, then the rest in the order of the file
        order = [name for name in SUITE_FIGURES if name in names]
        order += [n for n in names if n not in order and not n.endswith(SUITE_PARTS)]
        # a metric that only some were asked is a dash for the others, and never a 0
        rows = [
            _value_row(_plain(name), [values.get(name) for _, values in columns]) for name in order
        ]
        head = _value_head("metric", [head for head, _ in columns])
        parts.append(html_tag("h3", title))
        parts += [note] if (note := _other_rows(runs, title)) is not None else []
        parts.append(html_table(head, rows))
    return parts


@dataclass(frozen=True)
class _StartColumn:
    """A start's values; ``rows``: {metric: what its rows are}; ``asked_for``: the first run that it
    is the start of.
    """

    path: Path
    asked_for: str
    values: dict[str, float]
    rows: dict[str, Mapping[str, str]]


def _add_start(
    starts: list[_StartColumn],
    path: Path,
    name: str,
    suite: SuiteRecord,
    values: Mapping[str, float],
) -> None:
    """Put a start's values into its column; into one of their own, where those are of other rows."""
    rows = {metric: suite.rows[metric] for metric in values}
    for start in starts:
        if start.path == path and all(start.rows.get(n, r) == r for n, r in rows.items()):
            start.values.update(values)
            start.rows.update(rows)
            return
    starts.append(_StartColumn(path, name, dict(values), dict(rows)))


def _suite_columns(runs: Sequence[RunRecord], title: str) -> list[tuple[str, Mapping[str, float]]]:
    """(head, values): the starts first, the oracles last; a start or oracle that is one of the runs
    has its column there."""
    paths = {run.path.resolve() for run in runs}
    labels = start_labels(runs)
    # by path: folders of one name are not one start
    starts: list[_StartColumn] = []
    own: list[tuple[str, Mapping[str, float]]] = []
    oracles: dict[str, tuple[str, Mapping[str, float]]] = {}
    for run in runs:
        origin = run.evals.origin
        for suite in run.evals.suites:
            if suite.title == title:
                values = run.evals.start_values(suite)
                if values and origin is not None and origin.resolve() not in paths:
                    _add_start(starts, origin.resolve(), run.name, suite, values)
                head = ", ".join(text for text in (run.name, suite.part) if text)
                own.append((head, suite.values))
                if suite.oracle is not None and run_of_logs(suite.oracle) not in paths:
                    oracles[suite.oracle.sha256] = (f"oracle of {head}", suite.oracle.values)
    last = list(oracles.values())
    # runs of one study have one oracle between them
    heads = [f"start: {labels[start.path]}" for start in starts]
    first = [
        (head if heads.count(head) == 1 else f"{head} for {start.asked_for}", start.values)
        for head, start in zip(heads, starts, strict=True)
    ]
    return [*first, *own, *([("oracle", last[0][1])] if len(last) == 1 else last)]


def _other_rows(runs: Sequence[RunRecord], title: str) -> SafeHtml | None:
    """A note where a metric of several runs is not of the same rows."""
    metrics: dict[str, set[str]] = {}
    for run in runs:
        for suite in run.evals.suites:
            for name, rows in suite.rows.items() if suite.title == title else ():
                metrics.setdefault(name, set()).add(str(sorted(rows.items())))
    names = [_plain(name) for name, rows in metrics.items() if len(rows) > 1]
    if not names:
        return None
    text = (
        f"Measured on different rows from column to column, so not comparable: {', '.join(names)}."
    )
    return html_tag("p", text, class_="lead notes")


def attack_tables(runs: Sequence[RunRecord]) -> list[SafeHtml]:
    """Rounded weights, other words and robustness, a table each; relearning is a chart."""
    parts: list[SafeHtml] = []
    for attack, title in (("quantize", "Rounded weights"), ("rephrase", "Rephrased")):
        rows, names = [], dict[str, None]()
        for run in runs:
            # None where nobody attacked the run
            tables = getattr(run.evals.attacks, attack, {})
            for kind in dict.fromkeys(kind for side in tables.values() for kind in side):
                for side, by_kind in tables.items():
                    whose = side if len(runs) == 1 else f"{run.name}: {side}"
                    values = by_kind.get(kind, {})
                    names |= dict.fromkeys(values)
                    rows.append((f"{_plain(kind)}, {whose}", values))
        if rows:
            lines = [_value_row(what, [values.get(n) for n in names]) for what, values in rows]
            head = _value_head("asked", [_plain(name) for name in names])
            parts += [html_tag("h3", title), html_table(head, lines)]
    lines = [
        _value_row(
            _plain(metric) if len(runs) == 1 else f"{run.name}: {_plain(metric)}",
            [values.get(letter) for letter in ("R", "Q", "mean")],
        )
        for run in runs
        if run.evals.attacks is not None
        for metric, values in run.evals.attacks.robustness.items()
    ]
    if lines:
        head = _value_head("by", ["relearning (R)", "NF4 (Q)", "mean"])
        parts += [html_tag("h3", "Robustness"), html_table(head, lines)]
    return parts


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _value_head(first: str, columns: Sequence[str]) -> SafeHtml:
    heads = (html_tag("th", name, class_="number") for name in columns)
    return html_tag("tr", html_tag("th", first), *heads)


def _value_row(name: str, values: Sequence[float | None]) -> SafeHtml:
    cells = (
        html_tag("td", MISSING_VALUE if v is None else format_number(v), class_="number")
        for v in values
    )
    return html_tag("tr", html_tag("th", name, scope="row"), *cells)
