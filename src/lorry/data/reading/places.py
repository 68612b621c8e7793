"""Where the rows of a named set lie, and how they are read: a local file or folder where one is
given, else the hub.

places = DataLocations({"bool_q": "boolq.jsonl", "common_gen.validation": "dev.jsonl"})
bool_q = places.catalog.find_set("bool_q")
places.of(bool_q, "train")                          # two splits in the same location are the same rows
list(read_items(bool_q, places.open(bool_q, "train")))   # items with where they stand
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lorry.data.catalog import (
    Catalog,
    NamedSet,
    NamedSetItem,
    item_conversation,
    shipped_catalog,
)
from lorry.data.reading.bad_rows import OnBadRow
from lorry.data.reading.content import UnusableRowError
from lorry.data.reading.formats import DataExample
from lorry.data.reading.rows import ColumnSelector, RowStream, SourcePart
from lorry.data.reading.sources import SPLITS, DataSource, has_split_files, open_source
from lorry.errors import ConfigError, DataError

SPLIT_ORDER = tuple(SPLITS)  # train, validation, test


@dataclass(frozen=True)
class DataLocation:
    """Where a split's rows are. Equal spots are the same rows, whatever they are called."""

    path: str
    config: str | None
    split: str

    @classmethod
    def of(cls, path: str, config: str | None, split: str) -> DataLocation:
        """Of a file, a folder or a hub data set."""
        place = Path(path).expanduser()
        # what is no file is a name on the hub; whether there is one shows when it is read
        if not place.exists():
            return cls(path, config, split)
        return cls(
            str(place.resolve()), None, split if place.is_dir() and has_split_files(place) else ""
        )

    def overlaps(self, other: DataLocation) -> bool:
        """Whether some rows are in both: the same split, or one of them a slice (``train[90%:]``)
        of the other.
        """
        whole, its = self.split.partition("[")[0], other.split.partition("[")[0]
        same = self.split == other.split or (
            whole == its and (whole == self.split or its == other.split)
        )
        return same and (self.path, self.config) == (other.path, other.config)


@dataclass(frozen=True)
class DataLocations:
    """Local files of named sets: {NAME: path} for every split, {NAME.SPLIT: path} for one.
    ``field``: what people call it; ``catalog``: the sets there are.
    """

    local: Mapping[str, str]
    field: str = "data.local"
    catalog: Catalog = dataclasses.field(default_factory=shipped_catalog)

    def __post_init__(self) -> None:
        for key in self.local:
            name, _, split = key.partition(".")
            self.catalog.find_set(name)
            if split and split not in SPLIT_ORDER:
                raise ConfigError(
                    f"{self.field}.{key}: {split!r} is not a split; the splits are "
                    f"{', '.join(SPLIT_ORDER)}"
                )

    def of(self, named_set: NamedSet, split: str) -> DataLocation:
        """The spot of a split. Raises ConfigError where the set has no such split."""
        path = self._local(named_set, split)
        return (
            DataLocation(named_set.hub or "", named_set.config, named_set.split(split))
            if path is None
            else DataLocation.of(path, None, split)
        )

    def has(self, named_set: NamedSet, split: str) -> bool:
        """Whether the set has rows of a split, local or on the hub."""
        path = self._local(named_set, split)
        if path is None:
            return named_set.hub is not None and split in (named_set.splits or {})
        folder = Path(path).expanduser()
        # a file holds every split; a folder may hold some
        return not (folder.is_dir() and has_split_files(folder)) or _folder_has_split(folder, split)

    def to_ask(self, named_set: NamedSet) -> str:
        """The split an evaluation asks unless told otherwise: test or else validation, local files
        before the hub; training rows only where there are no others."""
        there = [split for split in ("test", "validation") if self.has(named_set, split)]
        # a file that was given is meant to be asked
        there.sort(key=lambda split: self._local(named_set, split) is None)
        return next(iter(there), "train" if self.has(named_set, "train") else "test")

    def for_shots(self, named_set: NamedSet, asked_split: str) -> str:
        """The split that worked examples come from: the set's own for them, or its training rows;
        those of ``asked_split`` where there are neither. Local training rows go before the hub."""
        order = (
            ("train", "shots")
            if self._local(named_set, "train") is not None
            else ("shots", "train")
        )
        return next((split for split in order if self.has(named_set, split)), asked_split)

    def open(self, named_set: NamedSet, split: str, *, limit: int | None = None, on_bad_row: OnBadRow = "error",
             quarantine: Path | None = None) -> DataSource:  # fmt: skip
        """The rows of a split, not read yet. Raises DataError, naming the set, where there are
        none.
        """
        path, location = self._local(named_set, split), self.of(named_set, split)
        within = location.split or "train"
        try:
            source = open_source(
                path or location.path,
                name=location.config,
                split=within,
                limit=limit,
                on_bad_row=on_bad_row,
                quarantine=quarantine,
                converted=None if path else named_set.converted,
            )
        except DataError as error:
            raise DataError(f"{named_set.name} ({self.field}.{named_set.name}): {error}") from error
        hint = "" if path else f"; {self.field}.{named_set.name}=FILE reads it from a file"
        return replace(
            source,
            parts=tuple(_name_set_in_errors(part, named_set.name, hint) for part in source.parts),
        )

    def _local(self, named_set: NamedSet, split: str) -> str | None:
        paths = {
            key.partition(".")[2]: path
            # in any spelling: local.BoolQ is the set bool_q
            for key, path in self.local.items()
            if self.catalog.find_set(key.partition(".")[0]).name == named_set.name
        }
        return paths.get(split, paths.get(""))


