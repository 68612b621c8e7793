"""Token sets of large files, kept on disk: the second run over the same data does not tokenise
again.

    digest = cache_key(source, encoder, form)       # "" for what is not kept
    tokens = read_cached(digest, encoder) or ...    # built, then write_cached(digest, tokens)

A set is kept under `LORRY_HOME/tokens/DIGEST`. The digest covers all that decides about it: the
content of the files and the names they are shown under, the limit, the encoder's settings with
tokenizer and chat template, this package's code that reads and encodes, and the versions of the
libraries under it. Nothing is kept of a source below ``SMALLEST_SOURCE`` bytes (made again in a few
seconds), of a source with rows left out (they are reported and set aside anew each time), of a
streamed or hub source, or for an encoder that collects more than tokens. What is read back is
verified by the SHA-256 of its manifest; a damaged set is made again. `LORRY_TOKEN_CACHE=0` switches
all of it off.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.reading.formats import RowFormat
from lorry.data.reading.sources import DataSource
from lorry.disk import durable, home, integrity
from lorry.errors import ConfigError, ModelError
from lorry.formatting import format_count

SMALLEST_SOURCE = 1 << 20  # bytes of source files; fewer take about as long to find as to tokenise
LARGEST_CACHE = 4 << 30  # bytes of all sets together; beyond, those unused for the longest go
KEYED_LIBRARIES = ("tokenizers", "transformers", "jinja2", "pyarrow", "numpy")

CacheListener = Callable[[str], None] | None


def cache_key(source: DataSource, encoder: ExampleEncoder, form: RowFormat | None) -> str:
    """Names a token set by all that decides about it; "" where it is not to be kept."""
    if (
        os.environ.get("LORRY_TOKEN_CACHE") == "0"
        or not source.files
        or type(encoder) is not ExampleEncoder
    ):
        return ""
    try:
        _cache_folder()  # ConfigError where nobody has a home
        if sum(path.stat().st_size for path in source.files) < SMALLEST_SOURCE:
            return ""
        contents = [f"{path} {integrity.file_digest(path)}" for path in source.files]
    except (OSError, ModelError, ConfigError, RuntimeError):
        return ""  # the reader says what is wrong with a file, in its own words
    tokenizer = encoder.identity()
    if not tokenizer:
        return ""
    parts = [
        source.label,
        source.selection,
        str(source.limit),
        source.bad.policy,
        tokenizer,
        f"{form.name} {form.needs}" if form else "",
        _code_digest(),
    ]
    return hashlib.sha256("\n".join([*parts, *contents]).encode(errors="surrogatepass")).hexdigest()


def read_cached(
    digest: str, tell: CacheListener
) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """(arrays, everything else) of a set that was kept, or None. ``tell`` hears of a damaged one."""
    if not digest or not (folder := _cache_folder() / digest).is_dir():
        return None
    try:
        integrity.verify_directory(folder)
        arrays = load(integrity.read_content(folder / "tokens.safetensors"))
        rest = json.loads(integrity.read_content(folder / "rows.json"))
    except (ModelError, OSError) as error:
        if tell is not None:
            tell(f"the cached tokens cannot be used and the rows are tokenised again: {error}")
        return None
    with suppress(OSError):
        os.utime(folder)  # used now: see `_prune_cache`
    if tell is not None:
        tell(
            f"{rest['report']['source']}: {format_count(rest['report']['rows'], 'row')}, "
            f"tokens read from the cache ({folder})"
        )
    return arrays, rest


def write_cached(
    digest: str, arrays: dict[str, np.ndarray], rest: dict[str, Any], tell: CacheListener
) -> None:
    """Keep a set; a disk that refuses costs nothing but the time to tokenise again, and is told."""
    text = json.dumps(rest, separators=(",", ":"))  # ASCII: a file's name may be no Unicode
    size = sum(array.nbytes for array in arrays.values()) + len(text)
    if size > LARGEST_CACHE // 2:
        return
    target = _cache_folder() / digest
    try:
        durable.make_directory(target.parent)
        with target.with_name(f".{digest}.lock").open("w") as lock:
            # another run is writing this very set: that will do
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _prune_cache(LARGEST_CACHE - size)
            durable.recover_writes(target.parent, digest)
            files = {"tokens.safetensors": save(arrays), "rows.json": text.encode()}
            durable.write_directory(target, files, manifest=True, replace=True)
    except BlockingIOError:
        return
    except (durable.DiskError, ConfigError, OSError) as error:
        if tell is not None:
            tell(f"the tokens are not cached for the next run: {error}")


def _cache_folder() -> Path:
    return home.lorry_home() / "tokens"


def _prune_cache(room: int) -> None:
    """Remove the sets that were not used for the longest until the others fit into ``room`` bytes."""
    folders = sorted(
        (item for item in _cache_folder().iterdir() if item.is_dir()),
        key=lambda item: item.stat().st_mtime,
    )
    sizes = [
        sum(file.stat().st_size for file in item.iterdir() if file.is_file()) for item in folders
    ]
    total = sum(sizes)
    for item, size in zip(folders, sizes, strict=True):
        if total <= room:
            return
        durable.remove_directory(item)
        total -= size


@cache
def _code_digest() -> str:
    """SHA-256 over the sources that read and encode, and the versions of what they stand on."""
    versions = [f"{name} {version(name)}" for name in KEYED_LIBRARIES]
    versions += [f"python {sys.version_info}", f"unicode {unicodedata.unidata_version}"]
    digest = hashlib.sha256(" ".join(versions).encode())
    room = Path(__file__).parents[1]
    for path in [*sorted(room.rglob("*.py")), room.parent / "disk" / "documents.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()
