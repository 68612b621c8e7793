"""What an oracle's EVAL.json says: a model trained without the rows to forget, ours or one of
open-unlearning's published files.

    logs = RetainLogs.read(Path("saves/eval/tofu_Llama-3.2-1B-Instruct_retain90/TOFU_EVAL.json"))
    logs.truth_ratios(forget_set)       # one per row, in order

Whatever is missing, damaged, or of other rows is refused: a forget quality against the wrong oracle
looks like any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorry.data.reading.suite_splits import FORGET_ROWS
from lorry.disk import documents
from lorry.disk.documents import is_finite_number
from lorry.errors import DataError, shortlist_names
from lorry.evaluate.unlearning.rows import SuiteSet

# open-unlearning's configuration file writes the second, its result files the first
TRUTH_RATIO_NAMES = ("forget_truth_ratio", "forget_Truth_Ratio")


@dataclass(frozen=True)
class RetainLogs:
    """The records of an oracle's EVAL.json."""

    path: Path
    records: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of all records."""
        return hashlib.sha256(json.dumps(self.records, sort_keys=True).encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """{path, sha256, values: {metric: its value over all rows}}, for the records that were
        measured against them: the file itself may be gone when those are read.
        """
        values = {
            name: record["agg_value"]
            for name, record in self.records.items()
            if isinstance(record, dict) and is_finite_number(record.get("agg_value"))
        }
        return {"path": str(self.path.resolve()), "sha256": self.digest, "values": values}

    @classmethod
    def read(cls, path: Path) -> RetainLogs:
        """Raises DataError for a file that is absent, damaged or no EVAL.json."""
        records = documents.read_object(path, nonfinite=True)  # each number that is used is checked
        if not any(
            isinstance(record, dict) and "agg_value" in record for record in records.values()
        ):
            raise DataError(
                f"retain_logs_path={path}: it has no metric with an agg_value; give "
                "the oracle's EVAL.json, not its SUMMARY.json"
            )
        return cls(path, records)

    def truth_ratios(self, rows: SuiteSet) -> list[float]:
        """t of every forget row, in order. Raises DataError."""
        name, record = self._record(*TRUTH_RATIO_NAMES)
        self._expect_rows(name, record, rows)
        return self._scores(name, record.get("value_by_index"), len(rows.rows))

    def attack_auc(self, attack: str, sets: Mapping[str, SuiteSet]) -> float:
        """AUC of an attack on the oracle, of forget rows against the holdout. Raises DataError."""
        name, record = self._record(attack)
        # either side of the two moves the area
        for role in ("forget", "holdout"):
            self._expect_rows(name, record, sets[role], role)
        self._scores(name, self._part(record, "forget"), len(sets["forget"].rows))
        return self._number(record.get("auc", record["agg_value"]), f"{name}.auc")

    def losses(self, rows: SuiteSet, role: str) -> list[float]:
        """Mean loss of every row of a role (forget, holdout): the scores of its mia_loss. Raises
        DataError.
        """
        name, record = self._record("mia_loss")
        self._expect_rows(name, record, rows, role)
        return self._scores(f"{name}.{role}", self._part(record, role), len(rows.rows))

    def _record(self, *names: str) -> tuple[str, Mapping[str, Any]]:
        for name in names:
            record = self.records.get(name)
            if isinstance(record, dict) and "agg_value" in record:
                return name, record
        raise DataError(
            f"retain_logs_path={self.path}: no {names[0]} in it (it has "
            f"{shortlist_names(self.records)}); evaluate the oracle with metrics=[{names[0]}]"
        )

    @staticmethod
    def _part(record: Mapping[str, Any], role: str) -> Any:
        part = record.get(role)
        return part.get("value_by_index") if isinstance(part, dict) else None

    def _expect_rows(
        self, name: str, record: Mapping[str, Any], rows: SuiteSet, role: str = "forget"
    ) -> None:
        """Ours say which rows they are of; of published ones only the number tells."""
        known = record.get("rows")
        if isinstance(known, dict) and known.get(role) != rows.digest:
            raise DataError(
                f"retain_logs_path={self.path}: {name} was measured on other rows "
                f"(or with another question_key) than {rows.name}; evaluate the "
                "oracle on the same rows"
            )

    def _scores(self, name: str, values: Any, rows: int) -> list[float]:
        if not isinstance(values, dict):
            raise DataError(f"retain_logs_path={self.path}: {name} has no value_by_index")
        # published logs name no split: their length does, since the three differ
        if len(values) != rows:
            split = next((s for s, count in FORGET_ROWS.items() if count == len(values)), "")
            hint = f" (those of {split})" if split else ""
            raise DataError(
                f"retain_logs_path={self.path}: {name} has {len(values)} "
                f"rows{hint}, but {rows} are evaluated here; give the oracle's log "
                "of the same split"
            )
        if set(values) != {str(at) for at in range(rows)}:
            raise DataError(
                f"retain_logs_path={self.path}: {name} is not numbered from 0 to {rows - 1}"
            )
        items = ((str(at), values[str(at)]) for at in range(rows))
        return [
            self._number(item.get("score") if isinstance(item, dict) else None, f"{name}.{at}")
            for at, item in items
        ]

    def _number(self, value: Any, field: str) -> float:
        if not is_finite_number(value):
            raise DataError(
                f"retain_logs_path={self.path}: {field} is {value!r:.40} instead of "
                "a number; the file is damaged"
            )
        return float(value)
