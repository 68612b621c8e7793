"""Runs side by side in what they cost and what they reached: parameters, memory, time, losses,
metrics, bytes on disk.

    rows = [comparison_row(run) for run in read_readable_runs([Path("runs/lora"), Path("runs/full")])[0]]
    console.print(side_by_side(rows))

Everything comes from the files of the runs; what a run does not say is left empty, and ratios are
to the first run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from rich.table import Table

from lorry.disk.documents import is_finite_number
from lorry.formatting import MISSING_VALUE, format_bytes, format_duration, format_number
from lorry.report.table import _new_table, _styled_text
from lorry.runs.read import RunRecord
from lorry.runs.series import EVALUATION_PREFIX, is_number
from lorry.runs.summary import SUITE_FIGURES

FigureFormatter = Callable[[Any], str]
COMPARED_FIGURES: dict[str, tuple[str, FigureFormatter]] = {
    "trainable_parameters": ("trainable parameters", format_number),
    "trainable_share": ("share of all parameters", lambda share: f"{share:.2%}"),
    "learning_rate": ("learning rate", format_number),
    "steps": ("steps", format_number),
    "peak_memory_bytes": ("peak memory", format_bytes),
    "seconds": ("training time", format_duration),
    "seconds_per_step": ("seconds per step, median", format_number),
    "tokens_per_second": ("tokens per second", format_number),
    "first_loss": ("first loss", format_number),
    "final_loss": ("last loss", format_number),
    "saved_bytes": ("saved on disk", format_bytes),
}
LOSS_FIGURES = ("first_loss", "final_loss", "eval_loss")
# set, or the same for all: a ratio says nothing
UNRATIOED_FIGURES = (
    "learning_rate",
    "steps",
    "first_loss",
)


def comparison_row(run: RunRecord) -> dict[str, Any]:
    """{name, path, and every figure that the run's files give}: plain numbers in bytes, seconds,
    nats per token.
    """
    receipt: Mapping[str, Any] = run.receipt or {}
    train = run.config.get("train")
    figures: dict[str, Any] = {
        name: receipt.get(name) for name in ("trainable_parameters", "saved_bytes")
    }
    total = receipt.get("total_parameters")
    if is_number(figures["trainable_parameters"]) and is_number(total) and total > 0:
        figures["trainable_share"] = figures["trainable_parameters"] / total
    figures |= {
        "learning_rate": train.get("learning_rate") if isinstance(train, dict) else None,
        **_logged_figures(run),
    }
    figures |= _last_metrics(run)
    if (
        task := run.config.get("task", "sft")
    ) != "sft":  # its loss is another quantity: no ratio to that of fine-tuning
        figures = {
            f"{name} ({task})" if name in LOSS_FIGURES else name: value
            for name, value in figures.items()
        }
    ordered = {
        name: figures.get(name)
        for name in (*COMPARED_FIGURES, *(n for n in figures if n not in COMPARED_FIGURES))
    }
    return {
        "name": run.name,
        "path": str(run.path),
        # left out, not shown as infinite: a ratio to it would be 0 or NaN
        **{n: v for n, v in ordered.items() if is_finite_number(v)},
    }


def _logged_figures(run: RunRecord) -> dict[str, Any]:
    """What metrics.jsonl gives."""
    log = run.log
    losses, seconds, peaks = (
        log.series(name)[1] for name in ("loss", "seconds", "peak_memory_bytes")
    )
    # lines with both: a rate over lines that lack one would be of other steps
    timed = [r for r in log.training if is_number(r.get("tokens")) and is_number(r.get("seconds"))]
    spent = sum(r["seconds"] for r in timed)
    return {
        "steps": len(log.training) or None,
        "peak_memory_bytes": max(peaks, default=None),
        "seconds": sum(seconds) or None,
        "seconds_per_step": median(seconds) if seconds else None,
        "tokens_per_second": sum(r["tokens"] for r in timed) / spent if spent else None,
        "first_loss": losses[0] if losses else None,
        "final_loss": losses[-1] if losses else None,
    }


def _last_metrics(run: RunRecord) -> dict[str, Any]:
    """The last value of everything measured on held-out rows while it trained, and what `lorry
    eval` measured afterwards, suites of unlearning among it.
    """
    names = [name for name in run.log.names() if name.startswith(EVALUATION_PREFIX)]
    during = {name: run.log.series(name)[1][-1] for name in names}
    later = {
        f"{entry.name}: {metric}": change.after
        for entry in run.evaluation
        for metric, change in entry.metrics.items()
    }
    # the metrics a table has room for; the report has all
    suites = {
        f"{suite.title}: {metric}": suite.values[metric]
        for suite in run.evals.suites
        for metric in SUITE_FIGURES
        if not suite.part and metric in suite.values
    }
    return during | later | suites


def figure_ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Per run, each figure over the first run's."""
    first = rows[0]
    return [
        {
            n: v / first[n]
            for n, v in row.items()
            if is_number(v) and n not in UNRATIOED_FIGURES and is_number(first.get(n)) and first[n]
        }
        for row in rows
    ]


def compare_runs_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line per figure, a column per run; behind the first run's each value's ratio to it."""
    table = _new_table(
        "Compared" if len(rows) == 1 else f"Compared with {rows[0]['name']}",
        "",
        *(row["name"] for row in rows),
    )
    over = figure_ratios(rows)
    for name in dict.fromkeys(n for row in rows for n in row if n not in ("name", "path")):
        title, shown = COMPARED_FIGURES.get(
            name, (name.removeprefix(EVALUATION_PREFIX).replace("_", " "), format_number)
        )
        title = f"held-out {title}" if name.startswith(EVALUATION_PREFIX) else title
        cells = [
            _figure_cell(row.get(name), shown, over[at].get(name) if at else None)
            for at, row in enumerate(rows)
        ]
        table.add_row(_styled_text(title, "dim"), *map(_styled_text, cells))
    return table


def _figure_cell(value: Any, shown: FigureFormatter, ratio: float | None) -> str:
    if value is None:
        return MISSING_VALUE
    return (
        shown(value)
        if ratio is None
        else f"{shown(value)}  ({format_number(float(f'{ratio:.3g}'))}x)"
    )
