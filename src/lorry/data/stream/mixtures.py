"""Mixtures of named sets: read and encoded set by set and laid end to end; `mixing.py` says in what
order they are read.

mixed = read_mix(data, encoder, seed=0, quarantine=None)
mixed.report.lines()     # counts, token statistics and truncation, set by set
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lorry.config.data import DataConfig
from lorry.data.catalog import NamedSet, open_catalog
from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.encoding.token_set import TokenSet, encode_rows, report_progress
from lorry.data.reading.formats import DataExample
from lorry.data.reading.places import (
    SPLIT_ORDER,
    DataLocation,
    DataLocations,
    read_items,
    refuse_leak,
)
from lorry.errors import ConfigError, DataError


def mixture_sets(data: DataConfig) -> list[str]:
    """The sets of ``data.mix``, suites spelt out. Raises ConfigError for an unknown one, or one
    named twice.
    """
    catalog = open_catalog(data.catalog)
    # by the catalogue's spelling, in which two words may be one set
    names = [catalog.find_set(name).name for name in data.mix if name not in catalog.suites]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"data.mix names {twice[0]!r} twice, in two spellings; to read a set "
            "more often, raise its share in data.weights"
        )
    return catalog.expand_suites(data.mix)


def _open_locations(data: DataConfig) -> DataLocations:
    return DataLocations(data.local, catalog=open_catalog(data.catalog))


def training_locations(data: DataConfig) -> list[DataLocation]:
    """Where the training rows are, of a mixture or of ``data.path``."""
    if data.mix:
        places = _open_locations(data)
        return [places.of(places.catalog.find_set(name), data.split) for name in mixture_sets(data)]
    paths = [data.path] if isinstance(data.path, str) else data.path or []
    return [DataLocation.of(path, data.name, data.split) for path in paths]


def read_mix(
    data: DataConfig, encoder: ExampleEncoder, *, seed: int, quarantine: Path | None
) -> list[TokenSet]:
    """The training rows of every set in ``data.mix``. Raises ConfigError (an unknown set or
    template, the rows to evaluate on being rows to learn), DataError (a missing file, a bad row, a
    set without a usable row).
    """
    # all of a run's sets are looked up in the one catalogue that it names
    places, locations = _open_locations(data), training_locations(data)
    sets = [places.catalog.find_set(name) for name in mixture_sets(data)]
    # before anything is read: reading may take minutes
    if data.eval is not None and any(
        DataLocation.of(data.eval, None, data.eval_split or data.split).overlaps(location)
        for location in locations
    ):
        raise ConfigError(
            f"data.eval={data.eval}: these are the training rows; name others, or "
            "give data.test_size=N to hold rows out"
        )
    for named_set in sets:
        if data.template is not None:
            named_set.refuse_template(data.template, "data.template")
        if data.eval_split is not None and (
            data.eval_split not in SPLIT_ORDER or places.has(named_set, data.eval_split)
        ):
            refuse_leak(
                locations,
                places,
                named_set,
                data.eval_split,
                "data.test_size=N instead of data.eval_split",
            )
    return [
        _read_set(
            places, named_set, data, data.split, data.n, data.template, encoder, seed, quarantine
        )
        for named_set in sets
    ]


def read_held_out(
    data: DataConfig, encoder: ExampleEncoder, *, seed: int, quarantine: Path | None
) -> list[TokenSet]:
    """The rows of ``data.eval_split`` of every set that has one, in the plain template."""
    split = data.eval_split
    if split is None:
        return []
    places = _open_locations(data)
    sets = [places.catalog.find_set(name) for name in mixture_sets(data)]
    held_out = [named_set for named_set in sets if places.has(named_set, split)]
    if not held_out:
        raise DataError(
            f"data.eval_split={split}: none of {', '.join(mixture_sets(data))} has such a split"
        )
    return [
        _read_set(
            places,
            named_set,
            data,
            split,
            data.eval_n,
            # 0, the plain one, where training draws: a held-out loss must not hang on the draw
            data.template or 0,
            encoder,
            seed,
            quarantine,
        )
        for named_set in held_out
    ]


def _read_set(
    places: DataLocations,
    named_set: NamedSet,
    data: DataConfig,
    split: str,
    limit: int | None,
    template: int | None,
    encoder: ExampleEncoder,
    seed: int,
    quarantine: Path | None,
) -> TokenSet:
    # rows that are skipped are counted, not kept
    quarantine_file = quarantine if data.on_bad_row == "quarantine" else None
    source = places.open(
        named_set, split, limit=limit, on_bad_row=data.on_bad_row, quarantine=quarantine_file
    )
    # counted while rows are read, which happens inside of encode_rows
    shortened = 0

    def examples() -> Iterator[DataExample]:
        nonlocal shortened
        for numbered in read_items(named_set, source, template=template, seed=seed):
            shortened += numbered.item.shortened
            yield numbered.example

    token_set = TokenSet.of(
        report_progress(encode_rows(examples(), source, encoder), named_set.name, encoder.tell),
        source,
        encoder,
        role=named_set.name,
    )
    if not len(token_set):
        raise DataError(
            f"{named_set.name} ({source.label}): no usable row; {source.bad.summary() or 'the set is empty'}"
        )
    if shortened:
        token_set.report.notes.append(
            f"{shortened} contexts were shortened to the limit of {named_set.name}"
        )
    token_set.report.source = f"{named_set.name} ({source.label})"
    return token_set


def mixture_shares(data: DataConfig) -> tuple[float, ...] | None:
    """The shares in the order of the mix; of a suite each of its sets has the suite's. Raises
    ConfigError for weights that do not fit the sets."""
    names = mixture_sets(data)
    if data.weights is None:
        return None
    # in the order of the mix, suites spelt out
    if not isinstance(data.weights, dict):
        if len(data.weights) != len(names):
            raise ConfigError(
                f"data.weights has {len(data.weights)} numbers for {len(names)} "
                f"sets: {', '.join(names)}"
            )
        return tuple(data.weights)
    catalog = open_catalog(data.catalog)
    weights = {
        name: share for key, share in data.weights.items() for name in catalog.expand_suites(key)
    }
    if odd := [name for name in weights if name not in names]:
        raise ConfigError(
            f"data.weights names {odd[0]!r}, which is not in data.mix ({', '.join(names)})"
        )
    # a set without a weight has 1, as all have without `weights`
    return tuple(weights.get(name, 1.0) for name in names)
