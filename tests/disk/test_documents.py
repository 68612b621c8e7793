"""The strict reader of JSON and YAML: plain values, or one refusal with its place; never a hang,
never a traceback.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.data.reading.bad_rows import BadRow
from lorry.data.reading.columnar import select_columns
from lorry.data.reading.json_decoder import RowDecoder
from lorry.disk import documents
from lorry.disk.documents import (
    first_repeated,
    parse_json,
    parse_yaml,
    read_json_document,
    read_yaml,
)
from lorry.disk.durable import DiskError
from lorry.disk.safetensors_names import check_names
from lorry.errors import DataError, ModelError
from lorry.runs.metrics import MetricsWriter

NUMBERS = st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
LEAVES = (
    st.none()
    | st.booleans()
    | NUMBERS
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
)
KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
PLAIN = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(PLAIN)
def test_what_json_writes_is_read_alike(value: Any) -> None:
    text = json.dumps(value)
    assert parse_json(text, "x.json") == json.loads(text)
    assert parse_json(json.dumps(value, indent=1, ensure_ascii=False).encode(), "x.json") == value


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=60)
    | st.text('[]{}",:0e-.\\u1nulNaIfity&*!<>|#\n ', max_size=60).map(str.encode)
)
def test_any_bytes_are_read_or_refused_in_one_line(raw: bytes) -> None:
    with contextlib.suppress(DataError):
        parse_json(raw, "x.json")
    with contextlib.suppress(DataError, UnicodeDecodeError):
        parse_yaml(raw.decode(), "x.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "b": }', r"x\.json:2: not JSON \(Expecting value, column 7\)"),
        ('{"a": 1,\n "a": 2}', r"x\.json:2: not JSON \('a' is given twice in one object"),
        ('[1,\n{"k": {"b": 1, "b": 1}}]', r"x\.json:2: not JSON \('b' is given twice"),
        (
            "[0,\n" + "9" * 5000 + "]",
            r"x\.json:2: not JSON \(9+\.\.\. \(5000 characters\) is too large for an integer",
        ),
        ("[9223372036854775808]", r"x\.json:1: .* too large for an integer"),
        ("[-" + "1" * 400 + "]", "too large for an integer"),
        ("[0,\n1e999]", r"x\.json:2: not JSON \(1e999 is too large for a float"),
        ('{"a":\nNaN}', r"x\.json:2: not JSON \(NaN is not a JSON number"),
        ("[-Infinity]", r"x\.json:1: not JSON \(-Infinity is not a JSON number"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 900 + "]" * 900, "nested too deeply"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested too deeply"),
        ('["\\ud800"]', "half a character"),
        ('{"\\udfff": 1}', "half a character"),
        ("", r"x\.json:1: not JSON"),
        ("[1] [2]", "Extra data"),
        (b'{"a":\n"\xff"}', r"x\.json:2: not UTF-8 text"),
    ],
)
def test_json_is_refused_with_its_line(text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        parse_json(text, "x.json")
    assert len(str(caught.value)) < 200


def test_json_numbers_that_a_caller_lets_pass() -> None:
    found = parse_json(
        "[NaN, Infinity, -Infinity, 1e999, 1000000000000000019884624838656]",
        "x",
        nonfinite=True,
        largest=10**40,
    )
    assert math.isnan(found[0])
    assert found[1:] == [math.inf, -math.inf, math.inf, 10**30 + 19884624838656]
    with pytest.raises(ModelError, match="x:7: not JSON"):
        parse_json("[" + "1" * 4301 + "]", "x", line=7, largest=10**5000, error=ModelError)


BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)
MAPS = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}}}\n" for i in range(1, 40)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"x\.yaml:\d+: its aliases expand to more than"),
        (MAPS, r"x\.yaml:\d+: its aliases expand to more than"),
        ("train: &a {x: *a}", r"x\.yaml:1: an alias is inside the value that it names"),
        ("a: 1\nb: &b [1, [*b]]", r"x\.yaml:2: an alias is inside the value that it names"),
        ("a: !!python/object/apply:os.getcwd []", r"x\.yaml:1: the tag"),
        ("a: 1\na: 2", r"x\.yaml:2: 'a' is given twice \(first in line 1\)"),
        ("a: 1\nb: " + "9" * 5000, r"x\.yaml:2: .* too large for an integer"),
        ("a: 0x" + "f" * 17, "too large for an integer"),
        ("a: -9999999999999999999", "too large for an integer"),
        ("a: 1e999", "too large for a float"),
        ("a: !!int x", "is not an integer"),
        ("a: !!float x", "not a number"),
        ("? [a]\n: b", "a key must be text"),
        ("[" * 3000, "nested too deeply"),
        ("[" * 80 + "]" * 80, "nested too deeply"),
        ("a: [1\n", r"x\.yaml:2: not YAML"),
        ("a: \x07", "not YAML"),
    ],
)
def test_yaml_is_refused_with_its_line(text: str, message: str) -> None:
    begun = time.process_time()
    with pytest.raises(DataError, match=message) as caught:
        parse_yaml(text, "x.yaml")
    assert len(str(caught.value)) < 200
    assert time.process_time() - begun < 5


def test_yaml_aliases_that_stand_for_little_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("one: &o {r: 8, on: no}\ntwo: *o\n")
    assert read_yaml(tmp_path / "x.yaml") == {
        "one": {"r": 8, "on": "no"},
        "two": {"r": 8, "on": "no"},
    }
    (tmp_path / "x.yaml").write_text("")
    assert read_yaml(tmp_path / "x.yaml") is None


def test_yaml_is_what_pyyaml_reads_where_the_two_versions_agree() -> None:
    text = "a: [1, -2.5, x, null, true]\nb: {c: 'y', d: |\n  z\n}\n".replace("|\n  z\n", '"z\\n"')
    assert parse_yaml(text, "x")[0] == yaml.safe_load(text)


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "socket"])
def test_what_is_no_regular_file_is_refused_without_waiting(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the address of a socket is short
    path = Path("x")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path = Path(os.devnull)
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("x")
    for read in (read_json_document, read_yaml):
        with pytest.raises(ModelError, match="is not a regular file"):
            read(path, error=ModelError)


def test_size_and_the_disks_own_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    path.write_text("[1, 2, 3]")
    assert read_json_document(path, most_bytes=9) == [1, 2, 3]
    with pytest.raises(DataError, match=r"x\.json is larger than 8 bytes"):
        read_json_document(path, most_bytes=8)
    (tmp_path / "link.json").symlink_to(path)  # the hub's cache is made of links
    assert read_json_document(tmp_path / "link.json") == [1, 2, 3]
    with pytest.raises(FileNotFoundError):
        read_json_document(tmp_path / "absent.json")

    def failing(*args: Any) -> int:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(documents.os, "open", failing)
    # the disk's failure is not damage of the document
    with pytest.raises(OSError, match="Input/output error"):
        read_json_document(path)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_what_cannot_be_read_is_neither_absent_nor_damaged(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: object, flags: int) -> int:
        raise OSError(code, os.strerror(code))

    (tmp_path / "x.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing)
        with pytest.raises(DiskError) as failed:
            documents.read_object(tmp_path / "x.json", error=ModelError)
    assert (failed.value.exit_code, failed.value.errno, failed.value.filename) == (
        74,
        code,
        str(tmp_path / "x.json"),
    )


def test_a_name_that_leads_nowhere_is_the_callers_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("absent", "file/x", "loop", "n" * 300):
        with pytest.raises(ModelError, match="cannot be read"):
            documents.read_object(tmp_path / name, error=ModelError)
    with pytest.raises(ModelError, match=r"absent is nowhere$"):
        documents.read_object(tmp_path / "absent", error=ModelError, absent="is nowhere")


class CountedName(str):
    """A name that counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        CountedName.compared += 1
        return str.__eq__(self, other)


