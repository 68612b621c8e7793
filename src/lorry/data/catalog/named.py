"""A named set: a public data set as data. Where it lies, how its rows are written, how they are
asked, how answers are measured.

bool_q = open_catalog(None).find_set("bool_q")
bool_q.item({"question": "is ice cold", "passage": "Ice is frozen water.", "answer": True}).answer      # "yes"
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorry.data.catalog.item import (
    ItemFields,
    NamedSetItem,
    fill_template,
    option_slots,
    shorten_text,
)
from lorry.data.catalog.layouts import ColumnLayout
from lorry.data.reading.content import UnusableRowError
from lorry.errors import ConfigError, shortlist_names, suggest_nearest


@dataclass(frozen=True)
class NamedSet:
    """A public data set as data.

    ``hub``, ``config``: its name on the hub (None: files only). ``splits``: our train, validation,
    test (and ``shots`` where examples come from a split of their own) to the hub's; slices such as
    ``train[:90%]`` cannot be streamed. ``layouts``: in order of precedence. ``templates``: number 0
    is the plain one that evaluation uses. ``metrics``: the first is the main one. ``limit``: (slot,
    characters) beyond which that slot loses its end. ``source``: the paper. ``converted``: where
    the hub's main branch is a loading script, which nothing should run, the folder in its Parquet
    branch, ``refs/convert/parquet``. ``aliases``: other names that it is found by. ``file``: where
    it is declared.
    """

    name: str
    about: str
    hub: str | None
    layouts: tuple[ColumnLayout, ...]
    templates: tuple[str, ...]
    metrics: tuple[str, ...]
    max_new_tokens: int
    licence: str
    source: str
    config: str | None = None
    splits: Mapping[str, str] | None = None
    converted: str | None = None
    cue: str = "Answer:"
    limit: tuple[str, int] | None = None
    aliases: tuple[str, ...] = ()
    file: Path | None = None

    def split(self, wanted: str) -> str:
        """The hub's split for ours. Raises ConfigError where the set has none, listing what it has."""
        splits = self.splits or {}
        if self.hub is None:
            raise ConfigError(
                f"the set {self.name!r} is not on the hub; give a file for it: "
                f"data.local.{self.name}=FILE"
            )
        if wanted == "train" and wanted not in splits:
            raise ConfigError(
                f"the set {self.name!r} has no training rows, only "
                f"{', '.join(splits)}, since it is meant for evaluation. To train "
                f"on it nevertheless, give a file: data.local.{self.name}=FILE, and "
                "an evaluation set with data.test_size"
            )
        if wanted not in splits:
            raise ConfigError(
                f"the set {self.name!r} has no split {wanted!r}; it has {', '.join(splits)}{suggest_nearest(wanted, splits)}"
            )
        return splits[wanted]

    def item(self, row: Mapping[str, Any], template: int = 0) -> NamedSetItem:
        """The row as its only item. Raises UnusableRowError (kind, reason) for a row that cannot be used,
        or one of several items.
        """
        items = self.items(row, template)
        if len(items) != 1:
            raise UnusableRowError(
                "several", f"the row holds {len(items)} questions; read it with items()"
            )
        return items[0]

    def items(self, row: Mapping[str, Any], template: int = 0) -> list[NamedSetItem]:
        """The row's items, one except where a row is a whole conversation (coqa).

        Raises UnusableRowError for columns of no layout, an empty prompt or answer, a label outside the
        options; IndexError for a template number that does not exist.
        """
        text = self.templates[template]
        item_fields = self._layout(row).read(row)
        return [
            self._make_item(fields, text)
            for fields in (item_fields if isinstance(item_fields, list) else [item_fields])
        ]

    def refuse_template(self, number: int, field: str) -> None:
        """Raises ConfigError for a template that does not exist."""
        if number >= len(self.templates):
            raise ConfigError(
                f"{field}={number}: {self.name} has templates 0 to {len(self.templates) - 1}"
            )

    def template_of(self, seed: int, number: int) -> int:
        """The template of row ``number``: a hash of (name, seed, number), so the same on every
        machine and in any order.
        """
        # the parts cannot run together: no name has a NUL
        key = f"{self.name}\0{seed}\0{number}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % len(
            self.templates
        )

    def _layout(self, row: Mapping[str, Any]) -> ColumnLayout:
        # the first that fits: rows may have columns of two layouts
        for form in self.layouts:
            if form.fits(row):
                return form
        columns = shortlist_names(
            repr(name) if value is not None else f"{name!r} (null)" for name, value in row.items()
        )
        known = "; ".join(map(str, self.layouts))
        raise UnusableRowError(
            "columns",
            f"the set {self.name!r} cannot be read from the columns {columns or '(none)'}. Known: {known}",
        )

    def _make_item(self, fields: ItemFields, template: str) -> NamedSetItem:
        slots, shortened = dict(fields.slots), False
        if self.limit is not None:
            # templates are filled afterwards, so that the question is never cut
            slot, most = self.limit
            shortened_text = shorten_text(slots.get(slot, ""), most)
            shortened = len(shortened_text) < len(slots.get(slot, "").strip())
            slots[slot] = shortened_text
        prompt = fill_template(template, {**slots, **option_slots(fields.options)})
        if not prompt.strip():
            # every paragraph names a slot that is empty here
            raise UnusableRowError("empty prompt", "the row fills no paragraph of the template")
        # a number is learnt with its reasoning, so its reference is given apart
        references = fields.references or (fields.answer,)
        return NamedSetItem(
            prompt,
            fields.answer,
            self.cue,
            references,
            fields.options,
            fields.right,
            fields.concepts,
            shortened,
        )
