"""stages.json: what the stages of a mixture of experts were made of, by digest, so that a finished
stage is left out only while all of it is as it was.

A stage's **inputs** are {what it is: SHA-256}: its settings, the code, the base, the content of data
files, the files of an earlier stage. The names are told to people when one has changed. What comes
from the hub is known by its name alone.

    record = StageRecord(output_dir)
    record.begin("experts", inputs); ...; record.finish("experts", inputs)
    record.changes("experts", inputs)       # [] while nothing has changed
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorry.config.data import DataConfig
from lorry.disk import documents, durable
from lorry.disk.integrity import file_digest
from lorry.errors import RunFilesError
from lorry.runs import ownership
from lorry.runs.layout import STAGES

# what only Lorry's file of that name has beside its stages
FORMAT = "lorry_stages"


@dataclass(frozen=True)
class StageRecord:
    """The record in a directory, which need not be there yet."""

    folder: Path

    def _stages(self) -> dict[str, Any]:
        """{stage: {finished, inputs}}. Raises DataError for a file that no Lorry wrote."""
        file = self.folder / STAGES
        try:
            document = documents.read_json_document(file)
        except FileNotFoundError:
            return {}
        stages = document.get("stages") if isinstance(document, dict) else None
        if not isinstance(stages, dict) or not all(
            isinstance(stage, dict)
            and isinstance(stage.get("inputs"), dict)
            and isinstance(stage.get("finished"), bool)
            for stage in stages.values()
        ):
            raise RunFilesError(
                f"{file}: not a record of stages; move it away, and every stage is done again"
            )
        return stages

    def changes(self, stage: str, inputs: Mapping[str, str]) -> list[str] | None:
        """The inputs that are not what the stage was last made of, also those that are gone; None
        for a stage that never began."""
        known = self._stages().get(stage)
        if known is None:
            return None
        before = known["inputs"]
        return [
            name
            for name in dict.fromkeys([*before, *inputs])
            if before.get(name) != inputs.get(name)
        ]

    def is_finished(self, stage: str) -> bool:
        """Whether it ended as it was last begun."""
        return bool(self._stages().get(stage, {}).get("finished"))

    def begin(self, stage: str, inputs: Mapping[str, str]) -> None:
        """Say of what a stage is being made. Raises DiskError."""
        self._write(stage, inputs, finished=False)

    def finish(self, stage: str, inputs: Mapping[str, str]) -> None:
        """Say that all of it is on the disk. Raises DiskError."""
        self._write(stage, inputs, finished=True)

    def forget(self, stage: str) -> None:
        """Take back `begin` of a stage that made nothing, and the record and its directory with it
        where there is nothing else in them. Raises DiskError."""
        stages = self._stages()
        stages.pop(stage, None)
        if stages:
            self._replace(stages)
            return
        (self.folder / STAGES).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else is there
            self.folder.rmdir()

    def _write(self, stage: str, inputs: Mapping[str, str], *, finished: bool) -> None:
        entry = {"finished": finished, "inputs": dict(inputs)}
        self._replace({**self._stages(), stage: entry})

    def _replace(self, stages: Mapping[str, Any]) -> None:
        text = json.dumps({FORMAT: 1, "stages": dict(stages)}, indent=1) + "\n"
        durable.make_directory(self.folder)
        ownership.write_owned_files(
            self.folder, {STAGES: text.encode()}, ours=ownership.recognise_keys(FORMAT)
        )


def text_digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def path_digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files below a folder. Links are
    followed: the hub's cache consists of them. Raises ModelError, DiskError."""
    if not path.is_dir():
        return file_digest(path.resolve())
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return text_digest(
        "\n".join(f"{f.relative_to(path).as_posix()} {file_digest(f.resolve())}" for f in files)
    )


def data_digests(data: DataConfig) -> dict[str, str]:
    """{path: SHA-256} of all that these settings read from this disk."""
    paths = [data.path] if isinstance(data.path, str) else list(data.path or [])
    named = [*paths, data.eval, data.catalog, *data.local.values()]
    # what is no path is the name of a set on the hub, or of rows of a suite in one of `local`
    places = [Path(name).expanduser() for name in named if name is not None]
    return {str(path): path_digest(path) for path in places if path.exists()}
