"""Tables of columns in: parquet and saved data sets row for row, only what is used and as it is
stored, damage as DataError.
"""

from __future__ import annotations

import datetime
import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.data.reading import columnar
from lorry.data.reading.columnar import read_parquet, read_saved
from lorry.data.reading.formats import read_examples
from lorry.data.reading.rows import DataRow
from lorry.data.reading.sources import open_source
from lorry.disk.durable import DiskError
from lorry.errors import DataError

datasets.disable_progress_bars()
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
TURNS = st.lists(st.fixed_dictionaries({"role": TEXTS, "content": st.none() | TEXTS}), max_size=3)
TABLES = st.lists(
    st.fixed_dictionaries(
        {
            "text": st.none() | TEXTS,
            "a.b": st.integers(-(2**63), 2**63 - 1),
            "é x": st.none() | TURNS,
            "f": st.booleans(),
        }
    ),
    min_size=1,
    max_size=8,
)


def parquet(path: Path, table: Any, **options: Any) -> Path:
    pyarrow.parquet.write_table(table, path, **options)
    return path


def saved(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    datasets.Dataset.from_list(rows, **options).save_to_disk(str(path))
    return path


def values(path: Path) -> list[dict[str, Any]]:
    return [row.values for row in open_source(path)]


@settings(max_examples=25, deadline=None)
@given(
    rows=TABLES,
    groups=st.integers(1, 5),
    compression=st.sampled_from(["none", "snappy", "zstd"]),
    shards=st.integers(1, 2),
)
def test_written_by_others_and_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    groups: int,
    compression: str,
    shards: int,
) -> None:
    """pyarrow's and pandas' parquet, and datasets' save_to_disk in shards: row for row, numbered
    from 1.
    """
    folder = tmp_path_factory.mktemp("tables")
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    schema = pa.schema(
        [("text", pa.string()), ("a.b", pa.int64()), ("é x", turns), ("f", pa.bool_())]
    )
    table = pa.Table.from_pylist(rows, schema)
    path = parquet(folder / "d.parquet", table, row_group_size=groups, compression=compression)
    assert [(row.values, row.where) for row in open_source(path)] == [
        (row, f"{path}:{n}") for n, row in enumerate(rows, 1)
    ]
    table.to_pandas().to_parquet(folder / "p.parquet")
    assert values(folder / "p.parquet") == rows
    datasets.Dataset(table).save_to_disk(str(folder / "saved"), num_shards=min(shards, len(rows)))
    assert [(row.values, row.where) for row in open_source(folder / "saved")] == [
        (row, f"{folder / 'saved'}:{n}") for n, row in enumerate(rows, 1)
    ]


def test_a_saved_set_reads_as_datasets_reads_it(tmp_path: Path) -> None:
    """Every kind of feature but those that need a decoder; Json among them, which is stored as JSON
    text.
    """
    rows = [
        {
            "text": "a",
            "label": 1,
            "tags": ["x", "y"],
            "mixed": [{"b": 0}, {"c": "1"}],
            "n": None,
            "t": {"de": "ja", "en": "yes"},
        },
        {
            "text": "b",
            "label": 0,
            "tags": [],
            "mixed": [],
            "n": 1.5,
            "t": {"de": "nein", "en": "no"},
        },
    ]
    features = datasets.Features(
        text=datasets.Value("string"),
        label=datasets.ClassLabel(names=["no", "yes"]),
        n=datasets.Value("float32"),
        tags=datasets.Sequence(datasets.Value("large_string")),
        mixed=datasets.List(datasets.Json()),
        t={"de": datasets.Value("string"), "en": datasets.Value("string")},
    )
    path = saved(tmp_path / "set", rows, features=features)
    assert values(path) == list(datasets.load_from_disk(str(path))) == rows
    whole = datasets.Dataset.from_list([{"text": "one", "x": "1"}], features=datasets.Features(
        text=datasets.Json(), x=datasets.Value("string")))  # fmt: skip
    whole.save_to_disk(str(tmp_path / "json"))
    assert values(tmp_path / "json") == [{"text": whole[0]["text"], "x": "1"}]


