"""The report in a terminal: what a run came to, several compared, contracts, and answers before and after.

Everything a run wrote is shown as plain text: neither its square brackets nor its control characters reach the terminal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorry.evaluate.metrics.registry import exact_match
from lorry.formatting import NOTHING, number, roughly
from lorry.runs import status
from lorry.runs.read import Damaged, Run, Sample
from lorry.runs.summary import about, by_adapter, differences, figures
from lorry.visible import visible

STYLES = {"held": ("✓ held", "green"), "failed": ("✗ failed", "bold red"), "not_checked": ("– not checked", "dim")}
STATE_STYLES = {
    "running": "bold cyan", "finished": "green", "interrupted": "yellow",
    "failed": "bold red", "dead": "red", "unreadable": "red",
}  # fmt: skip


def show(runs: Sequence[Run], samples: int = 8, damaged: Sequence[Damaged] = ()) -> RenderableType:
    """Everything worth a screen: one run in full, or several compared. ``samples``: rows per group of answers; ``damaged``: runs
    that were asked for and cannot be read."""
    if damaged:
        return Group(*(_text(f"{one.name} is damaged and left out: {one.why}", "red") for one in damaged), show(runs, samples))
    if len(runs) > 1:
        return Group(comparison(runs), *changes(runs))
    run = runs[0]
    parts: list[RenderableType] = [summary(run), *adapters(run)]
    parts += [evaluation(run)] if run.evaluation else []
    parts += before_after(run, samples)
    parts += [contracts(run)] if run.contracts else []
    return Group(*parts)


def summary(run: Run) -> Table:
    """A run's settings in a word each and its final figures."""
    table = _table(run.name, "", "", "")
    for name, value in about(run).items():
        table.add_row(_text(name, "dim"), _text(value), "")
    if standing := status.of(run).sentence():
        table.add_row(_text("state", "dim"), _text(standing, "bold"), "")
    for figure in figures(run):
        table.add_row(_text(figure.name, "dim"), _text(figure.text, "bold"), _text(figure.note, "dim"))
    table.show_header = False
    return table


def adapters(run: Run) -> Iterator[Table]:
    """The final figures of each adapter of a run of several."""
    if rows := by_adapter(run):
        yield figure_rows(run.name, "adapter", [(name, own, {f.name: f.text for f in found}) for name, own, found in rows])


def figure_rows(title: str, what: str, rows: Sequence[tuple[str, str, dict[str, str]]]) -> Table:
    """A row of figures per name, with what is its own about it."""
    names = list(dict.fromkeys(name for _, _, found in rows for name in found))
    table = _table(title, what, "its own settings", *names)
    for name, own, found in rows:
        table.add_row(_text(name, "bold"), _text(own, "dim"), *(_text(found.get(column, NOTHING)) for column in names))
    return table


def comparison(runs: Sequence[Run]) -> Table:
    """Final figures, a run per row."""
    of_runs = [{f.name: f.text for f in figures(run)} for run in runs]
    names = list(dict.fromkeys(name for one in of_runs for name in one))
    table = _table("Final figures", "run", *names)
    for run, one in zip(runs, of_runs, strict=True):
        table.add_row(_text(run.name), *(_text(one.get(name, NOTHING)) for name in names))
    return table


def changes(runs: Sequence[Run]) -> Iterator[Table]:
    """The settings in which the runs differ, if any."""
    rows = differences(runs)
    if rows:
        table = _table("What differs", "setting", *(run.name for run in runs))
        for name, values in rows:
            table.add_row(_text(name), *map(_text, values))
        yield table


GAP = 3  # between columns
LEAST_WANTED = ("what", "written", "best", "tokens/s")  # columns that a narrow terminal does without, in this order


