"""config.json of a model: read without running any code, filled with transformers' defaults,
matched to a family or not.

A config is input from a stranger. It never switches code on: pointers to Python files, attention
kernels of the hub and trust flags are taken out at every depth before transformers sees it
(CVE-2026-4372 and its kind).

transformers is imported where it is asked: what it says of a config is kept (known/config.py), and of
a model that the native decoder runs nothing else is wanted of it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from logging import WARNING, Handler, Logger, LogRecord
from pathlib import Path
from typing import Any

from lorry.disk import documents
from lorry.errors import LorryError, ModelError, suggest_nearest
from lorry.families import ModelFamily, find_family, unsupported_fields
from lorry.families.common import UnsupportedConfigError
from lorry.families.packing import PACKING_KEYS, find_packing
from lorry.models.decoder.pointwise import ACTIVATIONS
from lorry.models.loading.config_json import decode_tagged_floats
from lorry.models.loading.known.config import KnownConfig, keep_config, recall_config
from lorry.models.packed.formats import packed_format
from lorry.models.packed.parts import PackedFormat
from lorry.notes import NoteCallback

CODE_KEYS = frozenset(
    {
        "auto_map",
        "trust_remote_code",
        "custom_pipelines",
        "custom_generate",
        "use_kernels",
        "kernel_config",
    }
)
KERNEL_KEYS = frozenset(
    f"{prefix}{kind}_implementation{suffix}"
    for prefix in ("", "_")
    for kind in ("attn", "experts")
    for suffix in ("", "_internal", "_autoset")
)
BUILT_IN_KERNELS = (
    None,
    True,
    False,
    "eager",
    "sdpa",
    "flash_attention_2",
    "flex_attention",
    "grouped_mm",
    "batched_mm",
)
# What transformers raises over numbers and names that make no sense.
UNUSABLE_FILE_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    OSError,
    ImportError,
    RuntimeError,
)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# a hostile number would build modules until memory ends
MAX_LAYERS = 10_000
MAX_MESSAGE_CHARS = 300  # characters of one warning of transformers
# padding stands on the right of a model that sees no later token
HARMLESS_WARNINGS = ("`attention_mask` was passed, but it is unused",)


@dataclass(frozen=True)
class ModelDescription:
    """config: a plain dict, complete; build_hf: makes transformers' object for the same; family: None
    when only transformers can run it, for the reason in ``why``; packed_as: how its matrices are
    packed, None where they are whole."""

    config: dict[str, Any]
    build_hf: Callable[[], Any]
    family: ModelFamily | None
    why: str = ""
    packed_as: PackedFormat | None = None


def describe_model(
    directory: Path,
    *,
    trust_remote_code: bool = False,
    native: bool = True,
    packed: bool = False,
    add_note: NoteCallback,
) -> ModelDescription:
    """Read ``directory/config.json``. ``packed``: whether matrices that are packed already will do.
    Raises ModelError when it is unusable, packed in a way that cannot be read, or wants code that was
    not allowed.
    """
    path = directory / "config.json"
    raw, removed = strip_code_keys(decode_tagged_floats(read_model_json(path)))
    packed_as = None
    if (stated := find_packing(raw)) is not None:
        packed_as = packed_format(stated, str(path))
        if not packed:
            raise ModelError(
                f"{path}: its matrices are packed ({packed_as.quantization.name}), and this needs them whole; give "
                "the unquantised checkpoint"
            )
        raw = {key: value for key, value in raw.items() if key not in PACKING_KEYS}
    # safetensors readers other than transformers ignore the field: two libraries, two models
    if raw.get("transformers_weights") not in (None, *WEIGHTS):
        raise ModelError(
            f"{path}: transformers_weights={raw['transformers_weights']!r} names "
            f"another weights file than {WEIGHTS[0]}, which only transformers would "
            "read: rename that file and remove the field"
        )
    pointers = raw.get("auto_map") or removed.get("auto_map")
    for key in removed:
        add_note(f"ignored {key} of {path.name}: a config cannot choose the code that runs")
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(f"{path}: no model_type; this is not the config of a transformers model")
    if pointers and trust_remote_code:
        add_note(f"trust_remote_code=true: Python code from {directory} runs in this process")
        from transformers import AutoConfig

        own = AutoConfig.from_pretrained(
            str(directory), trust_remote_code=True, local_files_only=True
        )
        return ModelDescription(
            own.to_dict(), lambda: own, None, "its code is part of the checkpoint", packed_as
        )
    build_hf = cache(partial(build_hf_config, kind, raw, path))
    known = recall_config(raw)
    # a Lorry that had no family of this kind kept no defaults to compare with
    if known is None or (not known.defaults and find_family(kind) is not None):
        _expect_known_kind(kind, path, needs_code=bool(pointers))
        known = _ask_transformers(kind, raw, build_hf)
    config = known.config
    family, why = match_family(config, known.defaults, path) if native else (None, "native=False")
    if family is None:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ModelError(f"{path}: model_type {kind!r} is not a causal language model")
    return ModelDescription(config, build_hf, family, why, packed_as)


def _expect_known_kind(kind: str, path: Path, *, needs_code: bool) -> None:
    """Raises ModelError for a model_type that transformers has no class of."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if kind in CONFIG_MAPPING:
        return
    if needs_code:
        raise ModelError(
            f"{path}: model_type {kind!r} needs Python code from the checkpoint; read that code, and if you trust it set "
            "trust_remote_code=true"
        )
    raise ModelError(
        f"{path}: transformers knows no model_type {kind!r}{suggest_nearest(kind, CONFIG_MAPPING)}"
    )


