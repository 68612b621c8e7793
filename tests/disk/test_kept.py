"""Answers that are kept by a digest of all they hang on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorry.disk import durable
from lorry.disk.home import lorry_home
from lorry.disk.kept import KeptAnswers
from lorry.errors import ConfigError

NAMES = [str(i) * 64 for i in range(5)]


def test_the_last_used_are_kept(tmp_path: Path) -> None:
    kept = KeptAnswers(tmp_path / "answers", most=3, largest=100)
    kept.folder.mkdir()
    (kept.folder / "note.txt").write_text("somebody's")
    os.utime(kept.folder / "note.txt", (0, 0))
    for at, name in enumerate(NAMES):
        kept.save(name, "" if at else "why")
        os.utime(kept.folder / name, (at, at))
        if at == 2:
            assert kept.read(NAMES[0]) == "why"  # used, so it stays
    assert kept.read(NAMES[1]) is None
    assert {p.name for p in kept.folder.iterdir()} == {NAMES[0], NAMES[3], NAMES[4], "note.txt"}


def test_what_is_no_answer_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptAnswers(tmp_path, most=9, largest=4)
    assert kept.read(NAMES[0]) is None
    kept.save(NAMES[0], "long")
    kept.save(NAMES[1], "longer")
    assert kept.read(NAMES[0]) == "long"
    assert kept.read(NAMES[1]) is None
    (tmp_path / NAMES[2]).write_bytes(b"\xff")
    (tmp_path / NAMES[3]).write_bytes(b"longer")
    (tmp_path / NAMES[4]).mkdir()
    assert [kept.read(name) for name in NAMES[2:]] == [None] * 3

    def full(*given: object) -> None:
        raise durable.DiskError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(durable, "write_files", full)
    kept.save(NAMES[1], "a")  # found again the next time
    assert kept.read(NAMES[1]) is None


def test_an_answer_in_a_folder_that_is_only_read_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = KeptAnswers(tmp_path, most=9, largest=100)
    kept.save(NAMES[0], "an answer")

    def refuse(*given: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("os.utime", refuse)
    assert kept.read(NAMES[0]) == "an answer"


def test_without_a_home_it_is_said_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_HOME", "~no-such-user/cache")
    with pytest.raises(ConfigError, match="set LORRY_HOME"):
        lorry_home()