def standings(found: Sequence[status.State], now: float, width: int) -> Table:
    """Where each run stands, a run per row. ``now``: seconds since 1970, from which the age of the last line is counted;
    ``width``: of the terminal, in which whole columns go rather than the ends of words."""
    rows = [_standing(state, now) for state in found]
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if any(row.get(name) for row in rows)]
    taken = {name: max(len(name), *(len(row.get(name, "")) for row in rows)) + GAP for name in columns}
    taken["what"] = 10 + GAP  # it may wrap
    named = sum(max(len(text) for text in texts) + GAP for texts in zip(*((s.name, s.state) for s in found), strict=True))
    for name in LEAST_WANTED:
        if name in columns and named + sum(taken[one] for one in columns) > width:
            columns.remove(name)
    table = _table("Runs", "run", "state", *columns)
    for column in table.columns[:-1]:
        column.no_wrap = True  # what is left of the width goes to the last
    table.columns[-1].min_width = 10
    for state, row in zip(found, rows, strict=True):
        cells = (_text(row.get(name) or None) for name in columns)
        table.add_row(_text(state.name, "bold"), _text(state.state, STATE_STYLES[state.state]), *cells)
    return table


def _standing(state: status.State, now: float) -> dict[str, str]:
    """The cells of a run; what is not known is empty."""
    if state.state == "unreadable":
        return {}
    of_total = f"/{number(state.total)}" if state.total and state.total != state.step else ""
    what = (Path(text).name if text.startswith((".", "/")) else text for text in (state.model, state.data))
    return {
        "step": number(state.step) + of_total,
        "last loss": number(state.loss) if state.loss is not None else "",
        "best": _best(state.best),
        "tokens/s": number(round(state.tokens_per_second)) if state.tokens_per_second is not None else "",
        "time": roughly(state.elapsed) if state.elapsed is not None else "",
        "left": roughly(state.eta) if state.eta is not None else "",
        "written": f"{roughly(max(0.0, now - state.written))} ago" if state.written is not None else "",
        "what": ", ".join(text for text in (*what, state.adapter.partition(", on ")[0]) if text),
    }


def _best(best: tuple[str, float, int] | None) -> str:
    """The best evaluation; its metric is named where it is not the usual one."""
    if best is None:
        return ""
    metric, value, step = best
    return f"{'' if metric == 'eval_loss' else metric.removeprefix('eval_') + ' '}{number(value)} at {number(step)}"


def evaluation(run: Run) -> Table:
    """Metrics before and after."""
    table = _table("Evaluation", "data", "metric", "before", "after")
    for one in run.evaluation:
        for metric, (before, after) in one.metrics.items():
            table.add_row(_text(one.name), _text(metric.replace("_", " ")), _text(number(before)), _text(number(after), "bold"))
    return table


def before_after(run: Run, most: int = 8) -> Iterator[Table]:
    """A table per group of answers: prompt, reference, before, after; what matches the reference is green."""
    shown = [s for s in run.samples if s.before is not None or s.after is not None]
    for group in dict.fromkeys(s.group for s in shown):
        members = [s for s in shown if s.group == group]
        title = group if len(members) <= most else f"{group} (the first {most} of {len(members)})"
        table = _table(title, "prompt", "reference", "before", "after")
        table.show_lines = True
        for sample in members[:most]:
            table.add_row(_text(sample.prompt), _text(sample.reference), *(_answer(sample, side) for side in ("before", "after")))
        yield table


def _answer(sample: Sample, side: str) -> Text:
    answer = getattr(sample, side)
    same = answer is not None and sample.reference is not None and exact_match(answer, sample.reference) == 1
    return _text(answer, "green" if same else "")


def contracts(run: Run) -> Table:
    """What the run promised and whether it held."""
    table = _table("Contracts", "", "contract", "detail")
    for contract in sorted(run.contracts, key=lambda c: c.id):
        table.add_row(_text(*STYLES[contract.status]), _text(f"{contract.id}. {contract.name}"), _text(contract.detail, "dim"))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=_text(title, "bold"), title_justify="left", header_style="dim", box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(_text(column), overflow="fold")
    return table


def _text(value: str | None, style: str = "") -> Text:
    return Text(NOTHING if value is None else visible(value), style=style)
