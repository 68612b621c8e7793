"""An adapter that is not the file its run wrote is used, and that is said."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from lorry.models.loading.open import note_changed_adapter
from lorry.runs.layout import ADAPTER_WEIGHTS, RECEIPT


def write(folder: Path, content: bytes) -> str:
    """An adapter's weights; their SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ADAPTER_WEIGHTS).write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def notes(folder: Path) -> list[str]:
    found = list[str]()
    note_changed_adapter(folder, found.append)
    return found


@pytest.mark.parametrize("several", [False, True])
def test_one_changed_bit_is_told(tmp_path: Path, several: bool) -> None:
    folders = [tmp_path / name for name in ("one", "two")] if several else [tmp_path]
    digests = {folder.name: write(folder, folder.name.encode()) for folder in folders}
    (tmp_path / RECEIPT).write_text(json.dumps({"adapters": digests}))
    assert not [note for folder in folders for note in notes(folder)]
    write(folders[-1], b"\x00" + folders[-1].name.encode()[1:])
    (note,) = notes(folders[-1])
    assert str(folders[-1] / ADAPTER_WEIGHTS) in note
    assert "is not the file that this run wrote" in note


def test_nobody_vouches_for_a_foreign_adapter(tmp_path: Path) -> None:
    write(tmp_path / "own", b"weights")
    assert notes(tmp_path / "own") == []
    # nor does the receipt of another run in the folder above
    (tmp_path / RECEIPT).write_text(json.dumps({"adapters": {"default": "0" * 64}}))
    assert notes(tmp_path / "own") == []


def test_a_damaged_receipt_is_told(tmp_path: Path) -> None:
    write(tmp_path, b"weights")
    (tmp_path / RECEIPT).write_text('{"adapters": {"default": "00')
    (note,) = notes(tmp_path)
    assert "receipt.json" in note
