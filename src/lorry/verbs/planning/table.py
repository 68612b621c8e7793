"""What `lorry plan` prints: memory by component, what was tried, and one line of verdict."""

from __future__ import annotations

from functools import partial

from rich.table import Column, Table

from lorry.config.parsing.sizes import size_in_words
from lorry.console import VisibleConsole
from lorry.plan.memory import MemoryEstimate
from lorry.plan.parallel.split import ParallelSplit
from lorry.plan.report import RunPlan, StepSpeed
from lorry.plan.search import ChoiceSearchResult

MAX_SHOWN_CHOICES = 6  # choices of a search that are worth a line


def print_plan(plan: RunPlan, console: VisibleConsole) -> None:
    """The table by component, the search if there was one, one line of verdict."""
    unit = "GPUs" if plan.setup.device == "cuda" else "processes"
    where = (
        f"{plan.split.processes} {unit} ({_split_in_words(plan.split)}), each"
        if plan.split.processes > 1
        else plan.setup.device
    )
    size = (
        f"{plan.shape.parameters / 1e9:.2f}B"
        if plan.shape.parameters >= 1e9
        else f"{plan.shape.parameters / 1e6:.0f}M"
    )
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    what = plan.choice.words()
    if plan.jobs:
        ranks = sorted({job.rank for job in plan.jobs})
        what = (
            f"{len(plan.jobs)} jobs of r={', '.join(map(str, ranks))}, up to {plan.setup.tokens} tokens at once, "
            f"recompute {plan.setup.recompute}, {plan.setup.precision}"
        )
    say(
        f"{plan.model} ({size} parameters) on {where}: {what}, up to {plan.setup.length} tokens a row"
    )
    console.print(_memory_table(plan.memory))
    if plan.sent:
        console.print(_sent_table(plan))
    if plan.split.processes > 1:
        sizes = plan.adapter_sizes
        what = "the adapter" if plan.choice.rank else "weights that train"
        say(
            f"{what}: {size_in_words(sizes.file)} saved, {size_in_words(sizes.checkpoint)} in a "
            f"checkpoint, {size_in_words(sizes.sync)} to an inference engine"
        )
    if plan.search is not None:
        console.print(_search_table(plan.search))
    for note in plan.notes:
        say(f"note: {note}")
    say(plan_verdict(plan))


def _memory_table(memory: MemoryEstimate) -> Table:
    table = Table("component", Column("bytes", justify="right"), "what")
    for c in memory.components:
        table.add_row(c.name, size_in_words(c.bytes), c.words)
    table.add_section()
    table.add_row("peak", size_in_words(memory.total), "")
    return table


def _split_in_words(split: ParallelSplit) -> str:
    """The backend, and how the processes are divided where that is not one way."""
    parts: list[str] = [split.backend]
    if split.replicas > 1:
        parts.append(f"{split.replicas} replicas of {split.shards} shards")
    parts += [
        f"{name}={size}"
        for name, size in (
            ("tensor_parallel", split.tensor),
            ("pipeline_parallel", split.pipeline),
            ("expert_parallel", split.expert),
        )
        if size > 1
    ]
    return ", ".join(parts)


def _sent_table(plan: RunPlan) -> Table:
    """What one process sends in an optimizer step, by collective."""
    right = partial(Column, justify="right")
    table = Table("sent in a step", "collective", right("each"), right("times"), right("bytes"))
    for c in plan.sent:
        table.add_row(
            c.what,
            f"{c.kind} of {c.ranks}",
            size_in_words(c.sent_each),
            f"{c.calls}",
            size_in_words(c.sent),
        )
    table.add_section()
    table.add_row("in all", "", "", "", size_in_words(plan.sent_per_step))
    return table


def _search_table(search: ChoiceSearchResult) -> Table:
    """The choice made, and those that were preferred to it, the nearest last."""
    table = Table(
        "choice (preferred first)", Column("peak", justify="right"), "exceeds the budget at"
    )
    if len(search.tried) > MAX_SHOWN_CHOICES:
        table.add_row(f"... {len(search.tried) - MAX_SHOWN_CHOICES} more do not fit", "", "")
    for tried in search.tried[-MAX_SHOWN_CHOICES:]:
        table.add_row(
            tried.choice.words(), size_in_words(tried.memory.total), tried.overrun or "fits"
        )
    return table


def plan_verdict(plan: RunPlan) -> str:
    """One line: does it fit, and how fast it would run."""
    need = size_in_words(plan.memory.total)
    parts = [f"needs {need}"]
    if plan.budget is not None:
        parts = [
            f"{'fits' if plan.fits else 'does not fit'} {plan.budget_is}: {need} of {size_in_words(plan.budget)}"
        ]
    if not plan.fits and plan.alternative is not None:
        parts.append(
            f"would fit with {plan.alternative.choice.words()}: {size_in_words(plan.alternative.memory.total)}"
        )
    if plan.speed is not None:
        s = plan.speed
        parts.append(
            f"about {s.tokens_per_second:,.0f} tokens/s, {_format_seconds(s.seconds_per_step)} a step "
            f"({plan.flops.step / 1e9:.2f} GFLOP/token at {_format_rate(s)}, {s.source})"
        )
    return "; ".join(parts)


def _format_rate(speed: StepSpeed) -> str:
    """FLOP/s in words, with the share that a step is expected to reach unless steps reached it."""
    rate = (
        f"{speed.rate / 1e12:.2f} TFLOP/s"
        if speed.rate >= 1e12
        else f"{speed.rate / 1e9:.3g} GFLOP/s"
    )
    return rate if speed.efficiency == 1 else f"{speed.efficiency:.0%} of {rate}"


def _format_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
