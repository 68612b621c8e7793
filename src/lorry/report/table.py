"""The report in a terminal: what a run came to, several compared, contracts, and answers before and
after.

Everything a run wrote is shown as plain text: neither its square brackets nor its control
characters reach the terminal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorry.evaluate.metrics.registry import exact_match
from lorry.formatting import MISSING_VALUE, format_number, format_rough_duration
from lorry.runs import status
from lorry.runs.read import DamagedRun, RunRecord, SampleRecord
from lorry.runs.summary import (
    describe_run_subject,
    figures_by_adapter,
    final_figures,
    run_differences,
)
from lorry.visible import make_visible

CONTRACT_STYLES = {
    "held": ("✓ held", "green"),
    "failed": ("✗ failed", "bold red"),
    "not_checked": ("– not checked", "dim"),
}
STATE_STYLES = {
    "running": "bold cyan", "finished": "green", "interrupted": "yellow",
    "failed": "bold red", "dead": "red", "unreadable": "red",
}  # fmt: skip


def render_runs(
    runs: Sequence[RunRecord], samples: int = 8, damaged: Sequence[DamagedRun] = ()
) -> RenderableType:
    """Everything worth a screen: one run in full, or several compared. ``samples``: rows per group
    of answers; ``damaged``: runs that were asked for and cannot be read."""
    if damaged:
        return Group(
            *(
                _styled_text(
                    f"{damaged_run.name} is damaged and not shown: {damaged_run.why}", "red"
                )
                for damaged_run in damaged
            ),
            render_runs(runs, samples),
        )
    if len(runs) > 1:
        return Group(comparison_table(runs), *changed_settings_tables(runs))
    run = runs[0]
    parts: list[RenderableType] = [summary_table(run), *adapter_tables(run)]
    parts += [evaluation_table(run)] if run.evaluation else []
    parts += sample_tables(run, samples)
    parts += [contracts_table(run)] if run.contracts else []
    return Group(*parts)


def summary_table(run: RunRecord) -> Table:
    """A run's settings in a word each and its final figures."""
    table = _new_table(run.name, "", "", "")
    for name, value in describe_run_subject(run).items():
        table.add_row(_styled_text(name, "dim"), _styled_text(value), "")
    if standing := status.run_state_of(run).sentence():
        table.add_row(_styled_text("state", "dim"), _styled_text(standing, "bold"), "")
    for figure in final_figures(run):
        table.add_row(
            _styled_text(figure.name, "dim"),
            _styled_text(figure.text, "bold"),
            _styled_text(figure.note, "dim"),
        )
    table.show_header = False
    return table


def adapter_tables(run: RunRecord) -> Iterator[Table]:
    """The final figures of each adapter of a run of several."""
    if rows := figures_by_adapter(run):
        yield figure_rows(
            run.name,
            "adapter",
            [(name, own, {f.name: f.text for f in figures}) for name, own, figures in rows],
        )


def figure_rows(title: str, what: str, rows: Sequence[tuple[str, str, dict[str, str]]]) -> Table:
    """A row of figures per name, with what is its own about it."""
    names = list(dict.fromkeys(name for _, _, figures in rows for name in figures))
    table = _new_table(title, what, "its own settings", *names)
    for name, own, figures in rows:
        table.add_row(
            _styled_text(name, "bold"),
            _styled_text(own, "dim"),
            *(_styled_text(figures.get(column, MISSING_VALUE)) for column in names),
        )
    return table


def comparison_table(runs: Sequence[RunRecord]) -> Table:
    """Final figures, a run per row."""
    # by name: runs need not have the same figures
    of_runs = [{f.name: f.text for f in final_figures(run)} for run in runs]
    names = list(dict.fromkeys(name for figures in of_runs for name in figures))
    table = _new_table("Final figures", "run", *names)
    for run, figures in zip(runs, of_runs, strict=True):
        table.add_row(
            _styled_text(run.name),
            *(_styled_text(figures.get(name, MISSING_VALUE)) for name in names),
        )
    return table


def changed_settings_tables(runs: Sequence[RunRecord]) -> Iterator[Table]:
    """The settings in which the runs differ, if any."""
    rows = run_differences(runs)
    if rows:
        table = _new_table("What differs", "setting", *(run.name for run in runs))
        for name, values in rows:
            table.add_row(_styled_text(name), *map(_styled_text, values))
        yield table


COLUMN_GAP = 3  # between columns
# columns that a narrow terminal does without, in this order
OPTIONAL_COLUMNS = (
    "what",
    "written",
    "best",
    "tokens/s",
)


