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
from lorry.evaluate.unlearning.muse import load_muse_sets
from lorry.evaluate.unlearning.rows import load_tofu_sets
from lorry.evaluate.unlearning.suite import SuiteRequest
from lorry.evaluate.unlearning.wmdp import load_wmdp_sets


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
        ("tofu:holdout05", SplitLocation("locuslab/TOFU", "holdout05")),
        (
            "muse:News/raw/forget",
            SplitLocation("muse-bench/MUSE-News", "raw", "forget", joined=True),
        ),
        (
            "muse:Books/scal/forget_3",
            SplitLocation("muse-bench/MUSE-Books", "scal", "forget_3", joined=True),
        ),
        (
            "muse:News/train/full",
            SplitLocation("tamarsonha/MUSE-News-Train", split="full", joined=True),
        ),
    ],
)
def test_without_a_folder_it_is_the_hubs(name: str, place: SplitLocation) -> None:
    assert locate_split(name, {}) == place


# {hub id: {configuration: {split: file}}} as their owners publish them
PUBLISHED = {
    "locuslab/TOFU": {
        name: {"train": f"{name}.json"}
        for name in (
            "full",
            "retain95",
            "forget05_perturbed",
            "holdout05",
            "real_authors_perturbed",
        )
    },
    "muse-bench/MUSE-News": {
        "raw": {"forget": "raw/forget.jsonl", "retain1": "raw/retain1.jsonl"},
        "knowmem": {name: f"knowmem/{name}.jsonl" for name in ("forget_qa", "forget_qa_icl")},
        "verbmem": {"forget": "verbmem/forget.jsonl"},
        "privleak": {"forget": "privleak/forget.jsonl", "holdout": "privleak/holdout.jsonl"},
        "scal": {"forget_1": "scal/forget_1.jsonl"},
        "sust": {"forget_4": "sust/forget_4.jsonl"},
    },
    "tamarsonha/MUSE-News-Train": {"default": {"full": "full.jsonl", "retain": "retain.jsonl"}},
    "cais/wmdp": {f"wmdp-{kind}": {"test": f"{kind}.jsonl"} for kind in ("bio", "cyber")},
    "cais/mmlu": {"all": {"test": "all/test.jsonl"}},
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Stands in for the hub: ids are folders here, their configurations declared as on the hub, in
    the front matter of README.md, and opened by the real builders of ``datasets``. Each row names
    its file. Returns what was asked for, (id, configuration).
    """
    import datasets

    for name, configs in PUBLISHED.items():
        card = {
            "configs": [
                {
                    "config_name": config,
                    "data_files": [{"split": s, "path": file} for s, file in splits.items()],
                }
                for config, splits in configs.items()
            ]
        }
        for file in (file for splits in configs.values() for file in splits.values()):
            path = tmp_path / "hub" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            place = f"{name}/{file}"
            row = {
                "question": place, "answer": 2 if name.startswith("cais") else place,
                "text": place, "prompt": place, "gt": place, "choices": ["a", "b", "c", "d"],
            }  # fmt: skip
            path.write_text(json.dumps(row) + "\n")
        # JSON is YAML
        (tmp_path / "hub" / name / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    asked: list[tuple[str, str | None]] = []
    real = datasets.load_dataset_builder

    def local(name: str, config: str | None = None) -> Any:
        asked.append((name, config))
        return real(str(tmp_path / "hub" / name), config, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", local)
    return asked


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("tofu:full", "locuslab/TOFU/full.json"),
        ("tofu:retain95", "locuslab/TOFU/retain95.json"),
        ("tofu:forget05_perturbed", "locuslab/TOFU/forget05_perturbed.json"),
        ("tofu:real_authors_perturbed", "locuslab/TOFU/real_authors_perturbed.json"),
        ("tofu:holdout05", "locuslab/TOFU/holdout05.json"),
        ("muse:News/raw/forget", "muse-bench/MUSE-News/raw/forget.jsonl"),
        ("muse:News/raw/retain1", "muse-bench/MUSE-News/raw/retain1.jsonl"),
        ("muse:News/knowmem/forget_qa_icl", "muse-bench/MUSE-News/knowmem/forget_qa_icl.jsonl"),
        ("muse:News/privleak/holdout", "muse-bench/MUSE-News/privleak/holdout.jsonl"),
        ("muse:News/scal/forget_1", "muse-bench/MUSE-News/scal/forget_1.jsonl"),
        ("muse:News/sust/forget_4", "muse-bench/MUSE-News/sust/forget_4.jsonl"),
        ("muse:News/train/retain", "tamarsonha/MUSE-News-Train/retain.jsonl"),
    ],
)
def test_names_reach_the_hub_as_they_are_published(
    name: str, file: str, hub: list[tuple[str, str | None]]
) -> None:
    (row,) = open_source(name)
    assert row.values["text"] == file
    [(place, config)] = hub
    splits = PUBLISHED[place]["default" if config is None else config]
    assert file in {f"{place}/{one}" for one in splits.values()}


def test_suites_ask_the_hub_for_what_is_published(hub: list[tuple[str, str | None]]) -> None:
    request = SuiteRequest(local={}, corpus="News", forget_split="forget05")
    muse = load_muse_sets(dict.fromkeys(("forget_knowmem", "forget_verbmem", "holdout")), request)  # type: ignore[arg-type]  # its fields are its own
    (asked,) = muse["forget_knowmem"].rows
    place = "muse-bench/MUSE-News/knowmem/forget_qa"
    assert asked.question == (
        f"Question: {place}_icl.jsonl\nAnswer: {place}_icl.jsonl\n\nQuestion: {place}.jsonl\nAnswer: "
    )
    assert muse["holdout"].rows[0].answers["answer"] == (
        "muse-bench/MUSE-News/privleak/holdout.jsonl",
    )
    wmdp = load_wmdp_sets(dict.fromkeys(("wmdp_bio", "mmlu")), request)  # type: ignore[arg-type]  # the same
    assert "cais/wmdp/bio.jsonl\nA. a" in wmdp["wmdp_bio"].rows[0].question
    assert wmdp["mmlu"].rows[0].right == 2
    assert ("cais/wmdp", "wmdp-bio") in hub
    assert ("cais/mmlu", "all") in hub
    tofu = load_tofu_sets({"holdout": ("answer",)}, local={}, forget_split="forget05")
    assert tofu["holdout"].rows[0].question == "locuslab/TOFU/holdout05.json"


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
        ("tofu:holdout10", "holdout rows, which were never trained on"),
        ("muse:News/forget", "muse:CORPUS/KIND/SPLIT"),
        ("muse:Times/raw/forget", "News or Books"),
        ("muse:News/raw/forget", "has no News/raw/forget.json"),
        ("wmdp:bio-forget-corpus", "available on request"),
    ],
)
def test_a_split_that_is_not_there_is_one_error(name: str, wrong: str, tmp_path: Path) -> None:
    local = {suite: str(tmp_path) for suite in ("tofu", "muse", "wmdp")}
    with pytest.raises(ConfigError, match=wrong):
        open_source(name, local=local)


def test_what_would_be_ignored_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"leave out data\.name=forget05"):
        open_source("tofu:forget10", name="forget05", local={"tofu": str(tmp_path)})
    with pytest.raises(ConfigError, match="is not a folder"):
        open_source("tofu:forget10", local={"tofu": str(tmp_path / "nowhere")})
    circle = {"tofu.forget10": "tofu:forget10"}
    with pytest.raises(LorryError, match="is not a file or folder"):
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