BROKEN_TEXT = pa.StringArray.from_buffers(
    3, *(pa.array([b"fine", b"\xff\xfe", b"too"]).buffers()[1:])
)
# the second is the first moment of the year 10000
LATE = pa.array([0, 253402300800_000000, 1], pa.timestamp("us"))


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (BROKEN_TEXT, "UTF"),
        (LATE, "out of range"),
        (pa.array([0, 3_000_000, 1], pa.date32()), "out of range"),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_value_that_cannot_be_had_is_one_bad_row(
    tmp_path: Path, column: Any, reason: str, kind: str
) -> None:
    """badutf.parquet, ts.parquet: a traceback. The row alone is bad, and only where the column is
    read at all.
    """
    table = pa.table({"prompt": ["p", "q", "r"], "completion": ["1", "2", "3"], "odd": column})
    path = tmp_path / "d.parquet" if kind == "parquet" else tmp_path / "set"
    if kind == "parquet":
        parquet(path, table)
    else:
        write_saved(path, table)
    with pytest.raises(
        DataError, match=re.escape(f"{path}:2: column 'odd' cannot be read: ") + f".*{reason}"
    ):
        values(path)
    source = open_source(path, on_bad_row="skip")
    assert [row.where for row in source] == [f"{path}:1", f"{path}:3"]
    assert source.bad.total == 1
    assert [found.where for found in read_examples(open_source(path))] == [
        f"{path}:{n}" for n in (1, 2, 3)
    ]


