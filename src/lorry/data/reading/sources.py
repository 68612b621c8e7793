"""Sources: a path, several, a folder or a hub name become one stream of rows that knows where every
row came from.

source = open_source("people.jsonl", on_bad_row="skip")
for row in source: ...            # row.values, row.where == "people.jsonl:17"
"""

from __future__ import annotations

import itertools
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from lorry.data.reading.bad_rows import BadRows, OnBadRow
from lorry.data.reading.columnar import (
    DAMAGE_ERRORS,
    expect_damage,
    read_parquet,
    read_saved,
    read_tables,
)
from lorry.data.reading.json_rows import read_json_rows, read_jsonl
from lorry.data.reading.readers import READERS
from lorry.data.reading.rows import (
    ColumnSelector,
    DataRow,
    FileRemark,
    RowFault,
    RowStream,
    SourcePart,
    not_utf8,
)
from lorry.data.reading.suite_splits import is_split_name, locate_split, part_of_stream
from lorry.disk.durable import DiskError
from lorry.errors import DataError, suggest_nearest

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
ARROW_BATCH_ROWS = 1024  # rows of a hub data set taken at once
# what damaged compressed files raise
DECOMPRESSION_ERRORS = (
    EOFError,
    zlib.error,
    lzma.LZMAError,
    BadZipFile,
)
# How files begin that are not what their name says: each would be learnt as text, or give a bad row
# a line
PLACEHOLDER_FILES = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer in place of the file; fetch it with git lfs pull",
    b"\x1f\x8b": "compressed (gzip); decompress it first",
    b"PK\x03\x04": "compressed (zip); decompress it first",
    b"\x28\xb5\x2f\xfd": "compressed (zstd); decompress it first",
    b"\xfd7zXZ\0": "compressed (xz); decompress it first",
    b"BZh91AY&SY": "compressed (bzip2); decompress it first",
    b"PAR1": "parquet under another name; rename it to .parquet",
}
JSON_LINES = (".jsonl", ".ndjson")
# the storage kinds that are parsed only, never executed
HUB_BUILDERS = (
    "json",
    "csv",
    "parquet",
    "arrow",
    "text",
)


@dataclass(frozen=True)
class DataSource:
    """Rows in a fixed order, readable again and again. Every pass is lazy; bad rows go to ``bad``,
    what a person should know of whole files to ``remarks``."""

    label: str
    parts: tuple[SourcePart, ...]
    bad: BadRows
    limit: int | None = None
    streaming: bool = False
    remarks: set[str] = field(default_factory=set)
    files: tuple[
        Path, ...
    ] = ()  # all that the rows are read from; empty where that is not files alone (the hub)
    selection: str = ""  # what of these files is read: configuration and split, and how
    joined: bool = False  # whether the rows are texts that are read as one

    def __iter__(self) -> Iterator[DataRow]:
        return self.read()

    def read(self, start: int = 0, select: ColumnSelector | None = None) -> Iterator[DataRow]:
        """The readable rows from the ``start``-th on (those before it are parsed again, not kept).

        ``select`` chooses the columns that tables of columns read; rows of lines have all of
        theirs.
        """
        return itertools.islice(self._rows(select), start, self.limit)

    def _rows(self, select: ColumnSelector | None) -> Iterator[DataRow]:
        for part in self.parts:
            for item in part(select):
                if isinstance(item, RowFault):
                    self.bad.report(item.where, item.bad, item.raw)
                elif isinstance(item, FileRemark):
                    self.remarks.add(item.text)
                else:
                    yield item


def open_source(
    path_or_id: str | Path | Sequence[str | Path], *, name: str | None = None, split: str = "train", streaming: bool = False,
    on_bad_row: OnBadRow = "error", quarantine: str | Path | None = None, limit: int | None = None, converted: str | None = None,
    local: Mapping[str, str] | None = None,
) -> DataSource:  # fmt: skip
    """Open data files (json, jsonl, csv, tsv, parquet, txt), a folder of them, several of these, or
    a hub data set, or rows of a benchmark by name (``tofu:forget10``, suite_splits.py; ``local`` says
    where it lies).

    Every file is read lazily, a JSON array element by element. In a folder whose files are named
    after splits (train*, test*, validation*) those of ``split`` are taken; ``name`` is a hub data
    set's configuration, and ``streaming`` keeps a hub data set from being downloaded first (one
    that is stored as JSON comes file by file anyway); ``converted`` is the folder of its rows in
    the hub's own conversion to parquet, for one that is a loading script otherwise. ``limit``
    counts readable rows. Raises DataError for a path that does not exist, a kind of file not known,
    or (on_bad_row=error) the first bad row.
    """
    several = [path_or_id] if isinstance(path_or_id, str | Path) else list(path_or_id)
    if not several:
        raise DataError("no data given: a file, a folder or a hub name is needed")
    opened = [_open_one(entry, name, split, streaming, converted, local or {}) for entry in several]
    parts = tuple(part for parts, _ in opened for part in parts)
    files = (
        tuple(file for _, files in opened for file in files)
        if all(files for _, files in opened)
        else ()
    )
    label = ", ".join(map(str, several))
    corpora = [_is_joined(entry, local or {}) for entry in several]
    if any(corpora) and streaming:
        raise DataError(
            f"{label}: texts that are joined before they are cut cannot be streamed; leave streaming out"
        )
    source = DataSource(
        label,
        parts,
        BadRows(on_bad_row, quarantine),
        limit,
        streaming,
        files=files,
        selection=f"{name} {split}{' joined' if all(corpora) else ''}",
        joined=all(corpora),
    )
    if any(corpora) and not all(corpora):
        source.remarks.add(f"{label}: each text is a row, since not all sources are to be joined")
    return source


