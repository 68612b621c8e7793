"""Token sets of large files are kept: the same set comes back, and nothing else ever does."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorry.data.encoding import token_cache
from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.encoding.token_set import TokenSet
from lorry.data.reading.formats import FORMATS
from lorry.data.reading.sources import open_source
from lorry.errors import DataError

Tokenizers = Callable[..., Any]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORRY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LORRY_TOKEN_CACHE", raising=False)
    monkeypatch.setattr(token_cache, "SMALLEST_SOURCE", 1)
    return tmp_path / "home" / "tokens"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"Count to {n}, über", "completion": str(n)}) + "\n"
            for n in range(9)
        )
    )
    return path


def kept(home: Path) -> list[Path]:
    """The sets; locks lie beside them."""
    return [item for item in home.iterdir() if item.is_dir()]


def built(
    path: Path,
    tokenizer: Any,
    said: list[str] | None = None,
    form: Any = None,
    limit: int | None = None,
    **options: Any,
) -> TokenSet:
    tell = None if said is None else said.append
    encoder = ExampleEncoder(tokenizer, **({"max_length": 64} | options), tell=tell)
    return TokenSet.build(
        open_source(path, limit=limit), encoder, form=form, adapter=3, role="forget"
    )


def test_the_second_time_nothing_is_tokenised(
    data: Path, home: Path, tokenizer_of: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = built(data, tokenizer_of("chatml"))
    monkeypatch.setattr(ExampleEncoder, "encode_many", lambda *_: pytest.fail("tokenised again"))
    said = list[str]()
    again = built(data, tokenizer_of("chatml"), said)
    assert again.digest == first.digest
    assert (again.where, again.report, again.adapter, again.role) == (
        first.where,
        first.report,
        3,
        "forget",
    )
    assert np.array_equal(again.weights, first.weights)
    assert again.tokens.dtype == np.int32
    assert said == [f"{data}: 9 rows, tokens read from the cache ({kept(home)[0]})"]


CHANGES: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 63},
    "what is learnt": {"completion_only_loss": False},
    "system": {"system": "Be brief."},
    "template variables": {"variables": {"enable_thinking": False}},
    "limit": {"limit": 8},
    "format": {"form": FORMATS["prompt_completion"]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_about_the_tokens_makes_another_set(
    change: str, data: Path, home: Path, tokenizer_of: Tokenizers
) -> None:
    built(data, tokenizer_of("chatml"))
    built(data, tokenizer_of("chatml"), **CHANGES[change])
    assert len(kept(home)) == 2


def test_another_tokenizer_or_template_or_content_makes_another_set(
    data: Path, home: Path, tokenizer_of: Tokenizers
) -> None:
    kinds = [built(data, tokenizer_of(kind)).digest for kind in ("chatml", "gemma", "llama2")]
    assert len(set(kinds)) == len(kept(home)) == 3
    before = data.stat()
    data.write_text(data.read_text().replace("Count to 5", "Count at 5"))
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))  # neither size nor time tell
    made = built(data, tokenizer_of("chatml"))
    assert made.digest != kinds[0]
    assert "Count at 5" in tokenizer_of("chatml").decode(made.example(5).tokens)


def test_a_damaged_set_is_made_again(data: Path, home: Path, tokenizer_of: Tokenizers) -> None:
    first = built(data, tokenizer_of("chatml"))
    (folder,) = kept(home)
    raw = bytearray((folder / "tokens.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "tokens.safetensors").write_bytes(raw)
    said = list[str]()
    assert built(data, tokenizer_of("chatml"), said).digest == first.digest
    assert "is damaged" in said[0]
    said.clear()
    built(data, tokenizer_of("chatml"), said)
    assert "tokens read from the cache" in said[0]


def test_rows_left_out_are_reported_each_time(
    data: Path, home: Path, tokenizer_of: Tokenizers, tmp_path: Path
) -> None:
    with data.open("a") as file:
        file.write('{"prompt": "no answer", "completion": ""}\n')
    for number in range(2):
        aside = tmp_path / f"aside{number}.jsonl"
        source = open_source(data, on_bad_row="quarantine", quarantine=aside)
        made = TokenSet.build(source, ExampleEncoder(tokenizer_of("chatml"), max_length=64))
        assert sum(made.report.left_out.values()) == 1
        assert f"{data}:10" in aside.read_text()
    assert not home.exists() or not kept(home)


def test_it_can_be_switched_off_and_small_files_are_not_kept(
    data: Path, home: Path, tokenizer_of: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORRY_TOKEN_CACHE", "0")
    built(data, tokenizer_of("chatml"))
    monkeypatch.delenv("LORRY_TOKEN_CACHE")
    monkeypatch.setattr(token_cache, "SMALLEST_SOURCE", 1 << 20)
    built(data, tokenizer_of("chatml"))
    assert not home.exists()


def test_the_sets_unused_for_the_longest_go_first(
    data: Path, home: Path, tokenizer_of: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, length in enumerate((40, 41, 42)):
        built(data, tokenizer_of("chatml"), max_length=length)
        for folder in kept(home):
            if folder.stat().st_mtime > 1e6:
                os.utime(folder, (number, number))
    oldest, *others = sorted(kept(home), key=lambda folder: folder.stat().st_mtime)
    size = sum(file.stat().st_size for file in oldest.iterdir())
    monkeypatch.setattr(token_cache, "LARGEST_CACHE", int(3.2 * size))
    built(data, tokenizer_of("chatml"), max_length=43)
    assert not oldest.exists()
    assert all(folder.exists() for folder in others)


def test_a_home_that_cannot_be_written_costs_no_more_than_the_time(
    data: Path, tmp_path: Path, tokenizer_of: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORRY_HOME", str(tmp_path / "file"))
    said = list[str]()
    assert len(built(data, tokenizer_of("chatml"), said)) == 9
    assert "not cached" in said[-1]


def test_what_only_the_tokenizer_object_decides_is_in_the_key(
    data: Path, home: Path, tokenizer_of: Tokenizers
) -> None:
    """`split_special_tokens` is in no tokenizer.json: control tokens are one token or many by it."""
    plain = tokenizer_of("chatml")
    split = type(plain).from_pretrained(
        _saved(plain, data.parent / "tokenizer"), split_special_tokens=True
    )
    assert len(plain.tokenize("<|im_start|>")) < len(split.tokenize("<|im_start|>"))
    digests = {built(data, one).digest for one in (plain, split)}
    assert len(digests) == len(kept(home)) == 2


def _saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def test_a_name_that_is_no_unicode_is_a_name(
    tmp_path: Path, data: Path, home: Path, tokenizer_of: Tokenizers
) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/data-\xe9.jsonl"))
    odd.write_bytes(data.read_bytes())
    first, again = (built(odd, tokenizer_of("chatml")) for _ in range(2))
    assert first.where == again.where
    assert first.digest == again.digest


def test_that_a_set_was_used_need_not_be_noted(
    data: Path, home: Path, tokenizer_of: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = built(data, tokenizer_of("chatml"))

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(token_cache.os, "utime", refuse)
    said = list[str]()
    assert built(data, tokenizer_of("chatml"), said).digest == first.digest
    assert "tokens read from the cache" in said[0]


def test_nobody_s_home_and_a_file_that_vanished(
    data: Path, tokenizer_of: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORRY_HOME", "~nosuchuser/x")
    assert len(built(data, tokenizer_of("chatml"))) == 9
    source = open_source(data)
    data.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        TokenSet.build(source, ExampleEncoder(tokenizer_of("chatml"), max_length=64))


def test_one_writer_of_a_set_is_enough(data: Path, home: Path, tokenizer_of: Tokenizers) -> None:
    encoder = ExampleEncoder(tokenizer_of("chatml"), max_length=64)
    key = token_cache.cache_key(open_source(data), encoder, None)
    home.mkdir(parents=True)
    with (home / f".{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = list[str]()
        assert len(built(data, tokenizer_of("chatml"), said)) == 9
    assert not said
    assert not (home / key).exists()
