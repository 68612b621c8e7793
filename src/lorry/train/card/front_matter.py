"""What a run was made of, and the front matter of its card: the metadata that the hub reads, as
huggingface_hub's own `ModelCardData` and `EvalResult`, which know its fields and their order.

    card_metadata(run, licences={}, sets={}).to_yaml()

A field that the run does not know (a base that is no hub id, a licence nobody told) is absent.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorry.data.catalog import NamedSet, shipped_catalog
from lorry.data.reading.suite_splits import is_split_name, locate_split
from lorry.disk import receipt
from lorry.errors import ConfigError
from lorry.runs.read import RunRecord
from lorry.train.card.facts import metric_changes
from lorry.train.card.markdown import EMPTY_CELL, clean_line

_ORIGIN = ("path", "sha256")  # of an adapter that others were trained over
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
if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

LicenceNames = Mapping[str, str]
NamedSets = Mapping[str, NamedSet]


def card_metadata(
    run: RunRecord, licences: LicenceNames, sets: NamedSets, datasets: list[str] | None = None
) -> ModelCardData:
    """The card's metadata, in huggingface_hub's order of fields; what is not known is absent.
    ``datasets``: hub ids among the sources where an earlier card has them, None: looked for here.
    """
    # imported here: a card is written at the end of a run
    from huggingface_hub import ModelCardData

    if datasets is None:
        local = local_set_names(run)
        named = [s for s in named_set_names(run) if s in sets and s not in local]
        hubs = [sets[s].hub for s in named]
        sources = [split_hub_id(run, s) or s for s in data_sources(run)]
        datasets = [s for s in sources if is_hub_id(s)] + [hub for hub in hubs if hub]
    lora = bool(run.config.get("lora"))
    results = _eval_results(run, sets)
    return ModelCardData(
        base_model=base_id(run),
        library_name=library_of(run),
        license=_common_licence(run, licences),
        datasets=list(dict.fromkeys(datasets)) or None,
        tags=["lorry", *(["lora"] if lora else []), clean_line(run.config.get("task", "sft"))],
        pipeline_tag="text-generation",
        # of an empty list the library makes an index without results, which the hub refuses
        model_name=clean_line(run.name) or EMPTY_CELL if results else None,
        eval_results=results or None,
    )


def _eval_results(run: RunRecord, sets: NamedSets) -> list[EvalResult]:
    """A result for each metric that was measured after training."""
    from huggingface_hub import EvalResult

    changes = metric_changes(run)
    kinds = {
        name: sets[name].hub
        if name in sets and sets[name].hub
        else _metadata_slug(public_path(name))
        for name in changes
    }
    shared = {kind for kind, count in Counter(kinds.values()).items() if count > 1}
    results: list[EvalResult] = []
    identifiers = set[tuple[str | None, str | None]]()
    for name, metrics in changes.items():
        # The library puts results of one (type, config) under the name of the first of them:
        # rounds of ANLI, or two files called test.jsonl, would all be the first one's.
        config, number = None, 1
        if kinds[name] in shared:
            own = (sets[name].config if name in sets else None) or _metadata_slug(name)
            config = own
            while (kinds[name], config) in identifiers:
                number += 1
                config = f"{_metadata_slug(name)}-{number}"
        identifiers.add((kinds[name], config))
        results += [
            EvalResult(
                task_type="text-generation",
                dataset_type=kinds[name],
                dataset_config=config,
                dataset_name=clean_line(public_path(name)) or EMPTY_CELL,
                metric_type=_metadata_slug(metric),
                metric_name=clean_line(metric),
                metric_value=change.after,
            )
            for metric, change in metrics.items()
            if change.after is not None
        ]
    return results


def _metadata_slug(name: str) -> str:
    return re.sub(r"[^a-z0-9._/-]+", "-", clean_line(name).lower()).strip("-") or "unnamed"


def base_id(run: RunRecord) -> str | None:
    """The base's hub id, if it was read from there."""
    base = (run.receipt or {}).get("base") or {}
    return (
        clean_line(base["name"])
        if base.get("kind") == "hub" and not base.get("adapter") and base.get("name")
        else None
    )