def test_a_name_that_is_there_twice_is_found_in_linear_time() -> None:
    names = [CountedName(f"name {at}") for at in range(2000)]
    CountedName.compared = 0
    assert first_repeated(names) is None
    assert first_repeated([*names, CountedName("name 1999"), CountedName("name 3")]) == "name 1999"
    assert first_repeated(iter(["a", "", "b", ""])) == ""
    # a search through the names for each of them compares two million times
    assert CountedName.compared < 100


def test_every_reader_finds_one_name_among_many(tmp_path: Path) -> None:
    # by a search for each of them half a minute
    names = [f"name {at}" for at in range(30_000)] + ["name 29998"]
    text = "{" + ", ".join(f"{json.dumps(name)}: 1" for name in names) + "}"
    bad = RowDecoder().only(text)
    assert isinstance(bad, BadRow)
    assert "'name 29998'" in bad.reason
    with pytest.raises(DataError, match="'name 29998' is given twice"):
        parse_json(text, "x.json")
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode())
    with pytest.raises(ModelError, match="'name 29998' twice"):
        check_names(path)
    with pytest.raises(DataError, match="two columns are called 'name 29998'"):
        select_columns(
            pyarrow.schema([(name, pyarrow.int8()) for name in names]), "d.parquet", None
        )


def test_a_value_is_walked_only_where_its_text_could_hold_what_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes longer than parsing a line of metrics.jsonl."""
    walked: list[Any] = []
    monkeypatch.setattr(documents, "_describe_unsound", lambda value: walked.append(value) or "")
    for plain in (b'{"step": 1, "loss": 2.5}', '{"a": ["b"]}', '{"a": "\u00fc"}'.encode()):
        parse_json(plain, "x.json")
    assert walked == []
    for doubtful in (
        b'{"a": "\\u00fc"}',
        '{"a": "\u00fc"}',
        b"[" * 33 + b"]" * 33 + b"",
        b'[{"a":' * 33 + b"1" + b"}]" * 33,
    ):
        parse_json(doubtful, "x.json")
    assert len(walked) == 3
    monkeypatch.undo()
    for bad in (b'"\\ud800"', b'"\\uDc00"', '"\ud800"', b'{"\\ud800": 1}', b"[" * 66 + b"]" * 66):
        with pytest.raises(DataError, match=r"half a character|nested too deeply"):
            parse_json(bad, "x.json")


def test_a_metrics_line_is_written_without_being_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, MetricsWriter(tmp_path / "metrics.jsonl") as log:
        patch.setattr(documents, "parse_json", None)
        log.write({"step": 3, "loss": math.nan, "grad_norm": math.inf})
        for step in (None, -1, 2**53, True, 1.0, "3"):
            with pytest.raises(DataError, match="'step' must be a whole number of 0 or more"):
                log.write({"step": step})
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"step": 3, "loss": "NaN", "grad_norm": "Infinity"}\n'
