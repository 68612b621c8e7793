"""Rows of a benchmark by name: the same ones wherever they lie, and an error where they cannot be
had.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorry.data.encoding.token_cache import cache_key
from lorry.data.reading import suite_splits
from lorry.data.reading.sources import open_source
from lorry.data.reading.suite_splits import SplitLocation, locate_split
from lorry.errors import ConfigError, DataError, LorryError


def numbered(first: int, stop: int) -> list[dict[str, Any]]:
    return [{"question": f"q{at}", "answer": "a"} for at in range(first, stop)]


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize(
    ("name", "first", "stop"),
    [
        ("full", 0, 4000), ("retain90", 0, 3600), ("retain95", 0, 3800), ("retain99", 0, 3960),
        ("forget10", 3600, 4000), ("forget05", 3800, 4000), ("forget01", 3960, 4000),
    ],
)  # fmt: skip
def test_a_split_is_derived_from_full_and_forget_and_retain_never_meet(
    name: str, first: int, stop: int, tmp_path: Path
) -> None:
    write(tmp_path / "full.json", numbered(0, 4000))
    rows = open_source(f"tofu:{name}", local={"tofu": str(tmp_path)})
    assert [row.values["question"] for row in rows] == [f"q{at}" for at in range(first, stop)]


def test_a_split_of_its_own_and_a_file_named_for_it_go_first(tmp_path: Path) -> None:
    write(tmp_path / "full.json", numbered(0, 4000))
    write(tmp_path / "forget01.json", numbered(7, 9))
    here = {"tofu": str(tmp_path)}
    assert [r.values["question"] for r in open_source("tofu:forget01", local=here)] == ["q7", "q8"]
    mine = write(tmp_path / "mine.json", numbered(1, 2))
    own = here | {"tofu.forget01": str(mine)}
    assert [r.values["question"] for r in open_source("tofu:forget01", local=own)] == ["q1"]
    both = open_source(["tofu:forget01", str(mine)], local=here)
    assert len(list(both)) == 3


@pytest.mark.parametrize("rows", [3999, 4001, 60])
def test_nothing_is_derived_from_another_full(rows: int, tmp_path: Path) -> None:
    """The first 3,800 of 60 rows would be all of them, those to forget included."""
    write(tmp_path / "full.json", numbered(0, rows))
    with pytest.raises(DataError, match=f"{rows:,} rows and the published split 4,000"):
        list(open_source("tofu:retain95", local={"tofu": str(tmp_path)}))


def test_a_bad_row_keeps_its_number(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in numbered(0, 4000)]
    lines[10] = "{damaged"
    (tmp_path / "full.jsonl").write_text("\n".join(lines))
    source = open_source("tofu:forget05", local={"tofu": str(tmp_path)}, on_bad_row="skip")
    assert next(row.values["question"] for row in source) == "q3800"


def test_what_stands_in_for_a_holdout_is_told(tmp_path: Path) -> None:
    write(tmp_path / "forget10.json", numbered(3600, 4000))
    source = open_source("tofu:holdout05", local={"tofu": str(tmp_path)})
    assert next(row.values["question"] for row in source) == "q3600"
    assert any("no holdout05 on disk" in remark for remark in source.remarks)


def test_two_parts_of_one_file_are_cached_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorry.data.encoding import token_cache
    from lorry.data.encoding.encode import ExampleEncoder
    from tests.support.verbworld import CHATML
    from tests.support.verbworld import tokenizer as words

    monkeypatch.setattr(token_cache, "SMALLEST_SOURCE", 0)
    write(tmp_path / "full.json", numbered(0, 4000))
    encoder = ExampleEncoder(words(CHATML), max_length=64)
    keys = {
        cache_key(open_source(f"tofu:{name}", local={"tofu": str(tmp_path)}), encoder, None)
        for name in ("full", "forget05", "retain95")
    }
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("tofu:retain95", SplitLocation("locuslab/TOFU", "retain95")),
        ("muse:News/raw/forget", SplitLocation("muse-bench/MUSE-News", "raw", "forget")),
        ("muse:Books/scal/forget_3", SplitLocation("muse-bench/MUSE-Books", "scal", "forget_3")),
        ("muse:News/train/full", SplitLocation("tamarsonha/MUSE-News-Train", split="full")),
    ],
)
def test_without_a_folder_it_is_the_hubs(name: str, place: SplitLocation) -> None:
    assert locate_split(name, {}) == place


def test_muse_and_wmdp_lie_as_their_authors_write_them(tmp_path: Path) -> None:
    write(tmp_path / "News" / "raw" / "forget.json", ["one text", "another"])
    (tmp_path / "cyber-forget-corpus.jsonl").write_text('{"text": "a text"}\n')
    local = {"muse": str(tmp_path), "wmdp": str(tmp_path)}
    raw = [row.values["text"] for row in open_source("muse:News/raw/forget", local=local)]
    assert raw == ["one text", "another"]
    corpus = open_source("wmdp:cyber-forget-corpus", local=local)
    assert [row.values for row in corpus] == [{"text": "a text"}]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("tofu:forget15", "did you mean 'forget10'"),
        ("tofu:holdout10", "rows that were never trained on"),
        ("muse:News/forget", "muse:CORPUS/KIND/SPLIT"),
        ("muse:Times/raw/forget", "News or Books"),
        ("muse:News/raw/forget", "has no News/raw/forget.json"),
        ("wmdp:bio-forget-corpus", "given out on request"),
    ],
)
def test_a_split_that_is_not_there_is_one_error(name: str, wrong: str, tmp_path: Path) -> None:
    local = {suite: str(tmp_path) for suite in ("tofu", "muse", "wmdp")}
    with pytest.raises(ConfigError, match=wrong):
        open_source(name, local=local)


def test_what_would_be_ignored_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"leave data\.name=forget05 out"):
        open_source("tofu:forget10", name="forget05", local={"tofu": str(tmp_path)})
    with pytest.raises(ConfigError, match="is no folder"):
        open_source("tofu:forget10", local={"tofu": str(tmp_path / "nowhere")})
    circle = {"tofu.forget10": "tofu:forget10"}
    with pytest.raises(LorryError, match="no file or folder"):
        open_source("tofu:forget10", local=circle)


def test_the_published_splits_are_parts_of_the_published_whole(
    shared_data: Path, tmp_path: Path
) -> None:
    folder = shared_data / "tofu"
    only_full = {"tofu.full": str(folder / "full.json"), "tofu": str(tmp_path)}
    for name in ("forget01", "forget05", "forget10", "retain90"):
        theirs = [row.values for row in open_source(f"tofu:{name}", local={"tofu": str(folder)})]
        assert [row.values for row in open_source(f"tofu:{name}", local=only_full)] == theirs
        assert len(theirs) == (suite_splits.FORGET_ROWS | suite_splits.RETAIN_ROWS)[name]
