"""What a run was made of, and the front matter of its card: the metadata that the hub reads.

Try: ``front_matter(read(run_dir), licences={}, hubs={})``. Fields are those of
https://huggingface.co/docs/hub/model-cards; one that the run does not know (a base that is no hub
id, a licence nobody told) is absent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorry.data.catalog import NamedSet, shipped_catalog
from lorry.errors import ConfigError
from lorry.train.card.facts import RunFacts, metric_changes
from lorry.train.card.markdown import EMPTY_CELL, clean_line

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
DATA_FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".gguf")
EMBEDDED_LICENCES = MappingProxyType({"smollm2-135m-instruct": "apache-2.0"})  # as its wheel says
# identifiers that the hub takes for `license`; it refuses a card with another
HUB_LICENCES = frozenset(
    {
        "apache-2.0",
        "mit",
        "bsd-3-clause",
        "cc0-1.0",
        "cc-by-2.0",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0",
        "odc-by",
        "odbl",
        "openrail",
        "gpl-3.0",
    }
)
LicenceNames = Mapping[str, str]


def front_matter(facts: RunFacts, licences: LicenceNames, hubs: LicenceNames) -> dict[str, Any]:
    """The card's metadata; what is not known is absent."""
    ids = facts.datasets
    if ids is None:
        ids = [s for s in data_sources(facts) if is_hub_id(s)] + [
            hubs[s] for s in named_set_names(facts) if s in hubs and s not in local_set_names(facts)
        ]
    found: dict[str, Any] = {
        "base_model": base_id(facts),
        "library_name": "peft" if facts.config.get("lora") else "transformers",
        "license": _common_licence(facts, licences),
        "datasets": list(dict.fromkeys(ids)),
        "tags": [
            "lorry",
            *(["lora"] if facts.config.get("lora") else []),
            clean_line(facts.config.get("task", "sft")),
        ],
        "pipeline_tag": "text-generation",
        "model-index": _model_index(facts, hubs),
    }
    return {key: value for key, value in found.items() if value}


def _model_index(facts: RunFacts, hubs: LicenceNames) -> list[dict[str, Any]]:
    measured = []
    for name, values in metric_changes(facts).items():
        metrics = [
            {"type": _metadata_slug(m), "name": clean_line(m), "value": v.after}
            for m, v in values.items()
            if v.after is not None
        ]
        if metrics:
            data = {
                "type": hubs.get(name) or _metadata_slug(public_path(name)),
                "name": clean_line(public_path(name)) or EMPTY_CELL,
            }
            measured.append(
                {"task": {"type": "text-generation"}, "dataset": data, "metrics": metrics}
            )
    return [{"name": clean_line(facts.name) or EMPTY_CELL, "results": measured}] if measured else []


def _metadata_slug(name: str) -> str:
    return re.sub(r"[^a-z0-9._/-]+", "-", clean_line(name).lower()).strip("-") or "unnamed"


def base_id(facts: RunFacts) -> str | None:
    """The base's hub id, if it was read from there."""
    base = facts.receipt.get("base") or {}
    return (
        clean_line(base["name"])
        if base.get("kind") == "hub" and not base.get("adapter") and base.get("name")
        else None
    )


def _common_licence(facts: RunFacts, licences: LicenceNames) -> str | None:
    """The one licence of everything the run was made of, if all of it is known and the hub knows
    the name.
    """
    found = {
        licences.get(name, "").lower()
        for name in [
            *data_sources(facts),
            *named_set_names(facts),
            *teacher_names(facts),
            public_base_name(facts),
        ]
    }
    return next(iter(found)) if len(found) == 1 and found <= HUB_LICENCES else None


# --- what it was made of


def data_sources(facts: RunFacts) -> list[str]:
    """Paths and hub ids of the rows, each once."""
    paths = [facts.group("data", name).get("path") for name in facts.names]
    return list(
        dict.fromkeys(
            str(p) for one in paths for p in (one if isinstance(one, list) else [one]) if p
        )
    )


def named_set_names(facts: RunFacts) -> list[str]:
    """The named sets of a mixture, each once, suites spelt out."""
    mixed = dict.fromkeys(
        str(s) for name in facts.names for s in facts.group("data", name).get("mix") or []
    )
    return list(
        dict.fromkeys(
            one
            for name in mixed
            for one in shipped_catalog().suites.get(name) or [_catalogue_name(name)]
        )
    )


def _catalogue_name(name: str) -> str:
    """A set's name in the catalogue, from any spelling; a name that it does not have as it is."""
    try:
        return shipped_catalog().find_set(name).name
    except ConfigError:
        return name


def catalogue_entries(facts: RunFacts) -> dict[str, NamedSet]:
    """What the catalogue knows of the sets of a mixture, and of the hub data sets, by the names
    they have in the run.
    """
    found = {
        name: _catalogue_name(name)
        for name in [*named_set_names(facts), *(s for s in data_sources(facts) if is_hub_id(s))]
    }
    sets = shipped_catalog().sets
    return {name: sets[known] for name, known in found.items() if known in sets}


def local_set_names(facts: RunFacts) -> set[str]:
    """Named sets that were read from a file: it may hold anything."""
    return {
        _catalogue_name(k.split(".")[0])
        for name in facts.names
        for k in facts.group("data", name).get("local") or {}
    }


def is_hub_id(source: str) -> bool:
    return (
        bool(HUB_ID.fullmatch(source))
        and not source.lower().endswith(DATA_FILE_SUFFIXES)
        and not Path(source).exists()
    )


def public_base_name(facts: RunFacts) -> str:
    """The base as it may be shown: a hub id, an embedded name, or the last part of a path."""
    return public_path(
        (facts.config.get("model") or {}).get("name")
        or (facts.receipt.get("base") or {}).get("name")
        or EMPTY_CELL
    )


def teacher_names(facts: RunFacts) -> list[str]:
    """Who was distilled from: a model, an adapter of one, or both."""
    distil = facts.config.get("distill") or {}
    return list(
        dict.fromkeys(str(distil[key]) for key in ("teacher", "teacher_adapter") if distil.get(key))
    )


def public_path(place: object) -> str:
    """A path without the directories of this machine; a hub id or a relative path as it is."""
    text = str(place)
    return Path(text).name if text.startswith(("/", "~")) else text


def private_directories(facts: RunFacts) -> list[str]:
    """Directories of this machine that messages of the run may name, longest first."""
    base, model = facts.receipt.get("base") or {}, facts.config.get("model") or {}
    local = [
        path
        for name in facts.names
        for path in (facts.group("data", name).get("local") or {}).values()
    ]
    evaluated = [facts.group("data", name).get("eval") for name in facts.names]
    places = [
        *data_sources(facts),
        *local,
        *evaluated,
        model.get("name"),
        base.get("path"),
        facts.config.get("output_dir"),
    ]
    folders = {f"{Path(str(p)).parent}/" for p in places if p and str(p).startswith("/")}
    return sorted(folders - {"/", "//"}, key=len, reverse=True)


def strip_directories(text: object, hide: list[str]) -> str:
    """A message of the run without the directories that `private_directories` found."""
    said = str(text)
    for folder in hide:
        said = said.replace(folder, "")
    return said