def _folder_has_split(folder: Path, split: str) -> bool:
    """Whether a folder that tells splits apart has files of this one; of a saved data set that is
    seen when it is read.
    """
    try:
        open_source(folder, split=split)
    except DataError:
        return False
    return True


def _name_set_in_errors(part: SourcePart, name: str, hint: str) -> SourcePart:
    """The same rows; an error of reading them names the set."""

    def rows(select: ColumnSelector | None) -> RowStream:
        try:
            yield from part(select)
        except DataError as error:
            raise DataError(f"{name}: {error}{hint}") from error

    return rows


@dataclass(frozen=True)
class NumberedItem:
    """An item of a row: its number among the readable rows, where it stands, its columns as read."""

    item: NamedSetItem
    number: int
    where: str
    example: DataExample


def read_items(
    named_set: NamedSet, source: DataSource, *, template: int | None = 0, seed: int = 0
) -> Iterator[NumberedItem]:
    """The items of a source's rows. ``template``: its number, or None for one drawn for each row.
    Bad rows: ``source.bad``.
    """
    for number, row in enumerate(source):
        chosen = named_set.template_of(seed, number) if template is None else template
        try:
            items = named_set.items(row.values, chosen)
        except UnusableRowError as error:
            raw = DataExample(None, number, row.where, row.values).raw  # type: ignore[arg-type]
            source.bad.report(f"{named_set.name} {row.where}", error.bad, raw)
            continue
        for item in items:
            yield NumberedItem(
                item,
                number,
                row.where,
                DataExample(
                    item_conversation(item), number, f"{named_set.name} {row.where}", row.values
                ),
            )


def refuse_leak(
    training: Iterable[DataLocation],
    places: DataLocations,
    named_set: NamedSet,
    asked_split: str,
    instead: str,
) -> None:
    """Raises ConfigError when rows to evaluate on are among those trained on. ``instead``: what
    would do, for the message.
    """
    location = places.of(named_set, asked_split)
    if any(location.overlaps(other) for other in training):
        raise ConfigError(
            f"{named_set.name}: the evaluation set is the training set "
            f"({location.path}); give "
            f"{places.field}.{named_set.name}.{asked_split}=FILE with other rows, "
            f"or {instead}"
        )