def write_saved(folder: Path, table: Any, info: str = "{}") -> Path:
    """What save_to_disk writes, of a table that datasets itself would refuse."""
    folder.mkdir()
    with pyarrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None})
    )
    (folder / "dataset_info.json").write_text(info)
    return folder


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_names_that_stand_twice(tmp_path: Path, kind: str) -> None:
    """dupcol.parquet: one of two columns of a name was gone."""
    two = pa.table([pa.array(["a"]), pa.array(["b"])], names=["q", "q"])
    inner = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    nested = pa.table({"text": ["a"], "deep": pa.array([[{"y": 1}]])}).append_column(
        "s", pa.ListArray.from_arrays([0, 1], inner)
    )
    for name, table, message in (
        ("two", two, r":1: two columns are called 'q'"),
        ("nested", nested, r":1: two fields of the column 's' are called 'x'"),
    ):
        path = (
            parquet(tmp_path / f"{name}.parquet", table)
            if kind == "parquet"
            else write_saved(tmp_path / name, table)
        )
        with pytest.raises(DataError, match=re.escape(str(path)) + message):
            values(path)
    assert len(list(read_examples(open_source(path)))) == 1, (
        "a column that is not read harms nobody"
    )


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_what_is_not_used_is_neither_read_nor_decoded(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recording and a picture beside the text: nobody opens them, whatever they hold and whatever
    is installed.
    """
    for feature in (datasets.Audio, datasets.Image):
        monkeypatch.setattr(feature, "decode_example", lambda *_: pytest.fail("decoded"))
    junk = {"bytes": b"no sound and no picture" * 1000, "path": "gone.wav"}
    features = datasets.Features(
        question=datasets.Value("string"), audio=datasets.Audio(), answer=datasets.Value("string"),
        pictures=datasets.List(datasets.Image()), answers=datasets.List(datasets.Value("string")),
    )  # fmt: skip
    table = datasets.Dataset(
        pa.table(
            {
                "question": ["q"],
                "audio": [junk],
                "answer": ["a"],
                "pictures": [[junk]],
                "answers": [["a", "b"]],
            },
            schema=features.arrow_schema,
        ),
        info=datasets.DatasetInfo(features=features),
    )
    path = tmp_path / ("d.parquet" if kind == "parquet" else "set")
    if kind == "parquet":
        table.to_parquet(str(path))
    else:
        table.save_to_disk(str(path))
    notes: set[str] = set()
    found = list(read_examples(open_source(path), add_note=notes.add))
    assert [one.values for one in found] == [
        {"question": "q", "answer": "a", "answers": ["a", "b"]}
    ]
    assert notes == {f"{path}: read as question_answer; columns not used: audio, pictures"}
    assert values(path)[0]["audio"] == junk, "whoever asks for everything gets it as it is stored"


def test_a_column_that_is_used_and_is_no_text(tmp_path: Path) -> None:
    features = datasets.Features(text=datasets.Audio())
    table = pa.table({"text": [{"bytes": b"x", "path": None}]}, schema=features.arrow_schema)
    path = tmp_path / "set"
    datasets.Dataset(table, info=datasets.DatasetInfo(features=features)).save_to_disk(str(path))
    with pytest.raises(DataError, match=r"set:1: 'text' holds an object, expected text"):
        list(read_examples(open_source(path)))


NOT_STATES = [
    "{}",
    "[]",
    "",
    "null",
    "7",
    "{",
    "\0" * 20,
    "[" * 5000,
    '{"splits": {"train": 1}}',
    '{"_data_files": 7}',
    '{"_data_files": [7]}',
    '{"_data_files": [{}]}',
    '{"_data_files": [{"filename": "../x"}]}',
    '{"_data_files": [{"filename": "gone.arrow"}]}',
]


@pytest.mark.parametrize("content", NOT_STATES)
def test_state_files_that_say_nothing(tmp_path: Path, content: str) -> None:
    path = saved(tmp_path / "one", [{"text": "a"}])
    (path / "state.json").write_text(content)
    with pytest.raises(DataError, match=r"^\S+one(:1: gone\.arrow is missing|/state\.json)"):
        values(path)
    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "a"}])}).save_to_disk(
        str(tmp_path / "two")
    )
    (tmp_path / "two" / "dataset_dict.json").write_text(content)
    with pytest.raises(DataError, match=r"^\S+two/dataset_dict\.json"):
        values(tmp_path / "two")
    shutil.rmtree(tmp_path / "one")


def test_shards_that_do_not_fit_together(tmp_path: Path) -> None:
    path = saved(tmp_path / "one", [{"text": "a"}])
    other = write_saved(tmp_path / "other", pa.table({"body": ["b"]}))
    shutil.copy(other / "data-00000-of-00001.arrow", path / "second.arrow")
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(
        json.dumps({**state, "_data_files": [*state["_data_files"], {"filename": "second.arrow"}]})
    )
    with pytest.raises(
        DataError, match=r"one:2: second\.arrow has no column 'text', unlike the files before it"
    ):
        values(path)


def test_times_without_pandas_precision_and_other_types(tmp_path: Path) -> None:
    """Types that formats cannot use are values like others where everything is asked for."""
    when = datetime.datetime(2026, 1, 2, 3, 4, 5)
    table = pa.table(
        {
            "text": ["a"],
            "when": pa.array([when], pa.timestamp("ns")),
            "many": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int8())),
            "kind": pa.array(["x"]).dictionary_encode(),
            "big": pa.array([2**64 - 1], pa.uint64()),
            "raw": [b"\xff"],
        }
    )
    (row,) = values(parquet(tmp_path / "d.parquet", table))
    assert (pandas.Timestamp(row["when"]), row["many"], row["kind"], row["big"], row["raw"]) == (
        pandas.Timestamp(when), [("k", 1)], "x", 2**64 - 1, b"\xff",
    )  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A parquet file and the Arrow file of a saved set, some hundred rows each."""
    folder = tmp_path_factory.mktemp("sound")
    rows = [
        {"text": f"row {n} é", "n": n, "m": [{"role": "user", "content": "x" * (n % 7)}]}
        for n in range(300)
    ]
    parquet(folder / "d.parquet", pa.Table.from_pylist(rows), row_group_size=100)
    path = saved(folder / "set", rows)
    return {
        "parquet": (folder / "d.parquet").read_bytes(),
        "saved": (path / "data-00000-of-00001.arrow").read_bytes(),
    }


HOW = st.sampled_from(["flip", "cut", "end"])
DAMAGES = st.lists(
    st.tuples(st.floats(0, 1), HOW, st.binary(min_size=1, max_size=4)), min_size=1, max_size=3
)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(["parquet", "saved"]), damages=DAMAGES)
def test_damaged_tables_give_a_data_error_or_rows(
    tmp_path_factory: pytest.TempPathFactory,
    sound: dict[str, bytes],
    kind: str,
    damages: list[tuple[float, str, bytes]],
) -> None:
    raw = bytearray(sound[kind])
    for share, how, data in damages:
        at = int(share * len(raw))
        if how == "end":
            del raw[at:]
        else:
            raw[at : at + len(data)] = b"" if how == "cut" else data
    folder = tmp_path_factory.mktemp("damaged")
    if kind == "parquet":
        (folder / "d.parquet").write_bytes(raw)
        items = read_parquet(folder / "d.parquet", "d")
    else:
        (folder / "x.arrow").write_bytes(raw)
        (folder / "state.json").write_text('{"_data_files": [{"filename": "x.arrow"}]}')
        items = read_saved(folder, "d", "train")
    count = 0
    try:
        for item in items:
            count += isinstance(item, DataRow)
    except DataError as error:
        placed = re.match(r"d:\d+: ", str(error))
        assert placed is not None
    assert count <= 300


