"""What a sweep found: its combinations ranked, with an interval over seeds; which to take, in
sentences; held-out loss against rate, as a chart.

A combination is all jobs that differ in their seed alone. Less is better: a loss.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorry.formatting import format_number
from lorry.report.curves import ChartPanel, CurveSeries

SEED, RATE = "train.seed", "train.learning_rate"
RANK, ALPHA = "lora.r", "lora.lora_alpha"
# of a seed in a job's name
SEED_NAME = re.compile(r"-?seed\d+")
LEVEL = 0.95  # of an interval
MAX_NAMED = 4


@dataclass(frozen=True)
class Combination:
    """Jobs that differ in their seed alone: ``settings``, {dotted name: value} without it; ``losses``,
    by job; ``parameters``: how many numbers each trains; ``path``: the directory of the best of their
    adapters."""

    name: str
    settings: Mapping[str, Any]
    losses: Sequence[float]
    parameters: int
    path: str

    @property
    def mean(self) -> float:
        """Of the losses; infinite where one is none."""
        values = [math.inf if math.isnan(loss) else loss for loss in self.losses]
        return sum(values) / len(values)

    @property
    def half_width(self) -> float | None:
        """Of a 95% interval for the mean over seeds (Student's t); None of one seed."""
        count = len(self.losses)
        if count < 2 or not math.isfinite(self.mean):
            return None
        # half a second to import
        from scipy.special import stdtrit

        spread = math.sqrt(sum((loss - self.mean) ** 2 for loss in self.losses) / (count - 1))
        return float(stdtrit(count - 1, (1 + LEVEL) / 2)) * spread / math.sqrt(count)

    def describe_loss(self) -> str:
        """``1.234 +- 0.012``."""
        width = self.half_width
        return format_number(self.mean) + ("" if width is None else f" +- {format_number(width)}")

    def describe_settings(self) -> str:
        """``r 8, learning_rate 0.001``."""
        return ", ".join(f"{name.rpartition('.')[2]} {v}" for name, v in self.settings.items())

    def as_json(self) -> dict[str, Any]:
        """Its row in sweep.json."""
        return {
            "name": self.name,
            "settings": dict(self.settings),
            "seeds": len(self.losses),
            "parameters": self.parameters,
            "mean": self.mean,
            "half_width": self.half_width,
            "path": self.path,
        }


def combine_seeds(rows: Sequence[Mapping[str, Any]], loss: str) -> list[Combination]:
    """The combinations of a sweep's jobs (rows of sweep.json), the best first. ``loss``: the number
    that ranks them, ``eval_loss`` or ``loss``; a job without it counts as infinitely bad."""
    groups = dict[str, list[Mapping[str, Any]]]()
    for row in rows:
        own = {name: value for name, value in row["settings"].items() if name != SEED}
        groups.setdefault(repr(sorted(own.items())), []).append(row)
    combinations = []
    for jobs in groups.values():
        losses = [_loss_of(job, loss) for job in jobs]
        best = jobs[min(range(len(jobs)), key=losses.__getitem__)]
        own = {name: value for name, value in best["settings"].items() if name != SEED}
        name = SEED_NAME.sub("", best["name"]) or best["name"]
        name = "/".join(filter(None, (best.get("base"), name)))
        count = best["parameters"]
        combinations.append(Combination(name, own, losses, count, best["path"]))
    return sorted(combinations, key=lambda one: one.mean)


def _loss_of(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    return float(value) if value is not None and not math.isnan(value) else math.inf


def sweep_advice(ranked: Sequence[Combination], *, held_out: bool) -> list[str]:
    """Sentences: which to take, what cannot be told from it, and where the grid ends too early.
    ``held_out``: whether rows that nobody trained on were asked."""
    best = ranked[0]
    if not math.isfinite(best.mean):
        return ["no combination ended with a finite loss; lower learning_rate"]
    seeds = max(len(one.losses) for one in ranked)
    near = [one for one in ranked[1:] if _is_level(best, one)]
    # of those that cannot be told apart the smallest; among equals the best
    taken = min([best, *near], key=lambda one: (one.parameters, one.mean))
    lines = list[str]()
    over = f" over {seeds} seeds" if seeds > 1 else ""
    if taken is best:
        lines.append(f"take {best.name}: loss {best.describe_loss()}{over}")
    else:
        lines.append(
            f"take {taken.name}: its loss {taken.describe_loss()} cannot be told from the best, "
            f"{best.name} with {best.describe_loss()}{over}, and it has fewer parameters"
            f" ({taken.parameters:,} against {best.parameters:,})"
        )
    if others := [one.name for one in near if one is not taken]:
        more = f" and {len(others) - MAX_NAMED} more" if len(others) > MAX_NAMED else ""
        lines.append(f"as good, as far as this can tell: {', '.join(others[:MAX_NAMED])}{more}")
    if (edge := _edge(ranked, best)) is not None:
        lines.append(edge)
    if (scale := _scale_of_ranks(ranked)) is not None:
        lines.append(
            f"lora_alpha is {scale:g} x r here, so that the best rate falls as the rank grows: compare ranks "
            "at their own best rates, or give all the same lora_alpha"
        )
    if seeds == 1 and len(ranked) > 1:
        lines.append("one seed each: small differences may be chance; give seeds=3 for intervals")
    if not held_out:
        lines.append(
            "nothing was held out: the last training loss favours what memorises; give test_size or eval"
        )
    return lines


def _is_level(best: Combination, other: Combination) -> bool:
    """Whether the difference of two means lies within their intervals: Welch's test at 5%, the degrees
    of freedom by Satterthwaite."""
    widths = best.half_width, other.half_width
    if widths[0] is None or widths[1] is None or not math.isfinite(other.mean):
        return False
    from scipy.special import stdtrit

    errors = [_variance_of_mean(one) for one in (best, other)]
    if not sum(errors):
        return best.mean == other.mean
    freedom = sum(errors) ** 2 / sum(
        error**2 / (len(one.losses) - 1) for error, one in zip(errors, (best, other), strict=True)
    )
    bound = float(stdtrit(freedom, (1 + LEVEL) / 2)) * math.sqrt(sum(errors))
    return other.mean - best.mean <= bound


def _variance_of_mean(one: Combination) -> float:
    count = len(one.losses)
    return sum((loss - one.mean) ** 2 for loss in one.losses) / (count - 1) / count


def _rates(ranked: Sequence[Combination]) -> list[float]:
    """Those that were tried."""
    return sorted({one.settings[RATE] for one in ranked if RATE in one.settings})


def _edge(ranked: Sequence[Combination], best: Combination) -> str | None:
    """Whether the best rate is the first or the last of several that were tried: a better one may lie
    beyond."""
    rates, taken = _rates(ranked), best.settings.get(RATE)
    if len(rates) < 2 or taken not in (rates[0], rates[-1]):
        return None
    end, factor = ("lowest", 1 / 3) if taken == rates[0] else ("highest", 3)
    return (
        f"learning_rate={taken:g}, the best, is the {end} that was tried: a better one may lie beyond "
        f"it; try {taken * factor:.1g} too"
    )


def _scale_of_ranks(ranked: Sequence[Combination]) -> float | None:
    """lora_alpha / r where several ranks share it; None where they do not, or one rank was tried."""
    pairs = [(one.settings.get(RANK), one.settings.get(ALPHA)) for one in ranked]
    # r=auto has none before its rows are read
    known = [(r, a) for r, a in pairs if isinstance(r, int) and isinstance(a, int | float)]
    ranks, scales = {r for r, _ in known}, {a / r for r, a in known}
    return scales.pop() if len(ranks) > 1 and len(scales) == 1 else None


def rate_panel(ranked: Sequence[Combination], *, held_out: bool) -> ChartPanel | None:
    """Loss against learning rate, a curve for each of what else was tried; None where one rate was."""
    if len(_rates(ranked)) < 2:
        return None
    curves = dict[str, list[Combination]]()
    for one in ranked:
        curves.setdefault(_other_settings(one), []).append(one)
    series = list[CurveSeries]()
    # in the order of their best, so that the legend begins with it
    for color, (label, points) in enumerate(curves.items()):
        points = sorted(points, key=lambda one: one.settings[RATE])
        places = [one.settings[RATE] for one in points]
        series.append(CurveSeries(label, color, "line", places, [one.mean for one in points]))
        # an upright line for each interval
        series += [
            CurveSeries(
                label,
                color,
                "guide",
                [one.settings[RATE]] * 2,
                [one.mean - one.half_width, one.mean + one.half_width],
                in_legend=False,
            )
            for one in points
            if one.half_width is not None
        ]
    what = "held-out loss" if held_out else "last training loss"
    title = f"{what[0].upper()}{what[1:]} by learning rate"
    return ChartPanel(title, "", tuple(series), x_label="learning rate", x_whole=False, x_log=True)


def _other_settings(one: Combination) -> str:
    return ", ".join(
        f"{name.rpartition('.')[2]} {value}" for name, value in one.settings.items() if name != RATE
    )
