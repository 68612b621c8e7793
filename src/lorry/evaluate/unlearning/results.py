"""A suite's two files: TOFU_EVAL.json, every metric with its rows, and TOFU_SUMMARY.json, its values.

    store = SuiteResults.open(folder, "TOFU", {"model_utility": "9f..."})
    store.saved_record("model_utility")  # its record, if it was measured of the same things before

Both are open-unlearning's files, readable by its tools; each record of ours also has ``digest``, a
SHA-256 of all its value hangs on (the model's weights, rows, settings, the oracle's logs), ``model``
and ``rows``, which model and rows those were. **A record is used again only where its digest
agrees**; it is written as soon as it is measured, so a suite that was killed goes on behind its last
finished metric.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorry.backends.distributed.communicator import Communicator
from lorry.disk import documents, durable
from lorry.errors import DataError, NonFiniteError
from lorry.evaluate.unlearning.suite import MetricRecord
from lorry.runs import ownership
from lorry.runs.layout import SUITE_ROWS, SUITE_VALUES


def eval_file(title: str) -> str:
    """The name of the file with every row."""
    return title + SUITE_ROWS


def summary_file(title: str) -> str:
    """The name of the file with the values alone."""
    return title + SUITE_VALUES


def refuse_foreign_suite(folder: Path, title: str) -> None:
    """Before anything is measured: files of these names that are not ours. Raises ConfigError."""
    rows = folder / eval_file(title)
    ownership.refuse_foreign(
        {
            rows: ownership.is_suite_file,
            folder / summary_file(title): lambda path: ownership.is_suite_file(rows),
        },
        "name another output_dir",
    )


def digest_of(parts: Mapping[str, Any]) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class SuiteResults:
    """The records of a folder. ``digests``: {metric: of what it is to be measured}; ``model``: the
    model's digest; ``rows``: {metric: {role: digest of its rows}}, for whoever reads this file as an
    oracle's; ``before_write`` is called before anything is written, and may raise. A summary that was
    left behind by a kill is made again. Raises DataError for a damaged file of ours, DiskError.
    """

    def __init__(
        self,
        folder: Path,
        title: str,
        digests: Mapping[str, str],
        model: str,
        rows: Mapping[str, Mapping[str, str]],
        before_write: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.title, self.digests = folder, title, digests
        self.before_write = before_write
        self.model, self.rows = model, rows
        self.records = self._read(folder)
        if self.records:
            self._repair_summary()

    def _read(self, folder: Path) -> dict[str, MetricRecord]:
        """The records of our file in a folder; none where there is no such file."""
        path = folder / eval_file(self.title)
        if not ownership.is_suite_file(path):
            return {}
        records: dict[str, MetricRecord] = documents.read_object(path)
        if not all(isinstance(record, dict) for record in records.values()):
            raise DataError(f"{path}: a metric is not an object; the file is damaged, move it away")
        return records

    def saved_record(self, name: str) -> MetricRecord | None:
        """A metric's record where it was measured of the very same things, else None."""
        record = self.records.get(name)
        return record if record is not None and record.get("digest") == self.digests[name] else None

    def saved_records(self) -> dict[str, MetricRecord]:
        """{metric: `saved_record`} of those that have one."""
        found = {name: self.saved_record(name) for name in self.digests}
        return {name: record for name, record in found.items() if record is not None}

    def add(self, name: str, record: MetricRecord) -> None:
        """Write a metric's record. Those of other things (another model, other rows) leave with the
        first that is added, so that one file never speaks of two models. Raises DiskError,
        NonFiniteError.
        """
        value = record["agg_value"]
        # JSON has no NaN, and a reader that takes one would compare it as a number
        if not math.isfinite(value):
            raise NonFiniteError(f"{name} is {value}; a metric of a suite has to be a number")
        head = {"digest": self.digests[name], "model": self.model, "rows": dict(self.rows[name])}
        # before the new one goes in: a file speaks of one model and of one set of rows
        self.records = {
            known: entry for known, entry in self.records.items() if self._agrees(entry)
        }
        self.records[name] = head | record
        self._write()

    def adopt(self, folder: Path) -> None:
        """Take over the records of the very same things that another folder has, and write them.
        Raises DataError for a damaged file there, DiskError.
        """
        theirs = self._read(folder)
        same = {
            n: record for n, record in theirs.items() if record.get("digest") == self.digests.get(n)
        }
        if same:
            ours = {known: record for known, record in self.records.items() if self._agrees(record)}
            # ours first: the folder may hold metrics that only `lorry eval` was asked for
            self.records = ours | same
            self._write()

    def _write(self) -> None:
        summary = {known: record["agg_value"] for known, record in self.records.items()}
        self.before_write()  # the latest moment: a metric may take minutes
        durable.make_directory(self.folder)
        durable.write_files(
            self.folder,
            {
                eval_file(self.title): _as_json(self.records),
                summary_file(self.title): _as_json(summary),
            },
        )

    def _repair_summary(self) -> None:
        """Make the summary say what the records say: a kill between the two renames of `add` leaves it
        a metric behind, and where that was the last one nothing would be added any more.
        """
        path = self.folder / summary_file(self.title)
        summary = _as_json(
            {known: record.get("agg_value") for known, record in self.records.items()}
        )
        if ownership.differs_from(path, summary) or not path.exists():
            self.before_write()
            durable.write_files(self.folder, {path.name: summary})

    def _agrees(self, record: MetricRecord) -> bool:
        """Whether a record is of this model, and of no other rows than this time's."""
        ours = {role: rows for known in self.rows.values() for role, rows in known.items()}
        theirs = record.get("rows")
        return (
            record.get("model") == self.model
            and isinstance(theirs, dict)
            and all(ours.get(role, rows) == rows for role, rows in theirs.items())
        )


class SharedResults:
    """`SuiteResults` of several processes: rank 0's folder, which it alone reads and writes, so
    that what is saved there is measured again by all of them or by none. ``open_store``: called on
    rank 0. Raises what that raises, on every rank at the next exchange.
    """

    def __init__(self, communicator: Communicator, open_store: Callable[[], SuiteResults]) -> None:
        self.communicator = communicator
        self.store = open_store() if communicator.rank == 0 else None
        self._share()

    def _share(self) -> None:
        mine = {} if self.store is None else self.store.saved_records()
        self.saved: dict[str, MetricRecord] = self.communicator.exchange("records", mine)[0]

    def saved_record(self, name: str) -> MetricRecord | None:
        """As `SuiteResults.saved_record` of rank 0."""
        return self.saved.get(name)

    def add(self, name: str, record: MetricRecord) -> None:
        """As `SuiteResults.add`, by rank 0."""
        if self.store is not None:
            self.store.add(name, record)

    def adopt(self, folder: Path) -> None:
        """As `SuiteResults.adopt`, by rank 0."""
        if self.store is not None:
            self.store.adopt(folder)
        self._share()


def _as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