@pytest.mark.parametrize("kind", ["parquet", "saved"])
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_too_little_memory_makes_no_bad_row(
    tmp_path: Path, kind: str, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    path = (
        parquet(tmp_path / "d.parquet", pa.Table.from_pylist(rows))
        if kind == "parquet"
        else saved(tmp_path / "d", rows)
    )

    def full(column: Any) -> list[Any]:
        raise pa.ArrowMemoryError("malloc of size 4096 failed")

    monkeypatch.setattr(columnar, "_column_values", full)
    source = open_source(path, on_bad_row=policy)
    with pytest.raises(MemoryError):
        list(source.read())
    assert not source.bad.total


def test_a_length_that_no_memory_has_is_damage() -> None:
    columnar.expect_damage(pa.ArrowMemoryError(f"malloc of size {1 << 60} failed"), "d.parquet")
    with pytest.raises(MemoryError):
        columnar.expect_damage(OSError(errno.ENOMEM, "Cannot allocate memory"), "d.parquet")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("where", ["ParquetFile", "iter_batches", "open_stream"])
def test_a_disk_that_does_not_answer_is_no_damage(
    tmp_path: Path, number: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*_: Any, **__: Any) -> Any:
        raise OSError(number, "the disk does not answer")

    if where == "open_stream":
        path = saved(tmp_path / "d", [{"text": "a"}])
        monkeypatch.setattr(pyarrow.ipc, "open_stream", silent)
    else:
        path = parquet(tmp_path / "d.parquet", pa.table({"text": ["a"]}))
        batches = (silent() for _ in range(1))
        if where == "ParquetFile":
            monkeypatch.setattr(pyarrow.parquet, "ParquetFile", silent)
        else:
            monkeypatch.setattr(
                pyarrow.parquet.ParquetFile, "iter_batches", lambda *_, **__: batches
            )
    with pytest.raises(DiskError) as caught:
        values(path)
    assert (caught.value.errno, caught.value.exit_code) == (number, 74)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.txt"])
def test_a_text_file_that_the_disk_does_not_give_is_no_damage(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/proc/self/mem")  # reading its first byte is EIO
    with pytest.raises(DiskError):
        values(tmp_path / name)
