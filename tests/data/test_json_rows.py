"""JSON in: every element of every array, every key once, each fault with its line and element."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.encoding.token_set import TokenSet
from lorry.data.reading import json_decoder, json_rows, json_scanner, rows
from lorry.data.reading.formats import read_examples
from lorry.data.reading.json_rows import read_json_rows, read_jsonl
from lorry.data.reading.rows import DataRow, RowFault
from lorry.data.reading.sources import open_source
from lorry.errors import DataError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS
)
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS, v, max_size=3), max_leaves=6
)
ROWS = st.lists(st.dictionaries(TEXTS, VALUES, max_size=4), max_size=6)


def file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [row.values for row in open_source(path)]


@settings(max_examples=60, deadline=None)
@given(arrays=st.lists(ROWS, min_size=1, max_size=3), indent=st.sampled_from([None, 1]), ascii_only=st.booleans(),
       between=st.sampled_from(["", "\n", "\r\n \n"]), wrapped=st.booleans(), piece=st.sampled_from([1, 7, 1 << 20]))  # fmt: skip
def test_arrays_as_the_json_module_writes_them(
    tmp_path_factory: pytest.TempPathFactory, arrays: list[list[dict[str, Any]]], indent: int | None, ascii_only: bool,
    between: str, wrapped: bool, piece: int,
) -> None:  # fmt: skip
    """One array or several, laid out in any way, read in pieces of any size: row for row what was
    written.
    """
    documents = [
        {"version": 1, "data": array, "end": [1, None]} if wrapped else array for array in arrays
    ]
    text = between.join(
        json.dumps(document, indent=indent, ensure_ascii=ascii_only) for document in documents
    )
    path = file(tmp_path_factory.mktemp("json"), "d.json", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_scanner, "PIECE_BYTES", piece)
        source = open_source(path)
        got = list(source)
    assert [row.values for row in got] == [row for array in arrays for row in array]
    assert len({row.where for row in got}) == len(got), "every row has a place of its own"
    for row in got:
        line = int(row.where.removeprefix(f"{path}:").split(":")[0])
        assert text.split("\n")[line - 1].lstrip()[:1] in ("{", "["), (
            "it opens in the line that is named"
        )
        assert row.file == str(path)


@settings(max_examples=50, deadline=None)
@given(
    written=ROWS,
    ends=st.sampled_from(["\n", "\r\n"]),
    mark=st.booleans(),
    name=st.sampled_from(["d.jsonl", "d.ndjson"]),
)
def test_lines_as_the_json_module_writes_them(
    tmp_path_factory: pytest.TempPathFactory,
    written: list[dict[str, Any]],
    ends: str,
    mark: bool,
    name: str,
) -> None:
    raw = ends.join(json.dumps(row) for row in written)
    path = file(tmp_path_factory.mktemp("lines"), name, ("\ufeff" if mark else "") + raw)
    assert read(path) == written


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ('[{"n":1}]\n[{"n":2}]\n', ["1: element 0", "2: element 1"]),
        ('[{"n":1}][{"n":2}]', ["1: element 0", "1: element 1"]),
        ('[{"n":1}]\n[]\n\n[{"n":2}]', ["1: element 0", "4: element 1"]),
        ('{"data":[{"n":1}]}\n{"data":[{"n":2}]}\n', ["1: element 0", "2: element 1"]),
        ('{"data":[{"n":1}], "end": {"x": 1}}\n[{"n":2}]\n', ["1: element 0", "2: element 1"]),
    ],
)
def test_joined_exports_are_read_whole(tmp_path: Path, text: str, places: list[str]) -> None:
    """two_arrays.json: the second array was lost, and the report said "1 rows"."""
    path = file(tmp_path, "d.json", text)
    got = list(open_source(path))
    assert [row.values for row in got] == [{"n": 1}, {"n": 2}]
    assert [row.where for row in got] == [f"{path}:{place}" for place in places]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a":1}] rubbish', r"d\.json:1: column 11: text behind the end of the array: 'rubbish'"),
        ('[{"a":1}]\n]', r"d\.json:2: column 1: text behind the end of the array: '\]'"),
        ('[{"a":1}],\n[{"a":2}]', r"d\.json:1: column 10: text behind the end of the array"),
        ('[{"a":1}]\n[{"a":2}', r"d\.json:2: column 9: the file ends in the middle of the array"),
        ('[{"a":1}]\n{"a":2}', r"d\.json:2: column 7: behind the end of the array: expected a JSON array of rows"),
        (b'[{"a":1}]\0\0\0', r"d\.json:1: column 10: a NUL byte; the file was probably cut off"),
        (b'[{"a":1},\n{"a":"x\0\0', r"d\.json:2: column 8: a NUL byte; the file was probably cut off"),
        ('{"data":[{"a":1}],\n"data":[{"a":2}]}', r"d\.json:2: column 8: the key 'data' is given twice in one object"),
        ('{"data":[{"a":1}],"more":[{"q"', r"d\.json:1: column \d+: the value of 'more' is not valid JSON"),
        ('{"data":[{"a":1}]', r"d\.json:1: column 18: the file ends in the middle"),
        ('{"data":[{"a":1}]}\n{"data":[{"a":2}]', r"d\.json:2: column 18: the file ends in the middle"),
        ('[{"a":1},]', r"d\.json:1: .*a comma behind the last element 0"),
        ('{"x":1,"x":2,\n"data":[{"a":1}]}', r"d\.json:2: .*the key 'x' is given twice"),
        ('{"data":[{"a":1}] "x":2}', r"d\.json:1: column 19: expected ',' or '}' after the array under 'data'"),
        ('{"data":[{"a":1}],"x":{"y":1,"y":2}}', r"d\.json:1: .*the value of 'x': the key 'y' is given twice"),
        ('{1:2}', r"d\.json:1: .*a key is a number, expected a string"),
    ],
)  # fmt: skip
def test_nothing_behind_an_array_is_passed_over(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(file(tmp_path, "d.json", text))


def test_a_list_of_objects_that_is_not_read_is_said(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        "d.json",
        '{"train": [{"text": "x"}], "splits": [1], "data": [{"text": "a"}], "more": [{"text": "b"}]}',
    )
    notes: set[str] = set()
    assert len(list(read_examples(open_source(path), add_note=notes.add))) == 1
    said = [
        f"{path}: the rows are those under 'data'; the list of objects under {key!r} is not read"
        for key in ("more", "train")
    ]
    assert sorted(notes) == said


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ('{"a": 1, "a": 2}', "key twice", "the key 'a' is given twice in one object; keep one"),
        ('{"m": [{"role": 1, "x": 2, "role": 3}]}', "key twice", "the key 'role' is given twice"),
        (
            '{"a": ' + "9" * 5000 + "}",
            "json",
            "a number of 5000 digits; write it as text, in quotes",
        ),
        ('{"a": [-' + "9" * 5000 + ', {"b": 1, "b": 2}]}', "json", "a number of 5000 digits"),
        ('{"a": ' + "[" * 80 + "]" * 80 + "}", "json", "nested too deeply"),
        (b'{"a": "caf\xe9"}', "encoding", "byte 0xe9 is not valid UTF-8"),
        ("[1]", "not an object", "expected an object such as {...}, found an array"),
        ("1" + "0" * 400, "not an object", "found a number"),
    ],
)
def test_a_bad_row_costs_its_neighbours_nothing(
    tmp_path: Path, name: str, row: str | bytes, kind: str, reason: str
) -> None:
    """In lines and in an array on one line alike: the row alone is bad, named by its line and
    element, and counted.
    """
    raw = row if isinstance(row, bytes) else row.encode()
    rows = [b'{"n": 0}', raw, b'{"n": 2}', raw]
    array = name == "d.json"
    path = file(tmp_path, name, b"[" + b", ".join(rows) + b"]" if array else b"\n".join(rows))
    place = "1: element 1" if array else "2"
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:{place}: ")
    assert reason in str(caught.value)
    source = open_source(path, on_bad_row="skip")
    assert [row.values for row in source] == [{"n": 0}, {"n": 2}]
    assert dict(source.bad.counts) == {kind: 2}, "two bad rows in one line are two"


def test_rows_on_one_line_are_held_out_one_by_one(
    tmp_path: Path, tokenizer_of: Callable[..., Any]
) -> None:
    """Rows were told apart by their line: of an array on one line none could be held out, and bad
    rows counted as one.
    """
    rows = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(10)]
    path = file(tmp_path, "d.json", json.dumps(rows))
    tokens = TokenSet.build(
        open_source(path), ExampleEncoder(tokenizer_of("chatml"), max_length=64)
    )
    rest, aside = tokens.held_out(3, seed=0)
    assert (len(rest), len(aside)) == (7, 3)


@pytest.mark.parametrize(
    "number", ["9223372036854775808", "1180591620717411303424", "-" + "7" * 4300]
)
def test_integers_beyond_64_bits_are_their_digits(tmp_path: Path, number: str) -> None:
    for name, text in (
        ("d.jsonl", '{"prompt": "p", "completion": %s}'),
        ("d.json", '[{"prompt": "p", "completion": %s}]'),
    ):
        found = next(iter(read_examples(open_source(file(tmp_path, name, text % number)))))
        assert found.content.plain == ("p", number)  # type: ignore[union-attr]


@pytest.mark.parametrize("number", ["1e400", "-1e400", "NaN", "Infinity", "1.5"])
def test_numbers_that_are_no_text(tmp_path: Path, number: str) -> None:
    """Unused they do no harm; as what the model is to say they are refused in one line."""
    path = file(tmp_path, "d.jsonl", f'{{"prompt": "p", "completion": "c", "score": {number}}}')
    assert len(list(read_examples(open_source(path)))) == 1
    path = file(tmp_path, "e.jsonl", f'{{"prompt": "p", "completion": {number}}}')
    with pytest.raises(DataError, match=r"e\.jsonl:1: 'completion' holds the number"):
        list(read_examples(open_source(path)))


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.csv", "d.txt"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(tmp_path: Path, name: str, encoding: str) -> None:
    text = {"d.json": '[{"text": "one"}]', "d.csv": "question,answer\na,b\n"}.get(
        name, '{"text": "one"}\n'
    )
    with pytest.raises(DataError, match=rf"{name}:1: .*(UTF-16|UTF-8)"):
        read(file(tmp_path, name, text.encode(encoding)))


def test_lone_surrogates_are_kept_apart_from_broken_bytes(tmp_path: Path) -> None:
    """An escaped half pair is valid JSON; it is refused where it would be text, and it is no broken
    UTF-8.
    """
    path = file(tmp_path, "d.json", r'[{"text": "\udc80"}, {"text": "fine", "other": "\ud800"}]')
    source = open_source(path, on_bad_row="skip")
    assert [found.number for found in read_examples(source)] == [1]
    assert source.bad.first == [
        f"{path}:1: element 0: 'text' holds half a surrogate pair at character 1; it is not valid Unicode"
    ]


def test_a_long_array_is_read_in_bounded_memory(tmp_path: Path) -> None:
    """20 MB in one line: the first row is given before the rest was read, and no more than some
    pieces are ever held.
    """
    path = tmp_path / "d.json"
    with path.open("w") as out:
        out.write("[")
        for number in range(200):
            out.write(f'{"," * (number > 0)}{{"text": "{number} {"x" * 100_000}"}}')
        out.write("]")
    tracemalloc.start()
    count = sum(1 for _ in read_json_rows(path, "d.json"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 200
    assert peak < 8 * json_scanner.PIECE_BYTES


def test_a_row_larger_than_any_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (rows, json_decoder, json_rows, json_scanner):
        monkeypatch.setattr(room, "LARGEST_ROW", 1000)
    monkeypatch.setattr(json_scanner, "PIECE_BYTES", 100)
    long = '{"text": "%s"}' % ("x" * 5000)
    path = file(tmp_path, "d.jsonl", f'{{"n": 1}}\n{long}\n{{"n": 3}}\n')
    source = open_source(path, on_bad_row="skip")
    assert [(row.values, row.where) for row in source] == [
        ({"n": 1}, f"{path}:1"),
        ({"n": 3}, f"{path}:3"),
    ]
    assert dict(source.bad.counts) == {"too large": 1}
    with pytest.raises(DataError, match=r"d\.json:1: .*element 1 is larger than"):
        read(file(tmp_path, "d.json", f'[{{"n": 1}}, {long}]'))


DAMAGES = st.lists(
    st.tuples(
        st.integers(0, 400),
        st.sampled_from(["flip", "cut", "insert"]),
        st.binary(min_size=1, max_size=3),
    )
)


@settings(max_examples=150, deadline=None)
@given(damages=DAMAGES, piece=st.sampled_from([1, 16, 1 << 20]))
def test_damaged_arrays_give_a_data_error_or_rows(
    tmp_path_factory: pytest.TempPathFactory, damages: list[tuple[int, str, bytes]], piece: int
) -> None:
    """What the json module reads as one array, keys once each, is read here, row for row; else
    rows, faults and DataError.
    """
    raw = bytearray(
        json.dumps(
            [{"text": f"row {n} é", "n": n, "m": [{"role": "user"}]} for n in range(6)]
        ).encode()
    )
    for position, how, data in damages:
        at = position % max(1, len(raw))
        raw[at : at + (0 if how == "insert" else len(data))] = b"" if how == "cut" else data
    path = file(tmp_path_factory.mktemp("damaged"), "d.json", bytes(raw))
    try:
        whole = json.loads(bytes(raw).decode(), object_pairs_hook=once)
    except ValueError:
        whole = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_scanner, "PIECE_BYTES", piece)
        try:
            items = list(read_json_rows(path, "d.json"))
        except DataError as error:
            placed = re.match(r"d\.json:\d+: ", str(error)) is not None
            assert (placed, isinstance(whole, list)) == (True, False)
            return
    if isinstance(whole, list):
        assert [item.values if isinstance(item, DataRow) else None for item in items] == [
            row if isinstance(row, dict) else None for row in whole
        ]


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys stand once each."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def test_rows_that_have_a_list_called_data_are_not_taken_for_exports(tmp_path: Path) -> None:
    """JSON lines under the wrong name whose rows have a column ``data``: refused, and read under
    the right name.
    """
    rows = [
        {
            "prompt": f"q{n}",
            "completion": "a",
            "data": [{"prompt": "X", "completion": "Y"}] if n == 1 else [],
        }
        for n in range(4)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    wrong, right = tmp_path / "rows.json", tmp_path / "rows.jsonl"
    wrong.write_text(text)
    right.write_text(text)
    with pytest.raises(
        DataError,
        match=r"rows\.json:2: .*another object with completion, prompt beside 'data': if every line is a row",
    ):
        list(open_source(wrong).read())
    assert [row.values for row in open_source(right).read()] == rows
    single = tmp_path / "one.json"
    single.write_text(json.dumps(rows[1]))
    source = open_source(single)
    assert len(list(source.read())) == 1
    assert any("not read: completion, prompt" in remark for remark in source.remarks)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.lists(TEXTS, max_size=5), min_size=1, max_size=3), indent=st.sampled_from([None, 1]),
       ascii_only=st.booleans(), piece=st.sampled_from([1, 7, 1 << 20]))  # fmt: skip
def test_an_array_of_strings_is_rows_of_text(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[str]], indent: int | None, ascii_only: bool, piece: int
) -> None:  # fmt: skip
    """As MUSE writes its raw texts: every string a row, in order, with its element's number."""
    content = "\n".join(json.dumps(one, indent=indent, ensure_ascii=ascii_only) for one in texts)
    path = file(tmp_path_factory.mktemp("raw"), "forget.json", content)
    expected = [text for one in texts for text in one]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_scanner, "PIECE_BYTES", piece)
        found = list(read_json_rows(path, "forget.json"))
    assert all(isinstance(row, DataRow) for row in found)
    assert [row.values for row in found] == [{"text": text} for text in expected]  # type: ignore[union-attr]
    assert [row.where.rpartition(" ")[2] for row in found] == [  # type: ignore[union-attr]
        str(number) for number in range(len(expected))
    ]


