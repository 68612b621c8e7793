"""The best choice that fits a budget, and why the better ones do not.

Choices come in order of preference: the largest rank, then without recompute before with it, then
the largest micro-batch (at the same number of rows per optimizer step, so that the result does not
change).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lorry.plan.memory import MemoryEstimate, PrecisionName, RecomputeMode


@dataclass(frozen=True, kw_only=True)
class PlanChoice:
    """What a search may vary. ``rows`` x ``accumulation`` is the same in all choices of a search."""

    rank: int
    rows: int
    accumulation: int
    recompute: RecomputeMode
    precision: PrecisionName

    def words(self) -> str:
        """For a table or a note."""
        plural = "" if self.rows == 1 else "s"
        rows = f"{self.rows} row{plural}" + (
            f" x {self.accumulation}" if self.accumulation > 1 else ""
        )
        what = f"r={self.rank}" if self.rank else "base weights train"
        return f"{what}, {rows}, recompute {self.recompute}, {self.precision}"


@dataclass(frozen=True)
class TriedChoice:
    """A choice, what it needs, and the component at which it passes the budget (None: it fits)."""

    choice: PlanChoice
    memory: MemoryEstimate
    overrun: str | None


@dataclass(frozen=True)
class ChoiceSearchResult:
    """``best``: the first choice that fits, or None; ``tried``: all up to it, or all; ``least``:
    the leanest of all.
    """

    best: TriedChoice | None
    tried: tuple[TriedChoice, ...]
    least: TriedChoice


def enumerate_choices(
    ranks: Sequence[int],
    splits: Sequence[tuple[int, int]],
    recomputes: Sequence[RecomputeMode],
    precisions: Sequence[PrecisionName],
) -> list[PlanChoice]:
    """Every combination, preferred ones first."""
    return [
        PlanChoice(
            rank=rank,
            rows=rows,
            accumulation=accumulation,
            recompute=recompute,
            precision=precision,
        )
        # the order of these loops is the order of preference; the innermost is given up first
        for precision in precisions
        for rank in sorted(ranks, reverse=True)
        for recompute in recomputes
        for rows, accumulation in sorted(splits, reverse=True)
    ]


def batch_splits(rows: int, accumulation: int) -> list[tuple[int, int]]:
    """Ways to make the same optimizer step of smaller micro-batches, by halving: (8, 1) -> (8, 1),
    (4, 2), (2, 4), (1, 8).
    """
    splits = [(rows, accumulation)]
    # only while the rows halve evenly: rows x accumulation must stay what the run was told
    while splits[-1][0] % 2 == 0:
        splits.append((splits[-1][0] // 2, splits[-1][1] * 2))
    return splits


def search_choices(
    budget: int, options: Iterable[PlanChoice], need: Callable[[PlanChoice], MemoryEstimate]
) -> ChoiceSearchResult:
    """Try the options in their order. ``need`` gives a choice's memory."""
    # all of them, though the first that fits is the answer: where none does, the leanest is named
    every = [
        TriedChoice(option, memory, _first_overrun(memory, budget))
        for option in options
        for memory in [need(option)]
    ]
    assert every, "a search needs at least one choice"
    first = next((i for i, t in enumerate(every) if t.overrun is None), None)
    least = min(every, key=lambda t: t.memory.total)
    if first is None:
        return ChoiceSearchResult(None, tuple(every), least)
    return ChoiceSearchResult(every[first], tuple(every[: first + 1]), least)


def _first_overrun(memory: MemoryEstimate, budget: int) -> str | None:
    return None if memory.total <= budget else memory.breaks(budget).name
