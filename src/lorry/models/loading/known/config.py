"""A config.json as transformers fills it in, with its defaults for the kind of model: kept in the user's
cache, so that a run need not import transformers, seconds of its start, to hear the same again.

    known = recall_config(raw)
    if known is None:                       # never asked, or transformers is imported already
        hf = build_hf_config(kind, raw, path)
        known = KnownConfig(hf.to_dict(), CONFIG_MAPPING[kind]().to_dict())
        keep_config(raw, hf, known)

An answer is named by a digest of the config and of the versions of the libraries that gave it. Only of
a config that transformers took without a warning is one kept: what it refuses or warns of it is asked
again, and says again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from lorry.disk.home import lorry_home
from lorry.disk.kept import KeptAnswers
from lorry.models.loading import known as known_files

MOST_CONFIGS = 300  # kept, each of a few kilobytes
LARGEST_CONFIG = 1 << 18  # bytes; of thousands of labels there are more, and transformers is asked
# torch: a config's dtype is looked up there
KEYED_LIBRARIES = ("transformers", "huggingface_hub", "torch")


@dataclass(frozen=True)
class KnownConfig:
    """config: complete, as plain values; defaults: those of its model_type, {} where nobody asks."""

    config: dict[str, Any]
    defaults: dict[str, Any]


def recall_config(raw: Mapping[str, Any]) -> KnownConfig | None:
    """What transformers made of this config; None where it has to be asked. In a process that has
    imported it already, that is cheap, and a class may have been registered there."""
    if known_files.transformers_is_imported():
        return None
    text = _kept_configs().read(_digest(raw))
    return None if text is None else _parse(text)


def keep_config(raw: Mapping[str, Any], hf: Any, known: KnownConfig) -> None:
    """Keep what transformers made of a config, ``hf``, for later processes; nothing where that is a class
    of somebody else's, or would come back as other values."""
    text = ascii((known.config, known.defaults))
    kept, digest = _kept_configs(), _digest(raw)
    # a process that has imported transformers asks it each time, and hears what is kept already
    if (
        type(hf).__module__.startswith("transformers.models.")
        and _parse(text) == known
        and kept.read(digest) != text
    ):
        kept.save(digest, text)


def _parse(text: str) -> KnownConfig | None:
    match known_files.parse_values(text):
        case (dict() as config, dict() as defaults):
            # 1, 1.0 and True are equal, and not the same
            return KnownConfig(config, defaults) if ascii((config, defaults)) == text else None
    return None


def _digest(raw: Mapping[str, Any]) -> str:
    parts = [json.dumps(raw), *(f"{name} {version(name)}" for name in KEYED_LIBRARIES)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _kept_configs() -> KeptAnswers:
    return KeptAnswers(lorry_home() / "configs", MOST_CONFIGS, LARGEST_CONFIG)
