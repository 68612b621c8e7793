"""Whose a file is: what Lorry did not write is never removed and never written over.

The rule, for every verb that writes: a directory is a run of ours only by a **mark of ours** in it
(`is_run`); a file is ours only if its content says so. What is in the way and is not ours is
refused before anything is touched (`refuse_foreign`). What is ours and has to make room, and what
has appeared under a name since we looked, moves to DIR/previous/N (`move_to_previous`,
`write_owned_files`), with a word about it. Nothing is unlinked to make room.

Marks: a run.yaml that reads as a resolved run description, a receipt.json or process.json as a run
writes them, a checkpoint with our manifest. The mere name counts for nothing: other tools write a
run.yaml, a checkpoints/ and a process.json as well.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lorry.disk import documents, durable, integrity
from lorry.disk.integrity import translate_read_errors
from lorry.errors import ConfigError, DataError, ModelError
from lorry.runs.layout import CHECKPOINTS, PREVIOUS, PROCESS, RECEIPT, RUN_FILE, STEP

log = logging.getLogger(__name__)

# bytes: twice a run of 1,000 jobs with six own settings each; YAML is read at some 50 KB a second
MOST_DESCRIPTION = 512 << 10
PATHS_SHOWN = 6  # names in a message; the rest are counted
HEAD_LENGTH = 4096  # bytes in which a file says who made it
GENERATOR = b'<meta name="generator" content="Lorry">'  # in the head of every page
SOFTWARE = {"Software": "Lorry"}  # a text chunk of every picture
# a link to itself, a socket, a device: nothing that a run writes
UNOPENABLE_ERRNOS = {
    errno.ELOOP,
    errno.ENXIO,
    errno.ENODEV,
}
# what a description has at the left edge, as `config.dump_settings` writes them
_GROUPS = (
    b"model",
    b"data",
    b"train",
)


def is_run(folder: Path) -> bool:
    """Whether a directory bears a mark of ours: a run that began is in it. Raises DiskError where a
    mark cannot be read.
    """
    return (
        bool(run_description_of(folder))
        or _is_receipt(_json_value(folder / RECEIPT))
        or _has_begun(_json_value(folder / PROCESS))
        or any(_is_checkpoint(path) for path in _folder_entries(folder / CHECKPOINTS))
    )


def run_description_of(folder: Path) -> dict[str, Any]:
    """The run description in a directory, where it is the whole one that a run writes; else empty.
    Raises DiskError.
    """
    return read_run_description(folder / RUN_FILE)


def forget_set_of(place: Path, adapter: str | None = None) -> str | list[str] | None:
    """What a run of `lorry unlearn`, or the one of its adapters that is named, was to forget; None
    of anything else. ``place``: the run, or the folder of one of several adapters in it. Raises
    DiskError.
    """
    for folder, name in ((place, adapter), (place.parent, place.name)):
        description = run_description_of(folder)
        shared: str | list[str] | None = (description.get("unlearn") or {}).get("forget")
        jobs = {job["name"]: job for job in description.get("jobs") or []}
        job = jobs.get(str(name), {})
        if shared is not None and (folder == place or job):
            own: str | list[str] = (job.get("unlearn") or {}).get("forget", shared)
            return own
    return None


def read_run_description(path: Path) -> dict[str, Any]:
    """A YAML file as the whole, resolved run description that Lorry writes; empty where it is none.
    Raises DiskError.

    What is longer than one can be, or has not its groups at the left edge, is not parsed: megabytes
    of strange YAML take minutes.
    """
    # a look at the text first: parsing is what takes long
    text = _bounded_content(path, MOST_DESCRIPTION)
    if not text or not all(
        re.search(rb"^%s:" % name, text, re.MULTILINE) for name in (*_GROUPS, b"output_dir")
    ):
        return {}
    try:
        description = documents.parse_yaml(text.decode(), str(path))[0]
    except (DataError, UnicodeDecodeError):
        return {}
    if not isinstance(description, dict) or not isinstance(description.get("output_dir"), str):
        return {}
    # settings that every resolved description has, and no other tool's run.yaml all of
    identity = {
        "model": {"name", "dtype"},
        "data": {"max_length"},
        "train": {"learning_rate", "save_steps", "resume_from_checkpoint"},
    }
    groups = {name: description.get(name) for name in identity}
    whole = all(
        isinstance(group, dict) and identity[name] <= group.keys() for name, group in groups.items()
    )
    return description if whole else {}


def is_contracts(path: Path) -> bool:
    """Whether a file is the contracts.json of a run. Raises DiskError."""
    document = _json_value(path)
    keys = {"id", "name", "status", "detail"}
    return (
        isinstance(document, list)
        and bool(document)
        and all(isinstance(c, dict) and c.keys() == keys for c in document)
    )


def is_evaluation_file(path: Path) -> bool:
    """Whether a file is an evaluation.json, which `lorry eval` adds to. Raises DiskError."""
    document = _json_value(path)
    return isinstance(document, list) and all(
        isinstance(entry, dict) and {"name", "metrics"} <= entry.keys() for entry in document
    )


def recognise_keys(*keys: str) -> Callable[[Path], bool]:
    """Recognises a JSON object of ours by keys that it has."""
    return lambda path: (
        isinstance(document := _json_value(path), dict) and set(keys) <= document.keys()
    )


def recognise_mark(mark: bytes) -> Callable[[Path], bool]:
    """Recognises a file of ours by a mark (a regular expression) in its first bytes."""
    return lambda path: re.search(mark, _first_bytes(path)) is not None


is_report_page = recognise_mark(re.escape(GENERATOR))
is_report_picture = recognise_mark(rb"Software\0Lorry")
# a suite's records: open-unlearning's files of the same name have no digest
is_suite_file = recognise_mark(rb'\A\{\n "[^"\n]+": \{\n  "digest": "[0-9a-f]{64}"')
is_attacks_file = recognise_mark(rb'\A\{\n "written_by": "lorry attack"')


def is_suites_folder(folder: Path) -> bool:
    """Whether a folder holds what `lorry eval suite=...` or `lorry attack` wrote of a run: in itself,
    or by weight and adapter. Raises DiskError.
    """
    # three levels and no walk: evals/weight0.5/ADAPTER is the deepest of ours
    paths = (path for depth in ("", "*/", "*/*/") for path in folder.glob(f"{depth}*.json"))
    return any(is_suite_file(path) or is_attacks_file(path) for path in paths)


def refuse_foreign(paths: Mapping[Path, Callable[[Path], bool]], advice: str) -> None:
    """Raise ConfigError naming the paths that exist and are not ours, each by what recognises one
    of ours; nothing is touched.

    ``advice``: what to do instead. Raises DiskError where one cannot be read.
    """
    # all of them before the first is told: the person then mends it once
    foreign = [path for path, is_ours in paths.items() if _exists(path) and not is_ours(path)]
    if foreign:
        folders = {path.parent for path in foreign}
        names = [path.name if len(folders) == 1 else str(path) for path in foreign]
        where = f"{folders.pop()} holds " if len(folders) == 1 else ""
        more = f" and {len(names) - PATHS_SHOWN} more" if len(names) > PATHS_SHOWN else ""
        raise ConfigError(
            f"{where}{', '.join(names[:PATHS_SHOWN])}{more}, which Lorry did not "
            f"write and would overwrite; nothing was changed: {advice}"
        )


def move_to_previous(folder: Path, names: Iterable[str]) -> Path:
    """Move entries of a directory, in this order, to FOLDER/previous/N, which is returned; ``a/b``
    keeps its folder.

    A kill in between loses nothing: what has not moved is where it was. Raises DiskError, and
    ConfigError where `previous` is no directory.
    """
    previous = folder / PREVIOUS
    if _exists(previous) and not previous.is_dir():
        raise ConfigError(
            f"{previous} is not a directory, and the files of {folder} have to be "
            "moved there; rename it"
        )
    # one more than the highest, not the first that is free: N is the order in which runs were moved
    numbers = [int(path.name) for path in _folder_entries(previous) if path.name.isdigit()]
    aside = previous / str(max(numbers, default=0) + 1)
    for name in names:
        durable.make_directory((aside / name).parent)
        durable.rename_path(folder / name, aside / name)
    return aside


def write_owned_files(
    folder: Path, files: Mapping[str, bytes], ours: Callable[[Path], bool] = lambda path: False
) -> Path | None:
    """Write files below a directory, each whole or not at all; what lies there under their names
    with other bytes, and is not ``ours`` to write over, moves to FOLDER/previous/N first, with a
    warning. Returns that place, if any.

    Names may be ``adapter/file``. The directory itself must exist. Raises DiskError, ConfigError.
    """
    aside = displace_entries(
        folder,
        [
            n
            for n, content in files.items()
            if differs_from(folder / n, content) and not ours(folder / n)
        ],
    )
    # the files of a folder together: its directory is synced once
    by_folder: dict[Path, dict[str, durable.FileContent]] = {}
    for name, content in files.items():
        by_folder.setdefault((folder / name).parent, {})[Path(name).name] = content
    for inner, contents in by_folder.items():
        if inner != folder:  # which is not made again where somebody moved it away
            durable.make_directory(inner, parents=False)
        durable.write_files(inner, contents)
    return aside


def displace_entries(folder: Path, names: list[str]) -> Path | None:
    """`move_to_previous` with a warning; None where there is nothing to move."""
    if not names:
        return None
    aside = move_to_previous(folder, names)
    log.warning(
        "%s held %s, which this command did not write; moved to %s", folder, ", ".join(names), aside
    )
    return aside


def differs_from(path: Path, content: bytes | Path) -> bool:
    """Whether something else than a regular file of this content, given or held by another file,
    has this name.

    Raises DiskError where the disk does not say: what cannot be read is neither moved nor replaced.
    """
    try:
        # lstat: a link is somebody's, whatever it leads to
        with translate_read_errors(path):
            status = durable.disk.lstat(path)
    except ModelError:
        return False
    if not stat.S_ISREG(status.st_mode):
        return True
    if isinstance(content, bytes):
        # the size first: it answers most questions without reading a byte
        return status.st_size != len(content) or integrity.read_content(path) != content
    return status.st_size != integrity.plain_size(content) or integrity.file_digest(
        path
    ) != integrity.file_digest(content)


def _exists(path: Path) -> bool:
    """Also for a link that leads nowhere. Raises DiskError where the disk does not say."""
    try:
        with translate_read_errors(path):
            durable.disk.lstat(path)
    except ModelError:
        return False
    return True


def _folder_entries(folder: Path) -> list[Path]:
    """What lies in a directory; nothing where there is none."""
    try:
        with translate_read_errors(folder):
            return [folder / name for name in sorted(os.listdir(folder))]
    except ModelError:
        return []


def _first_bytes(path: Path) -> bytes:
    """The first bytes of a regular file; none of anything else. Raises DiskError."""
    try:
        with translate_read_errors(path):
            fd = durable.disk.open_to_read(path)
            try:
                return (
                    durable.disk.read(fd, HEAD_LENGTH)
                    # by the open descriptor: the name may mean something else by now; a pipe would
                    # wait for ever
                    if stat.S_ISREG(os.fstat(fd).st_mode)
                    else b""
                )
            finally:
                os.close(fd)
    except ModelError:
        return b""
    except durable.DiskError as error:
        if error.errno in UNOPENABLE_ERRNOS:
            return b""
        raise


def _bounded_content(path: Path, most_bytes: int = documents.MOST_BYTES) -> bytes | None:
    """A file's content, None where there is no regular file of bounded size. Raises DiskError."""
    try:
        with translate_read_errors(path):
            return documents.read_bytes(path, most_bytes)
    except (ModelError, DataError):
        return None
    except durable.DiskError as error:
        if error.errno in UNOPENABLE_ERRNOS:
            return None
        raise


def _json_value(path: Path) -> Any:
    """A JSON file's value, None where it is none."""
    raw = _bounded_content(path)
    try:
        return documents.parse_json(raw, str(path), nonfinite=True) if raw else None
    except DataError:
        return None


def _is_receipt(document: Any) -> bool:
    return (
        isinstance(document, dict)
        and isinstance(code := document.get("code"), dict)
        and {"sha256", "lorry"} <= code.keys()
    )


def _has_begun(document: Any) -> bool:
    """A process.json of a run that trained: one that was refused leaves its own, and has no claim
    to the directory.
    """
    return (
        isinstance(document, dict)
        and {"pid", "born", "folder", "begun"} <= document.keys()
        and document["begun"] is not None
    )


def _is_checkpoint(path: Path) -> bool:
    return bool(STEP.match(path.name)) and any(
        recognise_mark(mark)(path / name)
        for name, mark in (
            # either: a kill may have left one of the two
            ("manifest.json", b'"lorry-manifest/'),
            ("meta.json", b'"lorry-checkpoint/'),
        )
    )
