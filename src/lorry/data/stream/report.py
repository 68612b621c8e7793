"""What became of the rows of a data set: counts, token statistics, what was cut or left out. For
the receipt and for a person.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorry.formatting import format_count


@dataclass
class DataReport:
    """What became of the rows: for the run's receipt and for a person."""

    source: str
    rows: int = 0  # usable rows read
    sequences: int = 0  # of which a long text makes several
    tokens: int = 0
    supervised: int = 0
    shortened: int = 0  # rows whose prompt was cut to max_length
    tokens_cut: int = 0
    characters_cut: int = 0  # and these, of prompts so long that their middle was never tokenised
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> rows
    first_left_out: list[str] = field(default_factory=list)  # the first few, with file:line
    notes: list[str] = field(default_factory=list)
    # mean, median and longest sequence in tokens
    lengths: dict[str, float] = field(default_factory=dict)
    # of a mixture: the same of each named set, and its share
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Supervised share of all tokens, 0 to 1."""
        return self.supervised / self.tokens if self.tokens else 0.0

    def lines(self) -> list[str]:
        """For a person, one fact a line."""
        lines = [
            f"{self.source}: {format_count(self.rows, 'row')}, {format_count(self.sequences, 'sequence')}, "
            f"{self.tokens} tokens, {self.share:.1%} supervised"
        ]
        lines += [_mixture_line(name, part) for name, part in self.parts.items()]
        if self.shortened:
            more = (
                f" and {self.characters_cut} characters that were not tokenised"
                if self.characters_cut
                else ""
            )
            lines.append(
                f"{format_count(self.shortened, 'row')} {'was' if self.shortened == 1 else 'were'} longer than max_length: "
                f"{self.tokens_cut} prompt tokens{more} cut, answers kept"
            )
        lines += [
            f"left out: {format_count(n, 'row')} ({reason})"
            for reason, n in sorted(self.left_out.items())
        ]
        return lines + self.first_left_out + self.notes


def _mixture_line(name: str, part: Mapping[str, Any]) -> str:
    """A named set of a mixture in a line."""
    tokens, lengths = max(part["tokens"], 1), part["lengths"]
    text = (
        f"  {name}: {format_count(part['rows'], 'row')}, {part['drawn']} drawn per "
        f"epoch ({part['share']:.1%}); {part['tokens']} tokens, a row "
        f"{lengths['mean']:.0f} on average, {lengths['median']:.0f} in the middle, "
        f"{lengths['longest']:.0f} at most; {part['supervised'] / tokens:.1%} "
        "supervised"
    )
    return text + (
        f"; {part['shortened']} prompts cut by {part['tokens_cut']} tokens"
        if part["shortened"]
        else "; none cut"
    )


def length_statistics(lengths: np.ndarray) -> dict[str, float]:
    """Tokens of a sequence: mean, median, longest."""
    if not len(lengths):
        return {"mean": 0.0, "median": 0.0, "longest": 0.0}
    return {
        "mean": float(lengths.mean()),
        "median": float(np.median(lengths)),
        "longest": float(lengths.max()),
    }


COUNTED_FIELDS = (
    "rows",
    "sequences",
    "tokens",
    "supervised",
    "shortened",
    "tokens_cut",
    "characters_cut",
)


def merge_reports(
    parts: Sequence[tuple[str, DataReport]], drawn: Sequence[int], lengths: dict[str, float]
) -> DataReport:
    """The report of a mixture: the sums, and what each named set is of it. ``drawn``: sequences of
    each set in an epoch.
    """
    merged = DataReport("mixture of " + ", ".join(name for name, _ in parts), lengths=lengths)
    for (name, own), quota in zip(parts, drawn, strict=True):
        for count in COUNTED_FIELDS:
            setattr(merged, count, getattr(merged, count) + getattr(own, count))
        merged.left_out |= {f"{name}: {reason}": n for reason, n in own.left_out.items()}
        merged.first_left_out += own.first_left_out
        merged.notes += [note for note in own.notes if note not in merged.notes]
        figures = {count: getattr(own, count) for count in ("source", *COUNTED_FIELDS, "lengths")}
        merged.parts[name] = {**figures, "drawn": quota, "share": quota / max(sum(drawn), 1)}
    return merged