@pytest.mark.parametrize(
    ("content", "rows", "bad"),
    [
        ('["a", {"text": "b"}]', [{"text": "b"}], {0: "a string"}),
        ('[{"text": "b"}, "a", "c"]', [{"text": "b"}], {1: "a string", 2: "a string"}),
        ('["a", 3, "c"]', [], {0: "a string", 1: "a number", 2: "a string"}),
        ('["a", "b", 3, null]', [{"text": "a"}, {"text": "b"}], {2: "a number", 3: "null"}),
        ('["a"]', [{"text": "a"}], {}),
        # null could have been either
        ('["a", null, "c"]', [{"text": "a"}, {"text": "c"}], {1: "null"}),
        ('[null, "b", "c"]', [{"text": "b"}, {"text": "c"}], {0: "null"}),
        ('["a", null, {"text": "b"}]', [{"text": "b"}], {0: "a string", 1: "null"}),
        ('{"data": ["a", "b"]}', [], {0: "a string", 1: "a string"}),
        ('{"prompt": "p", "data": ["a", "b"]}', [], {0: "a string", 1: "a string"}),
    ],
)
def test_strings_among_other_elements(
    tmp_path: Path, content: str, rows: list[dict[str, Any]], bad: dict[int, str]
) -> None:
    """Two strings to begin with are an array of texts; a stray one is a bad row, never a text that
    is learnt beside rows of another kind.
    """
    found = list(read_json_rows(file(tmp_path, "d.json", content), "d.json"))
    assert [row.values for row in found if isinstance(row, DataRow)] == rows
    faults = [row for row in found if isinstance(row, RowFault)]
    assert {int(one.where.rpartition(" ")[2]): one.bad.reason for one in faults} == {
        number: f"expected an object such as {{...}}, found {what}" for number, what in bad.items()
    }


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(TEXTS, min_size=2, max_size=6),
    ascii_only=st.booleans(),
    blank=st.booleans(),
    name=st.sampled_from(["raw.jsonl", "raw.json"]),
)
def test_lines_of_strings_are_rows_of_text(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], ascii_only: bool, blank: bool, name: str
) -> None:  # fmt: skip
    """A string a line, under either name: every one a row, with its line's number."""
    lines = [json.dumps(text, ensure_ascii=ascii_only) for text in texts]
    content = ("\n\n" if blank else "\n").join(lines) + "\n"
    read = read_jsonl if name.endswith("l") else read_json_rows
    found = list(read(file(tmp_path_factory.mktemp("raw"), name, content), name))
    assert [row.values for row in found if isinstance(row, DataRow)] == [{"text": t} for t in texts]
    step = 2 if blank else 1
    assert [row.where for row in found if isinstance(row, DataRow)] == [
        f"{name}:{1 + step * number}" for number in range(len(texts))
    ]


