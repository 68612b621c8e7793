"""Which files of a run go to the hub, what of them is made anew for it, and what keeps them from
going.

Try: ``sorted(collect_upload(Path("runs/people"), at="me/people"))``. Weights, tokenizer, description and
measurements go; checkpoints, earlier runs, logs and rows never do: ``samples.json`` stays, and the
report is made again without its samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from lorry.disk import secret_shapes
from lorry.errors import ConfigError, ModelError
from lorry.report.html import render_page
from lorry.report.plots import render_png
from lorry.runs.layout import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    ADAPTER_WEIGHTS,
    CARD,
    EXPERTS,
    MODEL_FILES,
    NOT_ADAPTERS,
    PLOT,
    PUBLISHED,
    RECEIPT,
    REPORT,
    ROUTER,
    ROUTER_FILE,
    SHARDS,
    START,
    TOKENIZER_FILES,
    list_adapter_subfolders,
)
from lorry.runs.read import read_run
from lorry.train.card import card

# not searched for secrets: among millions of random bytes some have their shapes
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
    # the last file that a run writes: with it everything else is there
    if not (run_dir / RECEIPT).is_file():
        raise ConfigError(
            f"{run_dir} is not a finished run (it has no receipt.json); only a finished one goes to the hub"
        )
    if (run_dir / ROUTER / ROUTER_FILE).is_file():
        # its experts would go alone, and whoever opened them would have another model
        raise ConfigError(
            f"{run_dir} is a mixture of experts, and its router cannot be uploaded "
            f"yet; push the experts' run, {run_dir / EXPERTS}"
        )
    files: dict[str, UploadContent] = {
        p.name: p
        for p in _matching_files(
            run_dir, (*ADAPTER_FILES, *MODEL_FILES, SHARDS, *TOKENIZER_FILES, *PUBLISHED)
        )
    }
    for folder in (run_dir, *published_adapter_folders(run_dir)):
        inside = "" if folder == run_dir else f"{folder.name}/"
        files |= {f"{inside}{p.name}": p for p in _matching_files(folder, ADAPTER_FILES)}
        # without what it was trained over, an adapter from the hub could not be opened
        while (folder := folder / START).is_dir():
            inside += f"{START}/"
            files |= {f"{inside}{p.name}": p for p in _matching_files(folder, ADAPTER_FILES)}
    _require_weights(run_dir, files)
    # samples are rows of somebody's data, which nobody asked to publish
    # rows of the training data stay here, whatever page is made of the run
    run = replace(read_run(run_dir), samples=())
    card_file = run_dir / CARD
    is_generated = not card_file.is_file() or not card.is_edited_card(
        card_file.read_text(encoding="utf-8", errors="replace")
    )
    files[CARD] = (
        card.render_run_card(run_dir, at=at, plot=PLOT).encode() if is_generated else card_file
    )
    files |= {REPORT: render_page([run]).encode(), PLOT: render_png([run])}
    # last, over everything that would go, pages made just now included
    refuse_secrets(files)
    return files


def published_adapter_folders(run_dir: Path) -> list[Path]:
    """The folders of a run of several adapters."""
    return [path for path in list_adapter_subfolders(run_dir) if path.name not in NOT_ADAPTERS]


def _matching_files(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    patterns = tuple(patterns)
    yield from (
        p
        for p in sorted(folder.iterdir())
        if p.is_file() and any(fnmatchcase(p.name, pattern) for pattern in patterns)
    )


def _require_weights(run_dir: Path, files: Mapping[str, UploadContent]) -> None:
    """Adapters, or a whole model. Raises ModelError naming what is missing."""
    configs = [name for name in files if name.endswith(ADAPTER_CONFIG)]
    without_weights = [
        c for c in configs if c.replace(ADAPTER_CONFIG, ADAPTER_WEIGHTS) not in files
    ]
    has_model = "config.json" in files and any(
        fnmatchcase(name, "model*.safetensors") for name in files
    )
    if without_weights or not (configs or has_model):
        problem = (
            f"{Path(without_weights[0]).with_name(ADAPTER_WEIGHTS)} is missing"
            if without_weights
            else "it holds no adapter and no model"
        )
        raise ModelError(f"{run_dir}: {problem}, so there is nothing to upload")


# --- what must not leave this machine


def refuse_secrets(files: Mapping[str, UploadContent]) -> None:
    """Raise ConfigError where a text holds something of the shape of a secret
    (disk/secret_shapes.py), the login of the hub, or the value of a secret of the environment."""
    from huggingface_hub import get_token

    login = get_token() or ""
    secrets = (
        {"the login of the hub": login} if len(login) >= secret_shapes.SHORTEST_SECRET else {}
    ) | secret_shapes.environment_secrets()
    for path, data in _text_files(files):
        text = data.decode("utf-8", "replace")
        if (secret := secret_shapes.find_secret(text, secrets)) is not None:
            # the place and the kind, never the secret itself: messages end in logs
            line = text.count("\n", 0, secret.at) + 1
            raise ConfigError(
                f"{path}:{line} holds a secret ({secret.what}), so nothing was "
                "uploaded; remove it from the file and from the setting that it "
                "came from, and revoke it if the file was shared"
            )


def find_private_paths(files: Mapping[str, UploadContent]) -> list[str]:
    """The texts that name the home directory of who runs this, or the working directory."""
    # "/" would be in every text
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
