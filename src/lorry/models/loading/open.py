"""Open what a person names: a base, a base with adapters, or a run directory with one adapter or a
folder of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lorry.adapters.adapter import NAME_PATTERN
from lorry.adapters.attach import get_bank
from lorry.adapters.mix import Mix
from lorry.adapters.peft.files import load_adapter, load_start
from lorry.adapters.routing.files import load_router
from lorry.adapters.routing.stacking import stack_masters
from lorry.adapters.tensor_parallel.ranks import TensorRanks
from lorry.adapters.variants.new_tokens import grown_with
from lorry.config.schema.model import ModelConfig
from lorry.disk import receipt
from lorry.errors import ConfigError, ModelError, RunFilesError
from lorry.families.packing import find_packing
from lorry.models.causal_lm import CausalLM
from lorry.models.converter import ModelConverter
from lorry.models.layer_weights import Sharder
from lorry.models.loading.describe import read_model_json
from lorry.models.loading.load import load_model, trained_dtype
from lorry.models.loading.sources import resolve_model
from lorry.models.loading.tensor_files import (
    TensorEntry,
    read_tensor_entries,
    stored_float_dtype,
)
from lorry.models.loading.tokenizer import TOKENIZER_FILE_NAMES, load_tokenizer
from lorry.models.packed.formats import packed_format
from lorry.models.packed.reading import PackedCheckpoint
from lorry.notes import NoteCallback, ignore_note
from lorry.runs.layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    RECEIPT,
    ROUTER,
    ROUTER_FILE,
    RUN_FILE,
    is_adapter_folder,
    list_adapter_subfolders,
)
from lorry.runs.read import recorded_weights, verify_weight_file


@dataclass
class OpenedModel:
    """A model ready to use, its tokenizer (None if it has none), where the base came from, and the
    adapters attached, first one active; ``mixture``: of a directory with a router, the mix of its
    experts, which is active then."""

    model: CausalLM
    tokenizer: Any
    source: dict[str, Any]
    adapters: list[str]
    mixture: Mix | None = None


def open_model(
    config: ModelConfig,
    add_note: NoteCallback,
    *,
    adapters: Sequence[str] = (),
    as_start: bool = False,
    ranks: TensorRanks | None = None,
    shard: Sharder | None = None,
    convert: ModelConverter | None = None,
    must_share: bool = True,
) -> OpenedModel:
    """Load the base and every adapter named: that of `config.name` if it is a run,
    `config.adapter`, and ``adapters``.

    ``as_start``: they become a part of the frozen base, under every mix (`AdapterBank.move_to_base`);
    there may be one. ``ranks``: those that share the model, all of which call this together.
    ``shard``, ``convert``, ``must_share``: as in `load_model`.

    A run's own tokenizer and chat template go before those of its base. Raises ModelError if
    anything is missing, damaged or belongs to another base, ConfigError for a chat template file
    that cannot be read.
    """
    adapter_paths = [Path(p) for p in (config.adapter, *adapters) if p]
    first = next((path for path in adapter_paths[:1] if path.is_dir()), None)
    dtype = trained_dtype(first) if config.dtype == "auto" and first is not None else config.dtype
    if config.quantize == "auto":
        raise ConfigError(
            "model.quantize=auto is chosen by a run's memory_budget; give nf4, fp4, int8, or null"
        )
    loaded = load_model(
        config.name,
        revision=config.revision,
        dtype=dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        native=config.native,
        ranks=ranks,
        shard=shard,
        convert=convert,
        quantize=config.quantize,
        adapter=first,
        as_trained=not config.other_base,
        must_share=must_share,
        add_note=add_note,
    )
    paths = [loaded.source["adapter"]] if loaded.source.get("adapter") else []
    tokenizer = own_tokenizer(Path(paths[0]), add_note) if paths else None
    # a run may have added a chat template or tokens
    tokenizer = loaded.tokenizer if tokenizer is None else tokenizer
    paths += adapter_paths

    def opened(names: list[str], mixture: Mix | None = None) -> OpenedModel:
        own = _with_new_tokens(tokenizer, loaded.model, folders, add_note)
        if config.chat_template_path is not None and own is not None:
            own.chat_template = _read_template(config.chat_template_path)
        return OpenedModel(loaded.model, own, loaded.source, names, mixture)

    names: list[str] = []
    folders = [folder for p in paths for folder in list_adapter_folders(Path(p))]
    if as_start:
        if mixtures := _mixtures(paths):
            refuse_mixture(mixtures[0])
        if len(folders) > 1:
            raise ConfigError(
                f"{config.name} holds several adapters "
                f"({', '.join(f.name for f in folders)}); name the folder of one"
            )
        for folder in folders:
            load_start(loaded.model, folder, other_base=config.other_base)
        return opened([])
    # a mixture is trained by nobody once it is there: its experts hold no memory for gradients
    trainable = not _mixtures(paths)
    for path in folders:
        note_changed_adapter(path, add_note)
        name = pick_adapter_name(path, names)
        load_adapter(
            loaded.model,
            path,
            name,
            trainable=trainable,
            other_base=config.other_base,
            convert_init=config.convert_init,
        )
        names.append(name)
    if (mixture := _open_mixture(loaded.model, paths, folders, names, add_note)) is not None:
        get_bank(loaded.model).activate(mixture)
    elif names:
        # `attach` makes the sum of all active; a person who opens a run means one
        get_bank(loaded.model).activate(Mix.one(names[0]))
    return opened(names, mixture)


def note_changed_adapter(folder: Path, add_note: NoteCallback) -> None:
    """Say it where an adapter's weights are not the file that the run of this directory, or of the one
    above, wrote: somebody replaced them on purpose, or a disk lost a bit."""
    weights = folder / ADAPTER_WEIGHTS
    # one adapter lies in the run directory itself, several in a folder each
    for run in (folder, folder.parent):
        try:
            digest = recorded_weights(run, receipt.read(run / RECEIPT)).get(weights)
        except (RunFilesError, OSError) as error:
            add_note(f"what wrote {weights} is unknown: {error}")
            continue
        # a missing file is named by who loads it
        if digest is not None and weights.is_file():
            try:
                verify_weight_file(weights, digest)
            except ModelError as error:
                add_note(f"{error}; it is used as it is")


def _open_mixture(
    model: CausalLM,
    paths: Sequence[str | Path],
    folders: Sequence[Path],
    names: Sequence[str],
    add_note: NoteCallback,
) -> Mix | None:
    """The router of the one path that is a mixture's directory. Raises ModelError."""
    mixtures = _mixtures(paths)
    if not mixtures:
        return None
    if len(paths) > 1:
        raise ModelError(
            f"{mixtures[0]} is a mixture of experts, which cannot be combined with "
            "another adapter; load it alone"
        )
    mix = load_router(model, mixtures[0], dict(zip(names, folders, strict=True)), add_note)
    stack_masters(model, mix)
    return mix