def _is_joined(path_or_id: str | Path, local: Mapping[str, str]) -> bool:
    """Whether a source is a corpus whose texts are read as one."""
    text = str(path_or_id)
    named = is_split_name(text) and not isinstance(path_or_id, Path) and not Path(text).exists()
    return named and locate_split(text, local).joined


def _open_one(
    path_or_id: str | Path,
    name: str | None,
    split: str,
    streaming: bool,
    converted: str | None,
    local: Mapping[str, str],
) -> tuple[list[SourcePart], list[Path]]:
    """The parts of one path or name, and the files that they read (none for a hub data set)."""
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            within = sorted(item for item in path.rglob("*") if item.is_file())
            return [lambda select: read_saved(path, str(path_or_id), split, select)], within
        files = _data_files(path, split)
        return [_file_part(file) for file in files], files
    if path.exists():
        return [_file_part(path)], [path]
    text = str(path_or_id)
    if is_split_name(text) and not isinstance(path_or_id, Path):
        return _open_suite_split(text, name, streaming, local)
    if (
        isinstance(path_or_id, Path)
        or path.suffix.lower() in READERS
        or not HUB_NAME.fullmatch(text)
    ):
        raise _missing_path_error(path)
    return [lambda select: _hub_rows(text, name, split, streaming, converted, select)], []


def _open_suite_split(
    text: str, name: str | None, streaming: bool, local: Mapping[str, str]
) -> tuple[list[SourcePart], list[Path]]:
    """The same of ``SUITE:SPLIT``."""
    if name is not None:
        raise DataError(f"{text} already chooses the rows; leave out data.name={name}")
    place = locate_split(text, local)
    if is_split_name(place.path):  # of local.SUITE=..., which would go round in a circle
        raise DataError(f"{text}: {place.path} is not a file or folder")
    parts, files = _open_one(place.path, place.config, place.split, streaming, None, {})
    if place.rows is None:
        return parts, files

    def rows(select: ColumnSelector | None) -> RowStream:
        whole = (item for part in parts for item in part(select))
        return part_of_stream(whole, place, text)

    return [rows], files


def _file_part(path: Path) -> SourcePart:
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(
            f"{path}: unknown kind of file {path.suffix!r}; Lorry reads {', '.join(sorted(READERS))}"
        )
    if not path.is_file():  # a FIFO would be waited at for ever
        raise DataError(f"{path}: not a regular file")

    def rows(select: ColumnSelector | None) -> RowStream:
        try:
            if what := _stands_for(path, read is read_parquet):
                raise DataError(f"{path}:1: {what}")
            yield from read(path, str(path), select)
        except DiskError:
            raise
        except OSError as error:
            expect_damage(error, path)
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error

    return rows


def _stands_for(path: Path, parquet: bool) -> str:
    """What a file is that is not the data its name promises; "" where it may be. Text may begin
    with PAR1 or BZh as well.
    """
    with path.open("rb") as file:
        block = file.read(4096)
        magic = next((begin for begin in PLACEHOLDER_FILES if block.startswith(begin)), b"")
        if magic == b"PAR1":
            file.seek(-4, os.SEEK_END)
            magic = b"" if parquet or len(block) < 12 or file.read(4) != magic else magic
    if (
        magic.startswith(b"BZh")
        and b"\0" not in block
        and not not_utf8(block.decode("utf-8", "surrogateescape"))
    ):
        return ""
    return PLACEHOLDER_FILES.get(magic, "")


def _missing_path_error(path: Path) -> DataError:
    """Names the path, and what stands in its folder under a similar name."""
    folder = path.parent
    if not folder.is_dir():
        return DataError(
            f"{path}: no such file, and no folder {folder} either (a hub data set is named owner/name)"
        )
    there = sorted(
        item.name for item in folder.iterdir() if item.suffix.lower() in READERS or item.is_dir()
    )
    listed = (
        f"; the folder has {', '.join(there[:8])}" if there else "; the folder has no data files"
    )
    return DataError(f"{path}: no such file{suggest_nearest(path.name, there) or listed}")


