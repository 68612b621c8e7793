"""`lorry unmerge MERGED`: give back the base a merged model came from, bit for bit: its files,
never a subtraction.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lorry.config.settings import UnmergeSettings
from lorry.disk import documents
from lorry.disk.integrity import file_digest
from lorry.errors import ModelError
from lorry.notes import ignore_note
from lorry.verbs.merge import MERGE_RECORD_FILE, weight_files
from lorry.verbs.open_model import print_note

# weights, settings, tokenizers, a model's own code
COPIED_FILE_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")


def main(settings: UnmergeSettings) -> int:
    """Find the base that the record of the merge names, check every weight file's digest, copy it."""
    from lorry.disk import durable

    record = read_record(Path(settings.run) / MERGE_RECORD_FILE)
    # before the directory is made: without a base nothing is left behind
    base = find_base(record)
    with durable.build_directory(settings.output_dir) as folder:
        for file in sorted(base.iterdir()):
            if file.is_file() and file.suffix in COPIED_FILE_SUFFIXES:
                # contents without modes: the base may lie read-only in a cache
                shutil.copyfile(file, folder / file.name)
        # of the copies and not the originals: what is digested is what is given
        verify_copied_weights(folder, record["base_weights"], base)
    print_note(
        f"{len(record['base_weights'])} weight files copied from {base}; SHA-256 as "
        "before the merge"
    )
    print(settings.output_dir)
    return 0


def read_record(path: Path) -> dict[str, Any]:
    """The record of a merge. Raises ModelError when there is none or it is damaged, and DiskError."""
    absent = "does not exist; only a model written by `lorry merge` records its base model"
    record = documents.read_object(path, error=ModelError, absent=absent)
    shape = {"base": str, "opened_as": str, "base_weights": dict}
    if any(not isinstance(record.get(key), kind) for key, kind in shape.items()):
        raise ModelError(f"{path}: not a record of `lorry merge`; it holds {', '.join(shape)}")
    return record


def find_base(record: dict[str, Any]) -> Path:
    """The base's directory: where it was, or wherever what was merged leads to now (a hub id, a
    run's base).
    """
    from lorry.models.loading.sources import resolve_model

    recorded_place = Path(record["base"])
    # the cache may have been emptied since the merge, and made again elsewhere
    return (
        recorded_place
        if recorded_place.is_dir()
        else resolve_model(record["opened_as"], add_note=ignore_note).directory
    )


def verify_copied_weights(folder: Path, digests: dict[str, str], base: Path) -> None:
    """Compare the copied weight files with the record. Raises ModelError unless they are the very
    same.
    """
    copied = {file.name: file_digest(file) for file in weight_files(folder)}
    if changed := sorted(
        name for name in digests.keys() | copied.keys() if digests.get(name) != copied.get(name)
    ):
        raise ModelError(
            f"{base} is not the base model that was merged: {changed[0]} has "
            "changed since; nothing was written"
        )