def _common_licence(run: RunRecord, licences: LicenceNames) -> str | None:
    """The one licence of everything the run was made of, if all of it is known and the hub knows
    the name.
    """
    licences_found = {
        licences.get(name, "").lower()
        for name in [
            *data_sources(run),
            *named_set_names(run),
            *teacher_names(run),
            public_base_name(run),
        ]
    }
    return (
        next(iter(licences_found))
        if len(licences_found) == 1 and licences_found <= HUB_LICENCES
        else None
    )


# --- what it was made of


@dataclass(frozen=True)
class CardRowSet:
    """A set of rows that an adapter was made of. ``role``: what it was for, "" where there is one
    set alone; ``sources``: paths, hub ids and names; ``facts``: its part of the receipt.
    """

    role: str
    sources: tuple[str, ...]
    facts: Mapping[str, Any]


def experts_of(run: RunRecord) -> dict[str, Mapping[str, Any]]:
    """{expert: its data settings} of a mixture's run; empty for any other."""
    listed = run.config.get("experts")
    experts = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    return {
        str(one.get("name")): data if isinstance(data := one.get("data"), dict) else {}
        for one in experts
    }


def row_sets_of(run: RunRecord, job: str | None) -> list[CardRowSet]:
    """Every set of rows that one adapter was made of, in the order they are described in; of a
    mixture those of each expert."""
    data = receipt.part(run.receipt, "data")
    facts = data if job is None else receipt.part(data, job)
    if experts := experts_of(run):
        first = next(iter(experts))
        return [
            CardRowSet(
                name,
                _as_sources(settings.get("path")),
                facts if name == first else receipt.part(facts, name),
            )
            for name, settings in experts.items()
        ]
    own, paths = run.settings_group("unlearn", job), run.settings_group("data", job).get("path")
    if not own:
        return [CardRowSet("", _as_sources(paths), facts)]
    sets = [CardRowSet("forget", _as_sources(own.get("forget") or paths), facts)]
    if own.get("retain"):
        sets.append(CardRowSet("retain", _as_sources(own["retain"]), receipt.part(facts, "retain")))
    for role in ("forget", "retain"):
        kind = next((k for k in ("alternates", "idk") if own.get(k)), "refusals")
        other = receipt.part(facts, f"{role} alternates")
        # a receipt of an earlier version has no such part, and the file was read all the same
        if other or (role == "forget" and own.get(kind)):
            sources = _as_sources(own.get(kind)) or ("Lorry's own refusals",)
            # the rows are the questions', and what they were read from is told in its own line
            counted = {k: v for k, v in other.items() if k not in ("source", "rows", "left_out")}
            name = kind if role == "forget" else f"{kind} for rows to retain"
            sets.append(CardRowSet(name, sources, counted))
    return sets


def _as_sources(value: Any) -> tuple[str, ...]:
    return tuple(
        str(source) for source in (value if isinstance(value, list) else [value]) if source
    )


def data_sources(run: RunRecord) -> list[str]:
    """Paths, hub ids and names of the rows of every set, each once."""
    return list(
        dict.fromkeys(
            source
            for name in run.job_names
            for rows in row_sets_of(run, name)
            for source in rows.sources
            if not rows.role.startswith("refusals")  # those are no file
        )
    )


def split_hub_id(run: RunRecord, source: str) -> str | None:
    """The hub data set that the rows of a benchmark's split (``tofu:forget05``) were read from;
    None for any other source, and where they were read from a folder.
    """
    local = {k for n in run.job_names for k in run.settings_group("data", n).get("local") or {}}
    if not is_split_name(source) or source.partition(":")[0] in {k.split(".")[0] for k in local}:
        return None
    try:
        return locate_split(source, {}).path
    except ConfigError:  # one that the hub has not
        return None