def runs_table(states: Sequence[status.RunState], now: float, width: int) -> Table:
    """Where each run stands, a run per row. ``now``: seconds since 1970, from which the age of the
    last line is counted; ``width``: of the terminal, in which whole columns go rather than the ends
    of words.
    """
    rows = [_run_cells(state, now) for state in states]
    columns = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if any(row.get(name) for row in rows)
    ]
    widths = {
        name: max(len(name), *(len(row.get(name, "")) for row in rows)) + COLUMN_GAP
        for name in columns
    }
    widths["what"] = 10 + COLUMN_GAP  # it may wrap
    named = sum(
        max(len(text) for text in texts) + COLUMN_GAP
        for texts in zip(*((s.name, s.state) for s in states), strict=True)
    )
    for name in OPTIONAL_COLUMNS:
        if name in columns and named + sum(widths[shown] for shown in columns) > width:
            columns.remove(name)
    table = _new_table("Runs", "run", "state", *columns)
    for column in table.columns[:-1]:
        column.no_wrap = True  # what is left of the width goes to the last
    table.columns[-1].min_width = 10
    for state, row in zip(states, rows, strict=True):
        cells = (_styled_text(row.get(name) or None) for name in columns)
        table.add_row(
            _styled_text(state.name, "bold"),
            _styled_text(state.state, STATE_STYLES[state.state]),
            *cells,
        )
    return table


def _run_cells(state: status.RunState, now: float) -> dict[str, str]:
    """The cells of a run; what is not known is empty."""
    if state.state == "unreadable":
        return {}
    of_total = f"/{format_number(state.total)}" if state.total and state.total != state.step else ""
    what = (
        Path(text).name if text.startswith((".", "/")) else text
        for text in (state.model, state.data)
    )
    return {
        "step": format_number(state.step) + of_total,
        "last loss": format_number(state.loss) if state.loss is not None else "",
        "best": _format_best(state.best),
        "tokens/s": format_number(round(state.tokens_per_second))
        if state.tokens_per_second is not None
        else "",
        "time": format_rough_duration(state.elapsed) if state.elapsed is not None else "",
        "left": format_rough_duration(state.eta) if state.eta is not None else "",
        "written": f"{format_rough_duration(max(0.0, now - state.written))} ago"
        if state.written is not None
        else "",
        "what": ", ".join(text for text in (*what, state.adapter.partition(", on ")[0]) if text),
    }


def _format_best(best: tuple[str, float, int] | None) -> str:
    """The best evaluation; its metric is named where it is not the usual one."""
    if best is None:
        return ""
    metric, value, step = best
    return f"{'' if metric == 'eval_loss' else metric.removeprefix('eval_') + ' '}{format_number(value)} at {format_number(step)}"


def evaluation_table(run: RunRecord) -> Table:
    """Metrics before and after."""
    table = _new_table("Evaluation", "data", "metric", "before", "after")
    for entry in run.evaluation:
        for metric, change in entry.metrics.items():
            table.add_row(
                _styled_text(entry.name),
                _styled_text(metric.replace("_", " ")),
                _styled_text(format_number(change.before)),
                _styled_text(format_number(change.after), "bold"),
            )
    return table


def sample_tables(run: RunRecord, most: int = 8) -> Iterator[Table]:
    """A table per group of answers: prompt, reference, before, after; what matches the reference is
    green.
    """
    # training rows are samples as well, and have no answer to show here
    shown = [s for s in run.samples if s.before is not None or s.after is not None]
    for group in dict.fromkeys(s.group for s in shown):
        members = [s for s in shown if s.group == group]
        title = group if len(members) <= most else f"{group} (the first {most} of {len(members)})"
        table = _new_table(title, "prompt", "reference", "before", "after")
        table.show_lines = True
        for sample in members[:most]:
            table.add_row(
                _styled_text(sample.prompt),
                _styled_text(sample.reference),
                *(_answer_text(sample, side) for side in ("before", "after")),
            )
        yield table


def _answer_text(sample: SampleRecord, side: str) -> Text:
    answer = getattr(sample, side)
    same = (
        answer is not None
        and sample.reference is not None
        and exact_match(answer, sample.reference) == 1
    )
    return _styled_text(answer, "green" if same else "")


def contracts_table(run: RunRecord) -> Table:
    """What the run promised and whether it held."""
    table = _new_table("Contracts", "", "contract", "detail")
    for contract in sorted(run.contracts, key=lambda c: c.id):
        table.add_row(
            _styled_text(*CONTRACT_STYLES[contract.status]),
            _styled_text(f"{contract.id}. {contract.name}"),
            _styled_text(contract.detail, "dim"),
        )
    return table


def _new_table(title: str, *columns: str) -> Table:
    table = Table(
        title=_styled_text(title, "bold"), title_justify="left", header_style="dim", box=SIMPLE_HEAD
    )
    for column in columns:
        table.add_column(_styled_text(column), overflow="fold")
    return table


def _styled_text(value: str | None, style: str = "") -> Text:
    return Text(MISSING_VALUE if value is None else make_visible(value), style=style)