def refuse_mixture(name: str | Path) -> NoReturn:
    """Raise ConfigError for a mixture of experts that a run would begin with."""
    raise ConfigError(
        f"{name} is a mixture of experts, whose router is no part of a base that other runs train on; train on what "
        f"`lorry export {name} to=hf-moe` writes (to=dense: its experts added up), or name one expert's folder"
    )


def _mixtures(paths: Sequence[str | Path]) -> list[Path]:
    """The paths that are directories of mixtures of experts. Raises ModelError for one without its
    router.json: its first expert alone is another model."""
    mixtures = [path for path in map(Path, paths) if (path / ROUTER).is_dir()]
    for path in mixtures:
        if not (path / ROUTER / ROUTER_FILE).is_file():
            raise ModelError(
                f"{path / ROUTER / ROUTER_FILE} is missing: {path} is a mixture of experts that is damaged, or was "
                "stopped while it was written; restore the file, or make the mixture again (lorry moe)"
            )
    return mixtures


def own_tokenizer(adapter: Path, add_note: NoteCallback) -> Any | None:
    """The tokenizer a run was trained with, which lies in the run directory; None where there is
    none.
    """
    folders = [adapter, *([adapter.parent] if (adapter.parent / RUN_FILE).is_file() else [])]
    tokenizer_folder = next(
        (
            folder
            for folder in folders
            if any((folder / name).is_file() for name in TOKENIZER_FILE_NAMES)
        ),
        None,
    )
    return None if tokenizer_folder is None else load_tokenizer(tokenizer_folder, add_note=add_note)


def _with_new_tokens(
    tokenizer: Any | None, model: CausalLM, folders: Sequence[Path], add_note: NoteCallback
) -> Any | None:
    """The tokenizer, or, where it lacks new tokens that an adapter brought, the one beside that adapter: the
    base's would cut them into what they were before. Raises ModelError where there is none."""
    new = grown_with(model)
    if new is None or tokenizer is None or len(tokenizer) > max(new.pieces):
        return tokenizer
    for folder in folders:
        own = own_tokenizer(folder, add_note)
        if own is not None and len(own) > max(new.pieces):
            return own
    raise ModelError(
        f"{folders[0]} has new tokens, and the base's tokenizer does not know them; put the tokenizer that it "
        "was trained with beside it"
    )


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"model.chat_template_path={path}: cannot be read ({e})") from e


def list_adapter_folders(path: Path) -> list[Path]:
    """The adapter directories a path stands for: itself, or its sub-folders that are adapters.
    Raises ModelError if none is.
    """
    if is_adapter_folder(path):
        return [path]
    folders = list_adapter_subfolders(path) if path.is_dir() else []
    if not folders:
        raise ModelError(
            f"{path} holds no adapter ({ADAPTER_CONFIG} is missing); give a run or adapter directory"
        )
    return folders


def pick_adapter_name(path: Path, used_names: Sequence[str]) -> str:
    """A name for an adapter from its folder, legal and not taken yet."""
    own = path.resolve().name
    # 56 characters, so that "-2" and the like still fit into 64
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", own)[:56].strip(".-") or "adapter"
    # a legal one as it is: a mixture's router knows its expert by it
    legal = [own] if NAME_PATTERN.fullmatch(own) else []
    return next(
        n
        for n in (*legal, base, *(f"{base}-{i}" for i in range(2, len(used_names) + 3)))
        if n not in used_names
    )


def stored_dtype(name: str) -> str:
    """The number format in which a model, or an adapter's base, lies on disk: float32, bfloat16 or
    float16.

    float32 where several are mixed, since it holds them all. Raises ModelError when there is no
    such model.
    """
    directory = resolve_model(name, add_note=ignore_note).directory
    entries: Mapping[str, TensorEntry] = read_tensor_entries(directory)
    if (stated := find_packing(read_model_json(directory / "config.json"))) is not None:
        # scales of packed matrices have formats of their own
        entries = PackedCheckpoint(packed_format(stated, str(directory))).join(entries)
    dtype = str(stored_float_dtype(entries)).removeprefix("torch.")
    return dtype if dtype in ("bfloat16", "float16") else "float32"
