"""Which curves a report draws, from the metrics of one run or several; svg.py and plots.py draw the same ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lorry.formatting import byte_scale
from lorry.runs.read import Run
from lorry.runs.series import EVALUATION, Log, is_number

Kind = Literal["raw", "line", "points"]
NOT_CURVES = {"epoch", "tokens", "supervised_tokens", "seconds"}  # counts of a step; throughput shows what matters of them
DRAWN = NOT_CURVES | {"loss", "eval_loss", "learning_rate", "grad_norm", "peak_memory_bytes"}  # these in panels of their own
LARGEST = 1e300  # values beyond it are treated as infinite: sums and spans of them would overflow
MOST_RAW = 3  # with more runs than this only smoothed curves stay readable
SMOOTH_POINTS = 1000
MOST_DOTS = 60  # more circles than this on a curve would hide it
FEW = 10  # shorter series are drawn as they are, since smoothing would hide them


MOST_NAMED = 40  # panels beside the fixed ones: each takes a tenth of a second, and nobody looks at hundreds
MOST_ADAPTERS = 64  # curves of a panel
BY_ADAPTER = {
    "loss": "Loss of each adapter", "eval_loss": "Held-out loss of each adapter",
    "learning_rate": "Learning rate of each adapter", "grad_norm": "Gradient norm of each adapter",
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One curve: ``label`` says whose it is (empty: the panel's title does), ``color`` is the number of its run."""

    label: str
    color: int
    kind: Kind
    steps: Sequence[float]
    values: Sequence[float]
    in_legend: bool = True


@dataclass(frozen=True)
class Panel:
    """One chart. ``from_zero`` starts its axis there; ``log_if_wide`` takes a log axis when values span three decades."""

    title: str
    unit: str
    series: tuple[Series, ...]
    from_zero: bool = False
    log_if_wide: bool = False


def drawable(value: float) -> bool:
    """Whether a value has a place on an axis."""
    return abs(value) < LARGEST


def panels(runs: Sequence[Run]) -> list[Panel]:
    """The charts that the runs' metrics can fill, the loss first, named terms and evaluation metrics last."""
    memory = max((v for run in runs for v in _peaks(run.log) if drawable(v)), default=0.0)
    divisor, unit = byte_scale(memory)
    fixed = [
        Panel("Loss", "nats per token", _loss(runs), log_if_wide=True),
        Panel("Learning rate", "", _plain(runs, "learning_rate"), from_zero=True, log_if_wide=True),
        Panel("Gradient norm", "before clipping", _smoothed(runs, lambda log: log.series("grad_norm")), log_if_wide=True),
        Panel("Throughput", "tokens/s", _smoothed(runs, _throughput), from_zero=True),
        Panel("Peak memory", unit, _plain(runs, "peak_memory_bytes", divisor), from_zero=True),
    ]
    names = [name for name in dict.fromkeys(n for run in runs for n in run.log.names()) if name not in DRAWN]
    terms = [_named(runs, name) for name in names[:MOST_NAMED]]
    drawn_panels = [*fixed, *_by_adapter(runs), *terms]
    return [panel for panel in drawn_panels if any(s.steps for s in panel.series)]


def not_drawn(runs: Sequence[Run]) -> str:
    """What `panels` leaves out of metrics with very many names, in words; "" where it draws all."""
    names = {name for run in runs for name in run.log.names()} - DRAWN
    adapters = sum(len(run.log.adapters()) for run in runs)
    left_out = [
        f"{count - most} of {count} {what}"
        for count, most, what in ((len(names), MOST_NAMED, "named values"), (adapters, MOST_ADAPTERS, "adapters"))
        if count > most
    ]
    return f"Not drawn: {' and '.join(left_out)}; metrics.jsonl has them." if left_out else ""


def _by_adapter(runs: Sequence[Run]) -> list[Panel]:
    """Loss, held-out loss, rate and gradient norm of each adapter of runs that train several at once."""
    owners = [(run, adapter) for run in runs for adapter in run.log.adapters()][:MOST_ADAPTERS]
    found = []
    for name, title in BY_ADAPTER.items():
        series = []
        for color, (run, adapter) in enumerate(owners):
            steps, values = run.log.series(name, adapter)
            curve = smooth(steps, values, _window(steps)) if len(steps) > FEW else (steps, values)
            series.append(Series(adapter if len(runs) == 1 else f"{run.name}, {adapter}", color, "line", *curve))
        found.append(Panel(title, "", tuple(series), log_if_wide=True))
    return found