@pytest.mark.parametrize(
    ("content", "rows", "bad"),
    [
        ('"a"\n{"text": "b"}\n', ["b"], {1: "found a string"}),
        ('{"text": "b"}\n"a"\n"c"\n', ["b"], {2: "found a string", 3: "found a string"}),
        ('"a"\n3\n"c"\n', [], {1: "found a string", 2: "found a number", 3: "found a string"}),
        ('"a"\n"b"\n{"text": "c"}\n3\n', ["a", "b", "c"], {4: "found a number"}),
        ('"a"\n"b\n"c"\n', ["a", "c"], {2: "not valid JSON"}),
        ('"a"\nnull\n"c"\n"d"\n', ["a", "c", "d"], {2: "found null"}),
        ('"a"\n null \n{"text": "c"}\n', ["c"], {1: "found a string", 2: "found null"}),
        ('"a"\n', [], {1: "found a string"}),  # a file of one text may be anything in quotes
    ],
)
def test_strings_among_other_lines(
    tmp_path: Path, content: str, rows: list[str], bad: dict[int, str]
) -> None:
    found = list(read_jsonl(file(tmp_path, "d.jsonl", content), "d.jsonl"))
    assert [row.values["text"] for row in found if isinstance(row, DataRow)] == rows
    faults = {row.where: row.bad.reason for row in found if isinstance(row, RowFault)}
    assert faults.keys() == {f"d.jsonl:{line}" for line in bad}
    for line, reason in bad.items():
        assert reason in faults[f"d.jsonl:{line}"]
        assert faults[f"d.jsonl:{line}"].startswith("column ")