def _ask_transformers(
    kind: str, raw: Mapping[str, Any], build_hf: Callable[[], Any]
) -> KnownConfig:
    """What transformers makes of a config, which is kept, with the defaults of a kind that has a family.
    Raises ModelError."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with hear_transformers() as warnings:
        hf = build_hf()
        # transformers' defaults filled in, without the path of this machine
        config = {k: v for k, v in hf.to_dict().items() if k != "_name_or_path"}
        has_family = find_family(kind) is not None
        known = KnownConfig(config, CONFIG_MAPPING[kind]().to_dict() if has_family else {})
    if not warnings:
        keep_config(raw, hf, known)
    return known


def match_family(
    config: Mapping[str, Any], defaults: Mapping[str, Any], path: Path
) -> tuple[ModelFamily | None, str]:
    """The family whose decoder computes exactly this config, or None and the reason."""
    family = find_family(config["model_type"])
    if family is None:
        return None, f"Lorry's decoder has no family for model_type {config['model_type']!r}"
    try:
        if odd := unsupported_fields(family, config, defaults):
            return None, f"Lorry's decoder does not support {', '.join(odd)}"
        geometry = family.geometry(config)
    except UnsupportedConfigError as e:
        return None, f"Lorry's decoder does not support {e}"
    except (ValueError, TypeError, LookupError, ArithmeticError) as e:
        raise ModelError(f"{path}: unusable numbers ({type(e).__name__}: {e})") from e
    if geometry.activation not in ACTIVATIONS:
        return None, f"Lorry's decoder has no activation {geometry.activation!r}"
    return family, ""


def read_model_json(path: Path) -> dict[str, Any]:
    """A JSON object that describes a model. Raises ModelError with file and line; what is refused:
    disk/documents.py. Raises DiskError where it cannot be read.

    transformers writes infinities as JSON has none, and 10^30 for a tokenizer without a longest
    text.
    """
    absent = "does not exist; a model directory has config.json and model.safetensors"
    return documents.read_object(
        path, error=ModelError, nonfinite=True, largest=10**40, absent=absent
    )


def strip_code_keys(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config without anything that could choose code, what was taken out and is worth telling), at
    every depth.
    """
    plain_config: dict[str, Any] = {}
    removed: dict[str, Any] = {}
    for key, value in config.items():
        if key in CODE_KEYS or (
            key in KERNEL_KEYS
            and not (isinstance(value, (str, bool, type(None))) and value in BUILT_IN_KERNELS)
        ):
            removed[key] = value
        elif key in KERNEL_KEYS:
            continue  # transformers' own name for its own code: ours to choose, nothing to tell
        elif isinstance(value, dict):
            plain_config[key], inner = strip_code_keys(value)
            removed.update({f"{key}.{name}": code for name, code in inner.items()})
        else:
            plain_config[key] = value
    return plain_config, removed