def _named(runs: Sequence[Run], name: str) -> Panel:
    title = name.removeprefix(EVALUATION).replace("_", " ") + (" (evaluation)" if name.startswith(EVALUATION) else "")
    if not name.startswith(EVALUATION):
        return Panel(title, "", _smoothed(runs, lambda log: log.series(name)), log_if_wide=True)
    lines = _plain(runs, name)
    dots = tuple(replace(s, kind="points", in_legend=False) for s in lines if len(s.steps) <= MOST_DOTS)
    return Panel(title, "", (*lines, *dots), log_if_wide=True)


def _peaks(log: Log) -> list[float]:
    return log.series("peak_memory_bytes")[1]


def _throughput(log: Log) -> tuple[list[int], list[float]]:
    timed = [r for r in log.training if is_number(r.get("tokens")) and is_number(r.get("seconds")) and r["seconds"] > 0]
    return [r["step"] for r in timed], [r["tokens"] / r["seconds"] for r in timed]


def _loss(runs: Sequence[Run]) -> tuple[Series, ...]:
    evaluated = []
    for color, run in enumerate(runs):
        steps, values = run.log.series("eval_loss")
        if steps:
            evaluated.append(Series(_label(runs, run, "evaluation"), color, "points", steps, values, len(runs) == 1))
    return (*_smoothed(runs, lambda log: log.series("loss")), *evaluated)


def _label(runs: Sequence[Run], run: Run, what: str) -> str:
    """What a curve shows; among several runs, whose it is as well."""
    return what if len(runs) == 1 else f"{run.name}, {what}"


def _plain(runs: Sequence[Run], name: str, divisor: float = 1.0) -> tuple[Series, ...]:
    found = [(color, run.name, *run.log.series(name)) for color, run in enumerate(runs)]
    return tuple(
        Series(label if len(runs) > 1 else "", color, "line", steps, [v / divisor for v in values])
        for color, label, steps, values in found
        if steps
    )


def _smoothed(runs: Sequence[Run], pick: Callable[[Log], tuple[list[int], list[float]]]) -> tuple[Series, ...]:
    """The values as they are, thin, under a moving mean; a short series only as it is."""
    raw, lines = [], []
    for color, run in enumerate(runs):
        steps, values = pick(run.log)
        name = run.name if len(runs) > 1 else ""
        if not steps:
            continue
        if len(steps) <= FEW:
            lines.append(Series(name, color, "line", steps, values))
            continue
        if len(runs) <= MOST_RAW:
            raw.append(Series(_label(runs, run, "each step"), color, "raw", steps, values, len(runs) == 1))
        window = _window(steps)
        lines.append(Series(name or f"mean of {window} steps", color, "line", *smooth(steps, values, window)))
    return (*raw, *lines)


def _window(steps: Sequence[float]) -> int:
    """Steps of a moving mean: a twentieth of the series, odd, at least 3."""
    return len(steps) // 40 * 2 + 3


def smooth(steps: Sequence[float], values: Sequence[float], window: int) -> tuple[list[float], list[float]]:
    """The mean over ``window`` steps around each, fewer at the ends; values that have no place on an axis are passed over.

    A centred mean and not an exponential one, since that lags behind a falling loss and seems to contradict evaluations.
    Of a long series only about `SMOOTH_POINTS` means are taken, the last step's among them: between them it hardly moves.
    """
    half, count = window // 2, len(values)
    chosen = [*range(0, count - 1, math.ceil(count / SMOOTH_POINTS)), count - 1]
    out = []
    for i in chosen:
        around = [v for v in values[max(0, i - half) : i + half + 1] if drawable(v)]
        out.append(sum(around) / len(around) if around else math.nan)
    return [steps[i] for i in chosen], out


def thin(steps: Sequence[float], values: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    """At most about ``most`` points that draw the same curve: the lowest and highest of each stretch, and every gap.

    A value that is not finite survives as one NaN of its stretch, so that a break in a long curve is never smoothed away.
    """
    if len(steps) <= most:
        return list(steps), list(values)
    width = math.ceil(2 * len(steps) / most)
    chosen: list[int] = []
    for start in range(0, len(steps), width):
        stretch = range(start, min(start + width, len(steps)))
        finite = [i for i in stretch if drawable(values[i])]
        keep = {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)} if finite else set()
        keep |= {next(i for i in stretch if not drawable(values[i]))} if len(finite) < len(stretch) else set()
        chosen += sorted(keep | {i for i in (0, len(steps) - 1) if i in stretch})
    return [steps[i] for i in chosen], [values[i] for i in chosen]
