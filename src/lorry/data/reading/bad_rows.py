"""Bad rows: one place that decides whether a row that cannot be used stops the run, is skipped or
is set aside.

Everything that reads or encodes rows reports to a ``BadRows``; the counts end up in the run's
receipt.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lorry.errors import ConfigError, DataError, suggest_nearest
from lorry.formatting import format_count

OnBadRow = Literal["error", "skip", "quarantine"]
LONGEST_REASON = 2000  # characters of a reason on the terminal: it may quote a value of the file
REASONS_SHOWN = 20  # how many bad rows are remembered word for word; the counts cover all of them


@dataclass(frozen=True)
class BadRow:
    """Why a row cannot be used: ``kind`` is what it is counted under, ``reason`` is written for a
    person.
    """

    kind: str
    reason: str

    @property
    def short(self) -> str:
        """The reason for a terminal: of a very long one the start."""
        whole = self.reason
        return (
            whole
            if len(whole) <= LONGEST_REASON
            else f"{whole[:LONGEST_REASON]}... ({len(whole)} characters)"
        )


class BadRows:
    """Applies ``on_bad_row`` and keeps the counts. A row that is read again (next epoch, resume) is
    counted once.

    ``quarantine`` is the JSON-lines file that gets ``{"where", "kind", "reason", "raw"}`` for every
    bad row.
    """

    def __init__(self, policy: OnBadRow = "error", quarantine: str | Path | None = None) -> None:
        if policy not in get_args(OnBadRow):
            choices = get_args(OnBadRow)
            raise ConfigError(
                f"on_bad_row={policy!r}; choose one of: {', '.join(choices)}{suggest_nearest(policy, choices)}"
            )
        if policy == "quarantine" and quarantine is None:
            raise ConfigError("on_bad_row=quarantine needs a file to write the bad rows to")
        self.policy = policy
        self.quarantine = (
            Path(quarantine) if policy == "quarantine" and quarantine is not None else None
        )
        self.counts: Counter[str] = Counter()
        self.first: list[str] = []
        self._seen: set[tuple[str, str]] = set()
        self._written: set[str] | None = None

    def report(self, where: str, bad: BadRow, raw: str) -> None:
        """A row with a mistake in it. Raises DataError opening with ``file:line`` when the policy
        is ``error``.
        """
        if self.policy == "error":
            advice = "correct the row, or set on_bad_row=skip or on_bad_row=quarantine"
            raise DataError(f"{where}: {bad.short} ({advice})")
        self.drop(where, bad, raw)

    def drop(self, where: str, bad: BadRow, raw: str) -> None:
        """A sound row that cannot be used (its answer is longer than max_length): counted and left
        out, never an error.
        """
        if (where, bad.kind) in self._seen:
            return
        self._seen.add((where, bad.kind))
        self.counts[bad.kind] += 1
        if len(self.first) < REASONS_SHOWN:
            self.first.append(f"{where}: {bad.short}")
        if self.quarantine is not None:
            self._set_aside(
                self.quarantine,
                {"where": where, "kind": bad.kind, "reason": bad.reason, "raw": raw},
            )

    @property
    def total(self) -> int:
        """Rows left out so far."""
        return sum(self.counts.values())

    def summary(self) -> str:
        """One line for a person; empty when nothing was left out."""
        if not self.total:
            return ""
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.counts.items()))
        aside = f"; written to {self.quarantine}" if self.quarantine else ""
        return f"{format_count(self.total, 'row')} left out ({kinds}), the first: {self.first[0]}{aside}"

    def _set_aside(self, path: Path, record: dict[str, str]) -> None:
        """Append one line in a single write, so that a kill leaves whole lines only; a line already
        there is not repeated.
        """
        line = json.dumps(record)  # ASCII on purpose: raw text may hold lone surrogates
        torn = False
        if self._written is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            self._written = set(before.splitlines())
            torn = bool(before) and not before.endswith("\n")
        if line in self._written:
            return
        self._written.add(line)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, f"{chr(10) if torn else ''}{line}\n".encode())
        finally:
            os.close(handle)
