"""Files in: every row with its place, every broken one with a reason, and never anything but a
DataError.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.data.reading.formats import read_examples
from lorry.data.reading.sources import open_source
from lorry.errors import ConfigError, DataError

CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=8)
GOOD = b'{"text": "one"}\n'
BAD_LINES = [
    (b'{"text": "cut of', "column 10: not valid JSON"),
    (b'{"text": "cut off"', "the line is cut off"),
    (b'{"text": }', "column 10: not valid JSON: Expecting value"),
    (b'{"text": "caf\xe9"}', "column 14: byte 0xe9 is not valid UTF-8"),
    (b"\x00\x00\x00\x00", "column 1: a NUL byte; the file was probably cut off"),
    (b'["not", "an object"]', "expected an object such as {...}, found an array"),
    (b'"text"', "found a string"),
    (b"17", "found a number"),
    (b"null", "found null"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"text": ' + b"9" * 5000 + b"}", "not usable JSON"),
    (b"hello", "column 1: not valid JSON"),
]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(path: Any, **options: Any) -> list[tuple[dict[str, Any], str]]:
    return [(row.values, Path(row.where).name) for row in open_source(path, **options)]


def test_jsonl_with_mark_blank_lines_and_windows_ends(tmp_path: Path) -> None:
    path = write(tmp_path, "people.jsonl", b'\xef\xbb\xbf{"a": "x"}\r\n\r\n{"a": "\xc3\xa9"}')
    assert rows(path) == [({"a": "x"}, "people.jsonl:1"), ({"a": "é"}, "people.jsonl:3")]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path, "d.jsonl", GOOD + line + b"\n" + GOOD)
    with pytest.raises(DataError) as caught:
        rows(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert reason in str(caught.value)
    source = open_source(path, on_bad_row="skip")
    assert [row.where for row in source] == [f"{path}:1", f"{path}:3"]
    assert source.bad.total == 1
    assert list(source)
    assert source.bad.total == 1, "a second pass must not count the same row again"


def test_quarantine_keeps_the_raw_row_once(tmp_path: Path) -> None:
    path = write(tmp_path, "d.jsonl", GOOD + b"oops\xff\n" + GOOD + b"[1]\n")
    aside = tmp_path / "aside" / "quarantine.jsonl"
    for _ in range(2):  # a second run over the same data adds nothing
        source = open_source(path, on_bad_row="quarantine", quarantine=aside)
        assert len(list(source)) == 2
        assert dict(source.bad.counts) == {"encoding": 1, "not an object": 1}
    kept = [json.loads(line) for line in aside.read_text().splitlines()]
    assert [entry["raw"] for entry in kept] == ["oops\\xff", "[1]"]
    assert kept[1]["where"] == f"{path}:4"
    assert "expected an object" in kept[1]["reason"]


def test_quarantine_after_a_torn_line(tmp_path: Path) -> None:
    path, aside = (
        write(tmp_path, "d.jsonl", b"oops\n"),
        write(tmp_path, "q.jsonl", '{"where": "torn'),
    )
    list(open_source(path, on_bad_row="quarantine", quarantine=aside))
    torn, whole = aside.read_text().splitlines()
    assert torn == '{"where": "torn'
    assert json.loads(whole)["raw"] == "oops"


def test_a_value_of_megabytes_does_not_flood_the_terminal(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "d.jsonl",
        json.dumps({"x" * 1_000_000: 1})[:-1] + ', "' + "x" * 1_000_000 + '": 2}',
    )
    with pytest.raises(
        DataError, match=r"d\.jsonl:1: the key 'x+\.\.\. \(\d+ characters\)"
    ) as caught:
        rows(path)
    assert len(str(caught.value)) < 3000
    source = open_source(path, on_bad_row="skip")
    assert not list(source)
    assert len(source.bad.summary()) < 3000


def test_policy_is_checked(tmp_path: Path) -> None:
    path = write(tmp_path, "d.jsonl", GOOD)
    with pytest.raises(ConfigError, match="did you mean 'skip'"):
        open_source(path, on_bad_row="skipp")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs a file"):
        open_source(path, on_bad_row="quarantine")


@settings(max_examples=150, deadline=None)
@given(
    damage=st.lists(
        st.tuples(
            st.integers(0, 400), st.sampled_from(["flip", "cut", "insert"]), st.integers(0, 255)
        ),
        max_size=6,
    )
)
def test_damaged_bytes_give_a_data_error_or_rows(
    tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[int, str, int]]
) -> None:
    """Whatever is done to the bytes, a reader raises nothing but DataError with file:line; lines
    left alone are still read.
    """
    lines = [
        json.dumps({"text": f"row {at} é", "n": at}, ensure_ascii=False).encode() + b"\n"
        for at in range(12)
    ]
    raw = bytearray(b"".join(lines))
    for position, kind, byte in damage:
        at = position % max(1, len(raw))
        if kind == "flip":
            raw[at : at + 1] = bytes([byte])
        elif kind == "cut":
            del raw[at : at + 1 + byte % 40]
        else:
            raw[at:at] = bytes([byte])
    path, undamaged = write(tmp_path_factory.mktemp("damaged"), "d.jsonl", bytes(raw)), False
    with contextlib.suppress(DataError):
        list(open_source(path))
        undamaged = True
    if not undamaged:
        with pytest.raises(DataError, match=re.escape(f"{path}:") + r"\d+: "):
            list(open_source(path))
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return
    got = {
        json.dumps(row.values, ensure_ascii=False).encode()
        for row in open_source(path, on_bad_row="skip")
    }
    untouched = {line.rstrip() for line in bytes(raw).split(b"\n")} & {
        line.rstrip() for line in lines
    }
    assert untouched <= got


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = write(tmp_path, "d.jsonl", GOOD * 3 + b"broken\n")
    stream = iter(open_source(path))
    assert [next(stream).where for _ in range(3)] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert len(list(open_source(path, limit=3))) == 3
    assert [row.where for row in open_source(path, limit=3).read(2)] == [f"{path}:3"]


@pytest.mark.parametrize(
    "text",
    [
        '[\n {"a": 1},\n {"a": 2}\n]',
        '{"version": [1, {"x": "]"}], "data": [\n {"a": 1},\n {"a": 2}\n]}',
        '\ufeff[\n{"a": 1}\n,{"a": 2}]\n',
    ],
)
def test_json_arrays(tmp_path: Path, text: str) -> None:
    expected = [({"a": 1}, "d.json:2: element 0"), ({"a": 2}, "d.json:3: element 1")]
    assert rows(write(tmp_path, "d.json", text)) == expected


def test_json_lines_under_the_wrong_name(tmp_path: Path) -> None:
    assert rows(write(tmp_path, "d.json", '{"a": 1}\n{"a": 2}\n')) == [
        ({"a": 1}, "d.json:1"),
        ({"a": 2}, "d.json:2"),
    ]
    with pytest.raises(DataError, match=r"d\.json:1: column 6: not valid JSON"):
        rows(write(tmp_path, "d.json", '{"a": \n{"a": 2}\n'))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[\n{"a": 1},\n{"a": }]',
            r"d\.json:3: column 7: element 1 is not valid JSON: Expecting value",
        ),
        ('[\n{"a": 1},\n{"a": 2', r"d\.json:3: column \d+: element 1 is not valid JSON"),
        ('[\n{"a": 1}', r"d\.json:2: column 9: the file ends in the middle of the array"),
        ('[{"a": 1}\n {"a": 2}]', r"d\.json:2: column 2: expected ',' or '\]' after element 0"),
        (
            '[{"a": 1},\n 7]',
            r"d\.json:2: element 1: expected an object such as \{\.\.\.\}, found a number",
        ),
        ('{"a":\n 1}', r"d\.json:2: column 3: expected a JSON array of rows"),
        ("", r"d\.json:1: expected a JSON array"),
        ("hello", r"d\.json:1: expected a JSON array"),
        ('[{"a": ' + "[" * 100_000, r"d\.json:1: .*nested too deeply"),
        (b'[{"a": "\xff"}]', r"d\.json:1: element 0: byte 0xff is not valid UTF-8"),
    ],
)
def test_broken_json_arrays(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows(write(tmp_path, "d.json", text))


def test_csv_records_may_span_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "d.csv", '\ufeffquestion,answer\n"two\nlines",a\n"x ""y"", z",b\n')
    assert rows(path) == [
        ({"question": "two\nlines", "answer": "a"}, "d.csv:2"),
        ({"question": 'x "y", z', "answer": "b"}, "d.csv:4"),
    ]


@pytest.mark.parametrize(("name", "mark"), [("d.csv", ";"), ("d.tsv", "\t"), ("d.csv", "\t")])
def test_csv_separators(tmp_path: Path, name: str, mark: str) -> None:
    assert rows(write(tmp_path, name, f"a{mark}b\n1,5{mark}2\n")) == [
        ({"a": "1,5", "b": "2"}, f"{name}:2")
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3\n", r"d\.csv:3: the row has 1 columns, the header 2"),
        ("a,b\n1,2,3\n", r"d\.csv:2: the row has 3 columns"),
        ('a,b\n1,"2\n3,4\n', r"d\.csv:2: unexpected end of data"),
        ("a,a\n1,2\n", r"d\.csv:1: the header needs a different name for every column"),
        ("a,\n1,2\n", r"d\.csv:1: the header needs"),
        (",,\n1,2,3\n", r"d\.csv:1: the header needs"),
        (
            '"question,answer\nx,y',
            r"d\.csv:1: unexpected end of data \(a quote that is opened must be closed\)",
        ),
        ('"a"b,c\nx,y', r"d\.csv:1: ',' expected after '\"'"),
        ("", r"d\.csv:1: the file is empty"),
        (b"a,b\n1,caf\xe9\n", r"d\.csv:2: column 'b' is not valid UTF-8"),
        (b"a,b\n1,x\x00\n", r"d\.csv:2: column 'b': a NUL byte"),
        (b"\xff\xfea\x00,\x00", r"d\.csv:1: the file is UTF-16"),
    ],
)
def test_broken_csv(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows(write(tmp_path, "d.csv", text))


@settings(max_examples=60, deadline=None)
@given(table=st.lists(st.fixed_dictionaries({"question": CELLS, "answer": CELLS, "é": CELLS}), min_size=1, max_size=6),
       ends=st.sampled_from(["\n", "\r\n"]), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
       mark=st.booleans())  # fmt: skip
def test_csv_as_the_csv_module_writes_it(
    tmp_path_factory: pytest.TempPathFactory,
    table: list[dict[str, str]],
    ends: str,
    quoting: Any,
    mark: bool,
) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["question", "answer", "é"], lineterminator=ends, quoting=quoting)
    writer.writeheader()
    writer.writerows(table)
    path = write(
        tmp_path_factory.mktemp("csv"), "d.csv", ("\ufeff" if mark else "") + text.getvalue()
    )
    got = list(open_source(path))
    assert [row.values for row in got] == table
    assert len({row.where for row in got}) == len(table)


@pytest.mark.parametrize("again", [False, True])
def test_csv_as_pandas_writes_it(tmp_path: Path, again: bool) -> None:
    """The index is a column without a name; it is called what pandas calls it, and said to be
    unused. Turns are JSON text.
    """
    turns = [
        [{"role": "user", "content": f"q, {n}"}, {"role": "assistant", "content": f'a "{n}"'}]
        for n in range(3)
    ]
    table = pandas.DataFrame({"messages": [json.dumps(turn) for turn in turns]}, index=[7, 8, 9])
    path = tmp_path / "d.csv"
    table.to_csv(path)
    if again:
        pandas.read_csv(path).to_csv(path)
    notes: set[str] = set()
    found = list(read_examples(open_source(path), add_note=notes.add))
    assert [[m.content for m in one.content.messages] for one in found] == [
        [f"q, {n}", f'a "{n}"'] for n in range(3)
    ]  # type: ignore[union-attr]
    assert list(found[0].values) == list(pandas.read_csv(path).columns)
    unused = "Unnamed: 0.1, Unnamed: 0" if again else "Unnamed: 0"
    assert notes == {f"{path}: read as messages; columns not used: {unused}"}
    pandas.DataFrame({"a": [1]}, index=pandas.MultiIndex.from_tuples([(1, 2)])).to_csv(path)
    assert rows(path) == [({"Unnamed: 0": "1", "Unnamed: 1": "2", "a": "1"}, "d.csv:2")]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "d.jsonl")
    with pytest.raises(DataError, match=r"d\.jsonl: not a regular file"):
        open_source(tmp_path / "d.jsonl")


def test_csv_skips_only_the_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path, "d.csv", b"a,b\n1,2\nlone\n3,caf\xe9\n5,6\n")
    source = open_source(path, on_bad_row="skip")
    assert [row.where for row in source] == [f"{path}:2", f"{path}:5"]
    assert dict(source.bad.counts) == {"columns": 1, "encoding": 1}


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(
        pa.table({"messages": [[{"role": "user", "content": "x"}], None]}), path
    )
    assert rows(path) == [
        ({"messages": [{"role": "user", "content": "x"}]}, "d.parquet:1"),
        ({"messages": None}, "d.parquet:2"),
    ]
    with pytest.raises(DataError, match="not a readable parquet file"):
        rows(write(tmp_path, "e.parquet", b"PAR1 and nothing more"))


def test_text_is_one_document(tmp_path: Path) -> None:
    assert rows(write(tmp_path, "book.txt", "one\n\ntwo\n")) == [
        ({"text": "one\n\ntwo\n"}, "book.txt:1")
    ]
    with pytest.raises(DataError, match=r"book\.txt:1: column 4: byte 0xff"):
        rows(write(tmp_path, "book.txt", b"one\xff"))


def test_folders_and_several_files(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", GOOD)
    write(tmp_path, "a.jsonl", GOOD)
    write(tmp_path, "SOURCE.md", "not data")
    assert [where for _, where in rows(tmp_path)] == ["a.jsonl:1", "b.jsonl:1"]
    assert [where for _, where in rows([tmp_path / "b.jsonl", str(tmp_path / "a.jsonl")])] == [
        "b.jsonl:1",
        "a.jsonl:1",
    ]


def test_a_folder_of_splits_never_mixes_them(tmp_path: Path) -> None:
    for name in ("train_2000.jsonl", "test.jsonl", "set-dev.jsonl", "contest.jsonl"):
        write(tmp_path, name, GOOD)
    assert [where for _, where in rows(tmp_path)] == ["train_2000.jsonl:1"]
    assert [where for _, where in rows(tmp_path, split="validation")] == ["set-dev.jsonl:1"]
    (tmp_path / "train_2000.jsonl").unlink()
    with pytest.raises(DataError, match="no file of split 'train'"):
        rows(tmp_path)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "people.jsonl", GOOD)
    with pytest.raises(
        DataError, match=r"peopel\.jsonl: no such file .did you mean 'people\.jsonl'"
    ):
        open_source(tmp_path / "peopel.jsonl")
    with pytest.raises(DataError, match=r"no such file; the folder has people\.jsonl"):
        open_source(tmp_path / "x.csv")
    with pytest.raises(DataError, match="no folder"):
        open_source(tmp_path / "nowhere" / "x.csv")
    with pytest.raises(DataError, match="a hub data set is named owner/name"):
        open_source("/no-such-folder/data")


@pytest.mark.parametrize("name", ["d.pkl", "d.pt", "d.docx", "d"])
def test_unknown_kinds_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="unknown kind of file"):
        open_source(write(tmp_path, name, b"\x80\x04."))


@pytest.fixture
def on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bytes], str]:
    """Stands in for the hub: owner/name resolves to a local folder, through the real builders of
    ``datasets``.
    """
    import datasets

    real = datasets.load_dataset_builder

    def local(name: str, config: str | None = None) -> Any:
        return real(str(tmp_path / name), config, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", local)

    def publish(file: str, content: bytes) -> str:
        (tmp_path / "owner" / "set" / file).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "owner" / "set", file, content)
        return "owner/set"

    return publish


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_sets(on_the_hub: Callable[[str, bytes], str], streaming: bool) -> None:
    name = on_the_hub(
        "train.jsonl", b'{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n'
    )
    got = [(row.values, row.where) for row in open_source(name, streaming=streaming)]
    assert got == [
        ({"question": "a", "answer": "b"}, "owner/set/train.jsonl:1"),
        ({"question": "c", "answer": "d"}, "owner/set/train.jsonl:2"),
    ]
    with pytest.raises(DataError, match="owner/set: "):
        list(open_source(name, split="nosuchsplit", streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_with_pictures_is_read_without_them(
    on_the_hub: Callable[[str, bytes], str], streaming: bool, tmp_path: Path
) -> None:
    """Nobody decodes what no format reads, downloaded or streamed: these bytes are no picture and
    no sound.
    """
    import datasets

    features = datasets.Features(
        text=datasets.Value("string"), picture=datasets.Image(), sound=datasets.Audio()
    )
    junk = [{"bytes": b"junk", "path": None}] * 3
    schema = features.arrow_schema
    pyarrow.parquet.write_table(
        pa.table({"text": ["a", "b", "c"], "picture": junk, "sound": junk}, schema),
        tmp_path / "x.parquet",
    )
    name = on_the_hub("train.parquet", (tmp_path / "x.parquet").read_bytes())
    notes: set[str] = set()
    found = list(read_examples(open_source(name, streaming=streaming), add_note=notes.add))
    assert [(one.values, one.where) for one in found] == [
        ({"text": t}, f"owner/set:{n}") for n, t in enumerate("abc", 1)
    ]
    assert notes == {"owner/set: read as text; columns not used: picture, sound"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("train.json", b'[{"text": "a"}] rubbish'),
        ("train.jsonl", b'{"text": "a", "text": "b"}\n'),
        ("train.jsonl", b'{"text": "a"}\n{"text": "a", "meta": {"k": 1, "k": 2}}\n'),
        ("train.json", b'[{"text": "a"}, {"text": "a", "text": "b"}]'),
        ("train.json", b'{"data": [{"text": "a"}], "data": [{"text": "b"}]}'),
        ("train.jsonl", b'{"text": "a"}\n{"text'),
        ("train.csv", b'"text,other\na,b\n'),
        ("train.parquet", b"PAR1 and nothing more"),
    ],
)
def test_damaged_hub_data_sets(
    on_the_hub: Callable[[str, bytes], str], streaming: bool, file: str, content: bytes
) -> None:
    name = on_the_hub(file, content)
    with pytest.raises(DataError, match=f"owner/set(: |/{file}:)"):
        list(open_source(name, streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_json_of_a_hub_data_set_is_read_as_files_here_are(
    on_the_hub: Callable[[str, bytes], str], streaming: bool, tmp_path: Path
) -> None:
    """Of two equal keys none wins, joined arrays are all read, packed files are unpacked, splits of
    a README's YAML hold.
    """
    name = on_the_hub("a.json", b'[{"text": "a"}]\n[{"text": "b"}]')
    on_the_hub("b.jsonl.gz", gzip.compress(b'{"text": "c", "text": "C"}\n{"text": "d"}\n'))
    on_the_hub("c.jsonl", b'{"text": "other"}\n')
    files = "[{split: train, path: [a.json, b.jsonl.gz]}, {split: test, path: c.jsonl}]"
    front = f"configs: [{{config_name: default, data_files: {files}}}]"
    on_the_hub("README.md", f"---\n{front}\n---\n".encode())
    source = open_source(name, streaming=streaming, on_bad_row="skip")
    assert [(row.values["text"], row.where) for row in source] == [
        ("a", "owner/set/a.json:1: element 0"),
        ("b", "owner/set/a.json:2: element 1"),
        ("d", "owner/set/b.jsonl.gz:2"),
    ]
    assert source.bad.counts == {"key twice": 1}
    assert [row.values for row in open_source(name, split="test", streaming=streaming)] == [
        {"text": "other"}
    ]


def test_hub_data_sets_that_are_not_plain_tables_are_refused(
    on_the_hub: Callable[[str, bytes], str],
) -> None:
    name = on_the_hub("train.xml", b"<a/>")
    with pytest.raises(DataError, match="stored as 'xml'"):
        list(open_source(name))


def test_a_saved_data_set(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}]).save_to_disk(str(tmp_path / "one"))
    assert rows(tmp_path / "one") == [({"text": "a"}, "one:1"), ({"text": "b"}, "one:2")]
    both = datasets.DatasetDict({"test": datasets.Dataset.from_list([{"text": "t"}])})
    both.save_to_disk(str(tmp_path / "two"))
    assert rows(tmp_path / "two", split="test") == [({"text": "t"}, "two:1")]
    with pytest.raises(DataError, match="no split 'train'; it has test"):
        rows(tmp_path / "two")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'"a,b,c,d";e\nx;y\n', [({"a,b,c,d": "x", "e": "y"}, "t.csv:2")]),
        (b'"a\n,,,";e\nx;y\n', [({"a\n,,,": "x", "e": "y"}, "t.csv:3")]),
        (b'e;"say ""a,b,c"", d"\nx;y\n', [({"e": "x", 'say "a,b,c", d': "y"}, "t.csv:2")]),
        (b"sep=;\r\na;b,c,d\r\nx;y\r\n", [({"a": "x", "b,c,d": "y"}, "t.csv:3")]),
        (b"\xef\xbb\xbfsep=|\na|b\nx,1|y\n", [({"a": "x,1", "b": "y"}, "t.csv:3")]),
        (b"SEP=\t\na\tb\nx\ty\n", [({"a": "x", "b": "y"}, "t.csv:3")]),
    ],
)
def test_separators_are_those_outside_quotes_or_what_excel_says(
    tmp_path: Path, content: bytes, expected: Any
) -> None:
    if b"a\n,,," in content:
        # a line break in a name is refused, whatever separates
        with pytest.raises(DataError, match="header is not valid"):
            rows(write(tmp_path, "t.csv", content))
        return
    assert rows(write(tmp_path, "t.csv", content)) == expected


@pytest.mark.parametrize("second", [b"a,b\n", b"\xef\xbb\xbfa,b\n", b"\xef\xbb\xbfx,y\n"])
def test_joined_csv_files_do_not_teach_their_headers(tmp_path: Path, second: bytes) -> None:
    path = write(tmp_path, "t.csv", b"\xef\xbb\xbfa,b\n1,2\n" + second + b"3,4\n")
    with pytest.raises(DataError, match=r"t\.csv:3: .*the header or a byte order mark is repeated"):
        rows(path)
    assert [row for row, _ in rows(path, on_bad_row="skip")] == [
        {"a": "1", "b": "2"},
        {"a": "3", "b": "4"},
    ]


def test_byte_order_marks_of_joined_files_are_no_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    lines = mark + b'{"a": "x"}\n' + mark + b'{"a": "\xef\xbb\xbfy"}\n' + mark + b"\n"
    assert [row for row, _ in rows(write(tmp_path, "t.jsonl", lines))] == [
        {"a": "x"},
        {"a": "\ufeffy"},
    ]
    arrays = mark + b'[{"a": 1}]\n' + mark + b'[{"a": 2}]' + mark
    assert [row for row, _ in rows(write(tmp_path, "t.json", arrays))] == [{"a": 1}, {"a": 2}]
    with pytest.raises(DataError, match="expected ',' or ']'"):
        rows(write(tmp_path, "u.json", b'[{"a": 1}' + mark + b"]"))


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.jsonl", json.dumps({"text": "a", "n": [1]}, indent=1), "object over several lines"),
        ("t.jsonl", '\n{"text": "a",\n"n": 1}', "object over several lines"),
        ("t.jsonl", json.dumps([{"text": "a"}], indent=1), "a JSON array; name the file .json"),
        ("t.jsonl", '[{"text": "a"},\n{"text": "b"}]', "a JSON array; name the file .json"),
        ("t.json", json.dumps({"text": "a"}, indent=1), r"needs \[ \] around it"),
        ("t.json", json.dumps({"text": "a"}, indent=1) * 2, r"needs \[ \] around it"),
    ],
)
def test_another_layout_is_said_once_and_never_skipped(
    tmp_path: Path, on_bad_row: Any, name: str, content: str, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        rows(write(tmp_path, name, content), on_bad_row=on_bad_row)


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.txt", "t.parquet"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n", "a Git LFS pointer"),
        (gzip.compress(GOOD, mtime=0), r"compressed \(gzip\)"), (b"PK\x03\x04" + GOOD, r"compressed \(zip\)"),
    ],
    ids=["pointer", "gzip", "zip"],
)  # fmt: skip
def test_files_that_only_stand_for_the_data_are_not_learnt(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    with pytest.raises(DataError, match=rf"{re.escape(name)}:1: {reason}"):
        rows(write(tmp_path, name, content), on_bad_row="skip")


def test_a_line_with_something_behind_its_object_is_a_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path, "t.jsonl", b'{"text": "a"},\n' + GOOD)
    assert [row for row, _ in rows(path, on_bad_row="skip")] == [{"text": "one"}]


def test_blank_lines_before_a_header(tmp_path: Path) -> None:
    assert rows(write(tmp_path, "t.csv", b"\n\na,b\n1,2\n")) == [({"a": "1", "b": "2"}, "t.csv:4")]


def test_files_of_one_name_in_several_folders_of_a_hub_data_set_are_several(
    on_the_hub: Callable[[str, bytes], str],
) -> None:
    name = on_the_hub("en/train.jsonl", b'{"text": "a"}\n')
    on_the_hub("fr/train.jsonl", b'{"text": "b"}\n')
    assert {row.where for row in open_source(name)} == {
        "owner/set/en/train.jsonl:1",
        "owner/set/fr/train.jsonl:1",
    }
    with pytest.raises(DataError, match="a set stored as JSON cannot be sliced"):
        list(open_source(name, split="train[:50%]"))


@pytest.mark.parametrize("first", ['{"text": "cut off,', "{", "[1,"])
def test_one_damaged_first_line_is_one_bad_row(tmp_path: Path, first: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(first + "\n" + '{"text": "sound"}\n' * 50)
    source = open_source(path, on_bad_row="skip")
    assert len(list(source)) == 50
    assert source.bad.total == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "PAR1,PAR2,text\n1,2,three\n"),
        ("a.txt", "PAR1 is a gene."),
        ("b.txt", "BZh91AY&SY is how it begins."),
    ],
)
def test_text_that_begins_like_another_kind_of_file_is_text(
    tmp_path: Path, name: str, content: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert len(list(open_source(path))) == 1


def test_an_array_with_its_commas_in_front_is_an_array(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('[\n{"text": "one"}\n,{"text": "two"}\n]\n')
    with pytest.raises(DataError, match="a JSON array"):
        list(open_source(path, on_bad_row="skip"))
