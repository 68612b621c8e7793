"""Readers of tables of columns: parquet, the folders of ``datasets``' save_to_disk, and whatever
gives Arrow tables.

Only the columns that are asked for are read, and values stay as they are stored: a picture or a
recording beside the text costs nothing and needs no decoder. A value that cannot be had (text that
is not UTF-8, a date after the year 9999) makes its row a bad one; a damaged file is one DataError,
whichever of its exceptions the library raises. What says nothing about the file is neither: a disk
that does not answer is DiskError, and too little memory stays MemoryError (`expect_damage`).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lorry.data.reading.bad_rows import BadRow
from lorry.data.reading.json_decoder import RowDecoder
from lorry.data.reading.rows import ColumnSelector, DataRow, RowFault, RowStream
from lorry.disk.documents import first_repeated, read_json_document
from lorry.disk.durable import DiskError
from lorry.errors import DataError

# rows as Python values: a few MB, whatever the file's own batches are
ROWS_AT_ONCE = 1024
# What pyarrow raises for damaged files: its own classes derive from these (ArrowInvalid is a
# ValueError, ArrowKeyError a KeyError ...), and values that Python has no room for raise
# OverflowError
DAMAGE_ERRORS = (
    ValueError,
    OSError,
    OverflowError,
    KeyError,
    IndexError,
    TypeError,
    NotImplementedError,
)
# errors of the system that a damaged file causes itself: it is absent, or names a place in it that
# no file has
FILE_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EOVERFLOW)
IMPOSSIBLE_ALLOCATION = 1 << 40  # bytes in one piece; only a damaged header asks for them


def read_parquet(path: Path, shown: str, select: ColumnSelector | None = None) -> RowStream:
    """Parquet, some rows at a time; the number after the colon counts rows from 1."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(path)
        schema = table.schema_arrow
    except (pyarrow.ArrowException, *DAMAGE_ERRORS) as error:
        expect_damage(error, path)
        raise DataError(
            f"{shown}:1: not a readable parquet file: {_first_error_line(error)}"
        ) from error
    with table:
        names = select_columns(schema, shown, select)
        batches = table.iter_batches(batch_size=ROWS_AT_ONCE, columns=names)
        while (
            # the place is that of the first row that could not be had
            batch := _next_batch(
                batches, path, f"{shown}:{number + 1}: not a readable parquet file"
            )
        ) is not None:
            yield from batch_rows(batch, names, shown, number)
            number += batch.num_rows


def read_saved(
    folder: Path, shown: str, split: str, select: ColumnSelector | None = None
) -> RowStream:
    """A folder written by ``datasets``' save_to_disk: state.json names Arrow streams; numbers count
    rows from 1 over all.
    """
    import pyarrow
    import pyarrow.ipc

    number, names = 0, None
    for path in _saved_files(folder, shown, split):
        broken = f"{shown}:{number + 1}: {path.name} is not a readable Arrow file"
        try:
            stream = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
            schema = stream.schema
        except FileNotFoundError as error:
            raise DataError(f"{shown}:{number + 1}: {path.name} is missing") from error
        except (pyarrow.ArrowException, *DAMAGE_ERRORS) as error:
            expect_damage(error, path)
            raise DataError(f"{broken}: {_first_error_line(error)}") from error
        if names is None:
            names = select_columns(schema, shown, select)
        if missing := [name for name in names if name not in schema.names]:
            raise DataError(
                f"{shown}:{number + 1}: {path.name} has no column {missing[0]!r}, unlike the files before it"
            )
        while (batch := _next_batch(stream, path, broken)) is not None:
            for at in range(0, batch.num_rows, ROWS_AT_ONCE):
                yield from batch_rows(batch.slice(at, ROWS_AT_ONCE), names, shown, number + at)
            number += batch.num_rows


def read_tables(
    tables: Iterable[Any], shown: str, select: ColumnSelector | None = None
) -> RowStream:
    """Arrow tables with the same columns, one after the other."""
    number, names = 0, None
    for table in tables:
        if names is None:
            names = select_columns(table.schema, shown, select)
        for batch in table.select(names).to_batches(max_chunksize=ROWS_AT_ONCE):
            yield from batch_rows(batch, names, shown, number)
            number += batch.num_rows


def select_columns(schema: Any, shown: str, select: ColumnSelector | None) -> list[str]:
    """The columns to read, all without ``select``. Raises DataError where two of them, or two
    fields in one, share a name.
    """
    try:
        names = list(schema.names)
        within = {name: _repeated_field(schema.field(at).type) for at, name in enumerate(names)}
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{shown}:1: a column's name is not UTF-8 text ({_first_error_line(error)}); write the file again"
        ) from error
    if twice := first_repeated(names):
        raise DataError(f"{shown}:1: two columns are called {twice!r}; rename one")
    selected = (list(select(names, f"{shown}:1")) if select is not None else []) or names
    for name in selected:
        if twice := within[name]:
            raise DataError(
                f"{shown}:1: two fields of the column {name!r} are called {twice!r}; rename one"
            )
    return selected


def batch_rows(
    batch: Any, names: list[str], shown: str, before: int
) -> Iterator[DataRow | RowFault]:
    """The rows of an Arrow batch, numbered from ``before`` + 1. Of a batch with a value that cannot
    be had, row by row.
    """
    import pyarrow

    try:
        batch = batch.select(names)  # what is not asked for is not looked at either
        batch.validate(full=True)
        columns = [_column_values(batch.column(name)) for name in names]
    except (pyarrow.ArrowException, RecursionError, *DAMAGE_ERRORS) as error:
        expect_damage(error, shown)
        # a fault in a batch of 1,024 is looked for row by row; one in a single row is that row's
        if batch.num_rows == 1:
            yield RowFault(
                f"{shown}:{before + 1}", BadRow("encoding", _unreadable_column(batch, names)), ""
            )
            return
        for at in range(batch.num_rows):
            yield from batch_rows(batch.slice(at, 1), names, shown, before + at)
        return
    held = zip(*columns, strict=True) if columns else [()] * batch.num_rows
    for number, values in enumerate(held, before + 1):
        yield DataRow(dict(zip(names, values, strict=True)), f"{shown}:{number}")