def named_set_names(run: RunRecord) -> list[str]:
    """The named sets of a mixture, each once, suites spelt out."""
    of_experts = experts_of(run).values()
    described = of_experts or [run.settings_group("data", name) for name in run.job_names]
    mixed = dict.fromkeys(str(s) for data in described for s in data.get("mix") or [])
    return list(
        dict.fromkeys(
            set_name
            for name in mixed
            for set_name in shipped_catalog().suites.get(name) or [_catalogue_name(name)]
        )
    )


def _catalogue_name(name: str) -> str:
    """A set's name in the catalogue, from any spelling; a name that it does not have as it is."""
    try:
        return shipped_catalog().find_set(name).name
    except ConfigError:
        return name


def catalogue_entries(run: RunRecord) -> dict[str, NamedSet]:
    """What the catalogue knows of the sets of a mixture, and of the hub data sets, by the names
    they have in the run.
    """
    set_names = {name: _catalogue_name(name) for name in named_set_names(run)}
    for source in data_sources(run):
        if is_hub_id(hub := split_hub_id(run, source) or source):
            set_names[source] = _catalogue_name(hub)
    sets = shipped_catalog().sets
    return {name: sets[known] for name, known in set_names.items() if known in sets}


def local_set_names(run: RunRecord) -> set[str]:
    """Named sets that were read from a file: it may hold anything."""
    return {
        _catalogue_name(k.split(".")[0])
        for name in run.job_names
        for k in run.settings_group("data", name).get("local") or {}
    }


def is_hub_id(source: str) -> bool:
    return (
        bool(HUB_ID.fullmatch(source))
        and not source.lower().endswith(DATA_FILE_SUFFIXES)
        and not Path(source).exists()
    )


def public_base_name(run: RunRecord) -> str:
    """The base as it may be shown: a hub id, an embedded name, or the last part of a path."""
    return public_path(
        (run.settings_group("model")).get("name")
        or ((run.receipt or {}).get("base") or {}).get("name")
        or EMPTY_CELL
    )


def start_of(run: RunRecord) -> dict[str, str]:
    """path and sha256 of the adapter that a run's were trained over; empty where there is none."""
    start = ((run.receipt or {}).get("base") or {}).get("start")
    if not isinstance(start, dict) or not all(isinstance(start.get(k), str) for k in _ORIGIN):
        return {}
    return {key: start[key] for key in _ORIGIN}


def library_of(run: RunRecord) -> str:
    """Who opens what the run wrote. PEFT knows no adapter over another (`lorry export` makes one),
    and no router over several."""
    if experts_of(run):
        return "lorry"
    if not run.config.get("lora"):
        return "transformers"
    return "lorry" if start_of(run) else "peft"


def teacher_names(run: RunRecord) -> list[str]:
    """Who was distilled from: a model, an adapter of one, or both."""
    distil = run.settings_group("distill")
    return list(
        dict.fromkeys(str(distil[key]) for key in ("teacher", "teacher_adapter") if distil.get(key))
    )


def public_path(place: object) -> str:
    """A path without the directories of this machine; a hub id or a relative path as it is."""
    text = str(place)
    return Path(text).name if text.startswith(("/", "~")) else text


def private_directories(run: RunRecord) -> list[str]:
    """Directories of this machine that messages of the run may name, longest first."""
    base, model = (run.receipt or {}).get("base") or {}, run.settings_group("model")
    local = [
        path
        for name in run.job_names
        for path in (run.settings_group("data", name).get("local") or {}).values()
    ]
    evaluated = [run.settings_group("data", name).get("eval") for name in run.job_names]
    places = [
        *data_sources(run),
        *local,
        *evaluated,
        model.get("name"),
        base.get("path"),
        start_of(run).get("path"),
        run.config.get("output_dir"),
    ]
    folders = {f"{Path(str(p)).parent}/" for p in places if p and str(p).startswith("/")}
    return sorted(folders - {"/", "//"}, key=len, reverse=True)


def strip_directories(text: object, hide: list[str]) -> str:
    """A message of the run without the directories that `private_directories` found."""
    message = str(text)
    for folder in hide:
        message = message.replace(folder, "")
    return message
