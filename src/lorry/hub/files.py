"""Which files of a run go to the hub, what of them is made anew for it, and what keeps them from
going.

Try: ``sorted(upload(Path("runs/people"), at="me/people"))``. Weights, tokenizer, description and
measurements go; checkpoints, earlier runs, logs and rows never do: ``samples.json`` stays, and the
report is made again without its samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import get_token

from lorry.disk import secret_shapes
from lorry.errors import ConfigError, ModelError
from lorry.report.html import render_page
from lorry.report.plots import render_png
from lorry.runs.layout import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    ADAPTER_WEIGHTS,
    CARD,
    MODEL_FILES,
    NOT_ADAPTERS,
    PLOT,
    PUBLISHED,
    RECEIPT,
    REPORT,
    SHARDS,
    TOKENIZER_FILES,
)
from lorry.runs.read import read_run
from lorry.train.card import card

BINARY_SUFFIXES = (".safetensors", ".png", ".model")
UploadContent = bytes | Path


def collect_upload(run_dir: Path, *, at: str) -> dict[str, UploadContent]:
    """{path in the repository: a file, or the bytes of one that is made for the hub}. ``at``: the
    repository, for the card.

    Raises ConfigError for a directory that is no finished run or whose files hold a secret,
    ModelError where weights are missing, DataError for a file of the run that cannot be read.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: no such run directory")
    if not (run_dir / RECEIPT).is_file():
        raise ConfigError(
            f"{run_dir} is not a finished run (it has no receipt.json); only a finished one goes to the hub"
        )
    found: dict[str, UploadContent] = {
        p.name: p
        for p in _matching_files(
            run_dir, (*ADAPTER_FILES, *MODEL_FILES, SHARDS, *TOKENIZER_FILES, *PUBLISHED)
        )
    }
    for folder in published_adapter_folders(run_dir):
        found |= {f"{folder.name}/{p.name}": p for p in _matching_files(folder, ADAPTER_FILES)}
    _require_weights(run_dir, found)
    run = replace(read_run(run_dir), samples=())
    written = run_dir / CARD
    ours = not written.is_file() or not card.is_edited_card(
        written.read_text(encoding="utf-8", errors="replace")
    )
    found[CARD] = card.render_run_card(run_dir, at=at, plot=PLOT).encode() if ours else written
    found |= {REPORT: render_page([run]).encode(), PLOT: render_png([run])}
    refuse_secrets(found)
    return found


def published_adapter_folders(run_dir: Path) -> list[Path]:
    """The folders of a run of several adapters."""
    return sorted(
        p.parent for p in run_dir.glob("*/adapter_config.json") if p.parent.name not in NOT_ADAPTERS
    )


def _matching_files(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    patterns = tuple(patterns)
    yield from (
        p
        for p in sorted(folder.iterdir())
        if p.is_file() and any(fnmatchcase(p.name, one) for one in patterns)
    )


def _require_weights(run_dir: Path, found: Mapping[str, UploadContent]) -> None:
    """Adapters, or a whole model. Raises ModelError naming what is missing."""
    configs = [name for name in found if name.endswith(ADAPTER_CONFIG)]
    lacking = [c for c in configs if c.replace(ADAPTER_CONFIG, ADAPTER_WEIGHTS) not in found]
    whole = "config.json" in found and any(
        fnmatchcase(name, "model*.safetensors") for name in found
    )
    if lacking or not (configs or whole):
        what = (
            f"{Path(lacking[0]).with_name(ADAPTER_WEIGHTS)} is missing"
            if lacking
            else "it holds no adapter and no model"
        )
        raise ModelError(f"{run_dir}: {what}, so there is nothing to upload")


# --- what must not leave this machine


def refuse_secrets(files: Mapping[str, UploadContent]) -> None:
    """Raise ConfigError where a text holds something of the shape of a secret
    (disk/secret_shapes.py), the login of the hub, or the value of a secret of the environment."""
    login = get_token() or ""
    secrets = (
        {"the login of the hub": login} if len(login) >= secret_shapes.SHORTEST_SECRET else {}
    ) | secret_shapes.environment_secrets()
    for path, data in _text_files(files):
        text = data.decode("utf-8", "replace")
        if (found := secret_shapes.find_secret(text, secrets)) is not None:
            line = text.count("\n", 0, found.at) + 1
            raise ConfigError(
                f"{path}:{line} holds a secret ({found.what}), so nothing was uploaded; take it out of the file and of the "
                "setting it came from, and revoke it if the file was shared"
            )


def find_private_paths(files: Mapping[str, UploadContent]) -> list[str]:
    """The texts that name the home directory of who runs this, or the working directory."""
    here = {str(Path.home()), str(Path.cwd())} - {"/"}
    return [
        path
        for path, data in _text_files(files)
        if any(f"{place}/".encode() in data for place in here)
    ]


def _text_files(files: Mapping[str, UploadContent]) -> Iterator[tuple[str, bytes]]:
    for path, content in files.items():
        if not path.endswith(BINARY_SUFFIXES):
            yield path, content if isinstance(content, bytes) else content.read_bytes()