def _saved_files(folder: Path, shown: str, split: str) -> list[Path]:
    """The Arrow files of a saved data set, or of one split of several."""
    if (folder / "dataset_dict.json").exists():
        splits = _json_list(folder / "dataset_dict.json", "splits", shown)
        if split not in splits:
            raise DataError(f"{shown}: no split {split!r}; it has {', '.join(map(str, splits))}")
        folder = folder / split
    files = _json_list(folder / "state.json", "_data_files", shown)
    names = [file.get("filename") if isinstance(file, dict) else None for file in files]
    for name in names:
        # state.json is text from elsewhere: ../ would read a file that nobody named
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise DataError(
                f"{folder / 'state.json'}: _data_files: {name!r} is not the name of a file in its folder"
            )
    return [folder / name for name in names if isinstance(name, str)]


def _json_list(path: Path, key: str, shown: str) -> list[Any]:
    """The list under a key of a JSON file of a saved data set."""
    try:
        value = read_json_document(path)
    except OSError as error:
        expect_damage(error, path)
        raise DataError(
            f"{shown}: not a readable saved data set: {path.name}: {error.strerror or error}"
        ) from error
    entries = value.get(key) if isinstance(value, dict) else None
    if not isinstance(entries, list):
        raise DataError(
            f"{path}: not a saved data set: {key!r} is not a list; save the data set again"
        )
    return entries


def _next_batch(batches: Iterator[Any], path: Path, broken: str) -> Any:
    """The next batch, None behind the last one."""
    import pyarrow

    try:
        return next(batches, None)
    except (pyarrow.ArrowException, *DAMAGE_ERRORS) as error:
        expect_damage(error, path)
        raise DataError(f"{broken}: {_first_error_line(error)}") from error


def expect_damage(error: BaseException, path: Path | str) -> None:
    """Raise what says nothing about the file itself: DiskError for a disk that does not answer,
    MemoryError as it is.

    Arrow's own classes derive from OSError and MemoryError, so they are told apart by errno and by
    what was asked for.
    """
    if isinstance(error, MemoryError):
        # Arrow's message is all there is: "malloc of size 4611686018427387904 failed"
        sizes = [int(digits) for digits in re.findall(r"\d+", str(error))]
        if max(sizes, default=0) < IMPOSSIBLE_ALLOCATION:
            raise error
    elif isinstance(error, OSError) and error.errno == errno.ENOMEM:
        raise MemoryError(str(error)) from error
    elif isinstance(error, OSError) and error.errno is not None and error.errno not in FILE_ERRNOS:
        raise DiskError(error.errno, error.strerror or str(error), str(path)) from error


def _repeated_field(kind: Any) -> str | None:
    """A name that two fields of a struct share, at any depth: as Python dicts one of them would be
    lost.
    """
    import pyarrow.types

    fields = [kind.field(at) for at in range(kind.num_fields)]
    own = first_repeated(field.name for field in fields) if pyarrow.types.is_struct(kind) else None
    return (
        own
        if own is not None
        else next(filter(None, (_repeated_field(field.type) for field in fields)), None)
    )


def _column_values(column: Any) -> list[Any]:
    """A column as Python values. What ``datasets`` calls Json is stored as JSON text and read as
    what it says.
    """
    values = column.to_pylist()
    reader = _json_reader(column.type)
    return values if reader is None else [reader(value) for value in values]


def _json_reader(kind: Any) -> Callable[[Any], Any] | None:
    """How values of a type with Arrow's JSON type somewhere in it are read; None where there is
    none.
    """
    import pyarrow
    import pyarrow.types

    if isinstance(kind, pyarrow.JsonType):
        return _parse_json_text
    if pyarrow.types.is_struct(kind):
        inner = {
            field.name: reader for field in kind if (reader := _json_reader(field.type)) is not None
        }
        if not inner:
            return None
        return lambda value: (
            value
            and {name: inner[name](held) if name in inner else held for name, held in value.items()}
        )
    if (
        pyarrow.types.is_list(kind)
        or pyarrow.types.is_large_list(kind)
        or pyarrow.types.is_fixed_size_list(kind)
    ):
        reader = _json_reader(kind.value_type)
        return None if reader is None else lambda value: value and [reader(item) for item in value]
    return None


def _parse_json_text(text: str | None) -> Any:
    value = None if text is None else RowDecoder().only(text)
    if isinstance(value, BadRow):
        raise ValueError(value.reason)
    return value


def _unreadable_column(batch: Any, names: list[str]) -> str:
    """Which column of a batch of one row cannot be had, and why."""
    import pyarrow

    for name in names:
        try:
            column = batch.column(name)
            column.validate(full=True)
            _column_values(column)
        except (pyarrow.ArrowException, RecursionError, *DAMAGE_ERRORS) as error:
            expect_damage(error, name)
            return f"column {name!r} cannot be read: {_first_error_line(error)}"
    return "the row cannot be read"


def _first_error_line(error: BaseException) -> str:
    """The first line of what a library says."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{error.object[error.start]:02x} is not valid UTF-8"
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