def _data_files(folder: Path, split: str) -> list[Path]:
    """The data files of a folder, sorted; only those of ``split`` where the names tell splits
    apart.
    """
    files = sorted(
        item for item in folder.iterdir() if item.is_file() and item.suffix.lower() in READERS
    )
    if not files:
        raise DataError(f"{folder}: the folder has no data files ({', '.join(sorted(READERS))})")
    named = {file: _split_of_stem(file.stem) for file in files}
    if not any(named.values()):
        return files
    wanted = next((key for key, words in SPLITS.items() if split in words), split)
    chosen = [file for file in files if named[file] == wanted]
    if not chosen:
        raise DataError(
            f"{folder}: no file of split {split!r}; the folder has {', '.join(file.name for file in files)}"
        )
    return chosen


def has_split_files(folder: Path) -> bool:
    """Whether a folder tells splits apart: a saved data set, or files named after splits."""
    if (folder / "dataset_dict.json").exists():
        return True
    return any(
        _split_of_stem(item.stem)
        for item in folder.iterdir()
        if item.is_file() and item.suffix.lower() in READERS
    )


def _split_of_stem(stem: str) -> str | None:
    words = re.split(r"[^a-z]+", stem.lower())
    return next(
        (split for split, names in SPLITS.items() if any(word in names for word in words)), None
    )


def _hub_rows(
    hub_id: str, name: str | None, split: str, streaming: bool, converted: str | None, select: ColumnSelector | None
) -> RowStream:  # fmt: skip
    """Rows of a hub data set. Only builders that parse plain data are allowed: no scripts, no
    pickles.
    """
    import datasets
    import pyarrow
    from datasets.exceptions import DatasetsError

    try:
        where = (
            {} if converted is None else {"revision": "refs/convert/parquet", "data_dir": converted}
        )
        builder = datasets.load_dataset_builder(
            hub_id, name if converted is None else None, **where
        )
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in HUB_BUILDERS:
            raise DataError(
                f"{hub_id}: stored as {kind!r}; Lorry reads hub data sets stored as {', '.join(HUB_BUILDERS)}"
            )
        if kind == "json":
            yield from _hub_json(builder, hub_id, split)
            return
        if streaming:
            table = builder.as_streaming_dataset(split=split)
        else:
            builder.download_and_prepare()
            table = builder.as_dataset(split=split)
        # as Arrow, not as Python: pictures and recordings stay what is stored, and nobody needs
        # their decoders
        yield from read_tables(
            table.with_format("arrow").iter(batch_size=ARROW_BATCH_ROWS), hub_id, select
        )
    except (DataError, DiskError, MemoryError):
        raise
    # RuntimeError: a loading script
    except (
        DatasetsError,
        pyarrow.ArrowException,
        *DECOMPRESSION_ERRORS,
        *DAMAGE_ERRORS,
        RuntimeError,
        AttributeError,
    ) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{hub_id}: neither a file here nor a data set that can be opened on the hub: {why}"
        ) from error


def _hub_json(builder: Any, hub_id: str, split: str) -> RowStream:
    """The rows of a hub data set that is stored as JSON, downloaded file by file and read as files
    here are.

    ``datasets``' own reader keeps the last of two equal keys, and fills keys that a row lacks with
    nulls.
    """
    from datasets import DownloadManager

    if (field := builder.config.field) not in (None, "data"):
        raise DataError(
            f"{hub_id}: its rows are under {field!r} in each file; download the "
            "files and write them as JSON lines"
        )
    files = builder.config.data_files or {}
    if "[" in split:
        raise DataError(
            f"{hub_id}: split={split}: a set stored as JSON cannot be sliced; give "
            "split and data.n instead"
        )
    if split not in files:
        raise DataError(
            f"{hub_id}: no split {split!r}; it has {', '.join(map(str, files)) or 'none'}"
        )
    manager = DownloadManager()
    folder = os.path.commonprefix(  # noqa: RUF071
        [str(address).rpartition("/")[0] + "/" for address in files[split]]
    )
    folder = folder[: folder.rfind("/") + 1]
    for address in files[split]:
        name = str(address)[len(folder) :]  # en/train.jsonl and fr/train.jsonl are two files
        local = manager.download_and_extract(str(address))
        lines = any(f".{word}" in JSON_LINES for word in name.lower().split(".")[1:])
        for path in map(Path, manager.iter_files([local])):
            inner = lines or path.suffix.lower() in JSON_LINES
            member = f"/{path.relative_to(local)}" if Path(local).is_dir() else ""
            yield from (read_jsonl if inner else read_json_rows)(path, f"{hub_id}/{name}{member}")
