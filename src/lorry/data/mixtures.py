"""Mixtures of named sets: read and encoded set by set and laid end to end; `mixing.py` says in what order they are read.

mixed = read_mix(data, encoder, seed=0, quarantine=None)
mixed.report.lines()     # counts, token statistics and truncation, set by set
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lorry.config.data import DataConfig
from lorry.data.catalog import named
from lorry.data.encode import Encoder
from lorry.data.formats import Found
from lorry.data.places import Places, read_items, refuse_leak
from lorry.data.tokenset import TokenSet, encode_rows
from lorry.errors import DataError


def read_mix(data: DataConfig, encoder: Encoder, *, seed: int, quarantine: Path | None) -> list[TokenSet]:
    """The training rows of every set in ``data.mix``. Raises ConfigError (an unknown set, the rows to evaluate on being the rows
    to learn), DataError (a missing file, a bad row, a set without a usable row)."""
    places = Places(data.local)
    for name in data.mix:
        if data.eval_split is not None:
            refuse_leak(places, named(name), data.split, data.eval_split, "data.test_size=N instead of data.eval_split")
    return [_read(data, name, data.split, data.n, data.template, encoder, seed, quarantine) for name in data.mix]


def read_held(data: DataConfig, encoder: Encoder, *, seed: int, quarantine: Path | None) -> list[TokenSet]:
    """The rows of ``data.eval_split`` of every set that has one, in the plain template."""
    split, places = data.eval_split, Places(data.local)
    if split is None:
        return []
    asked = [name for name in data.mix if places.has(named(name), split)]
    if not asked:
        raise DataError(f"data.eval_split={split}: none of {', '.join(data.mix)} has such a split")
    return [_read(data, name, split, data.eval_n, data.template or 0, encoder, seed, quarantine) for name in asked]


def _read(
    data: DataConfig, name: str, split: str, limit: int | None, template: int | None, encoder: Encoder, seed: int,
    quarantine: Path | None,
) -> TokenSet:  # fmt: skip
    one = named(name)
    aside = quarantine if data.on_bad_row == "quarantine" else None
    source = Places(data.local).open(one, split, limit=limit, on_bad_row=data.on_bad_row, quarantine=aside)
    shortened = 0

    def found() -> Iterator[Found]:
        nonlocal shortened
        for asked in read_items(one, source, template=template, seed=seed):
            shortened += asked.item.shortened
            yield asked.found

    made = TokenSet.of(encode_rows(found(), source, encoder), source, encoder, role=one.name)
    if not len(made):
        raise DataError(f"{one.name} ({source.label}): no usable row; {source.bad.summary() or 'the set is empty'}")
    if shortened:
        made.report.notes.append(f"{shortened} contexts were shortened to what {one.name} allows")
    made.report.source = f"{one.name} ({source.label})"
    return made


def shares_of(data: DataConfig) -> tuple[float, ...] | None:
    """The shares in the order of the mix. Raises DataError for a weight of a set that is not in it."""
    if not isinstance(data.weights, dict):
        return None if data.weights is None else tuple(data.weights)
    given = {named(key).name: share for key, share in data.weights.items()}
    names = [named(name).name for name in data.mix]
    if odd := [name for name in given if name not in names]:
        raise DataError(f"data.weights names {odd[0]!r}, which is not in data.mix ({', '.join(names)})")
    return tuple(given.get(name, 1.0) for name in names)