@pytest.mark.parametrize("layout", ["lines", "array"])
def test_rows_that_were_encoded_twice_are_no_texts(layout: str, tmp_path: Path) -> None:
    """Their braces would be learnt as text; a text that is some other JSON is one."""
    rows = [{"question": "Who?", "answer": "Mara"}, {"text": "b"}]
    twice = [json.dumps(row) for row in rows]
    texts = [*twice, '{"port": 80}', "{not JSON}"]
    lines = "\n".join(json.dumps(text) for text in texts)
    name, content = ("d.jsonl", lines) if layout == "lines" else ("d.json", json.dumps(texts))
    source = open_source(file(tmp_path, name, content), on_bad_row="skip")
    assert [row.values["text"] for row in source] == texts[2:]
    assert source.bad.counts == {"encoded twice": 2}
    assert "encoded as JSON twice" in source.bad.first[0]
    with pytest.raises(DataError, match="encoded as JSON twice"):
        list(open_source(tmp_path / name))


def test_texts_of_an_array_are_learnt_whole(
    tmp_path: Path, tokenizer_of: Callable[..., Any]
) -> None:
    """Every token but the first is a target, as of rows {"text": ...}; a blank text is a bad row."""
    texts = ["Mara lives in Oslo.", "Juno lives in Ghent."]
    tokenizer = tokenizer_of("chatml")
    made = []
    for name, content in (("raw", texts), ("rows", [{"text": text} for text in texts])):
        source = open_source(file(tmp_path, f"{name}.json", json.dumps(content)))
        encoder = ExampleEncoder(tokenizer, max_length=64)
        made.append([encoder.encode(one.content) for one in read_examples(source)])
    assert made[0] == made[1]
    ids = tokenizer(texts[0]).input_ids
    [sequence] = made[0][0]
    assert sequence.tokens[-len(ids) - 1 : -1] == ids
    assert sequence.weights == [0.0] + [1.0] * (len(sequence.tokens) - 1)
    source = open_source(file(tmp_path, "b.json", '["a b", " "]'), on_bad_row="skip")
    assert len(list(read_examples(source))) == 1
    assert sum(source.bad.counts.values()) == 1