def has_packed_matrices(directory: Path) -> bool:
    """Whether a model's files hold its matrices packed. Raises ModelError for a config.json that cannot
    be read."""
    return find_packing(read_model_json(directory / "config.json")) is not None


@contextmanager
def model_file_errors(what: str) -> Iterator[None]:
    """Turn what transformers and tokenizers raise over a file they cannot use into a ModelError
    that opens with ``what``.
    """
    try:
        yield
    except LorryError:
        raise
    except Exception as e:
        # imported here: it takes the client of the hub along
        from huggingface_hub.errors import StrictDataclassError

        # tokenizers raises bare Exception; anything else that is not in the list is no fault of the
        # file
        if type(e) is not Exception and not isinstance(
            e, (*UNUSABLE_FILE_ERRORS, StrictDataclassError)
        ):
            raise
        raise ModelError(f"{what} ({type(e).__name__}: {e})") from e


@contextmanager
def silence_transformers(messages: list[str] | None = None) -> Iterator[None]:
    """Keep transformers' progress bars and tables off the terminal.

    ``messages`` collects its warnings, each once, on one line: they are how it tells that a model
    will not do what its name says (a BERT without is_decoder).
    """
    from transformers.utils import logging

    logger = logging.get_logger("transformers")
    before, handlers = logging.get_verbosity(), logger.handlers
    heard = _MessageCollector()
    if messages is None:
        logging.set_verbosity_error()  # an error of its own still reaches the terminal
    else:
        # replaced, not added: the terminal must not see it twice
        logger.handlers = [heard]
        logging.set_verbosity_warning()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.handlers = handlers
        logging.set_verbosity(before)
        if messages is not None:
            messages += [text for text in heard.texts if not text.startswith(HARMLESS_WARNINGS)]


@contextmanager
def hear_transformers() -> Iterator[Collection[str]]:
    """The warnings that transformers gives meanwhile, on the terminal as ever: also those that it is told
    to keep to itself (TRANSFORMERS_VERBOSITY), which stay off it."""
    from transformers.utils import logging

    logger, heard = logging.get_logger("transformers"), _MessageCollector()
    level, others = logger.level, _handlers_of(logger)
    levels = [handler.level for handler in others]
    if logger.getEffectiveLevel() > WARNING:
        for handler in others:
            handler.setLevel(max(handler.level, logger.getEffectiveLevel()))
        logger.setLevel(WARNING)
    logger.addHandler(heard)
    try:
        yield heard.texts
    finally:
        logger.removeHandler(heard)
        logger.setLevel(level)
        for handler, before in zip(others, levels, strict=True):
            handler.setLevel(before)


def _handlers_of(logger: Logger) -> list[Handler]:
    """All that a logger's records reach."""
    found, each = list(logger.handlers), logger
    while each.propagate and each.parent is not None:
        each = each.parent
        found += each.handlers
    return found


class _MessageCollector(Handler):
    """Keeps each message once, on one line, cut where it becomes a page."""

    def __init__(self) -> None:
        super().__init__(WARNING)
        self.texts: dict[str, None] = {}

    def emit(self, record: LogRecord) -> None:
        self.texts[" ".join(record.getMessage().split())[:MAX_MESSAGE_CHARS]] = None


def build_hf_config(kind: str, raw: dict[str, Any], path: Path) -> Any:
    """transformers' config object from a dict: no file is read again and no code is looked up."""
    layers = raw.get("num_hidden_layers", raw.get("n_layer", 1))
    if not isinstance(layers, int) or not 0 < layers <= MAX_LAYERS:
        raise ModelError(
            f"{path}: {layers!r} layers; a whole number from 1 to {MAX_LAYERS} is expected"
        )
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # a copy: rotary settings are filled in where they lie, and what is kept goes by the config as it was
    with model_file_errors(f"{path}: transformers refuses this config"):
        return CONFIG_MAPPING[kind].from_dict(deepcopy(raw))
