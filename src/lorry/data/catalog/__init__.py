"""The catalogue of named sets: public data sets as data, known by their names.

    catalog = open_catalog(None)                        # or a file or folder of sets of one's own
    catalog.find_set("bool_q").item(row).prompt         # filled; .answer, .references, .options, .right
    catalog.expand_suites(["commonsense", "gsm8k"])     # suites and sets into names of sets
    item_conversation(item, shots)                      # what training and generation read

A set is one YAML file (`set_file.py`), Lorry's own in ``sets/``. The prompts are ours, so scores
compare with our own; none is inverted (answer to question). Every set takes the hub's own columns
and those of files people have (LLM-Adapters, the authors' releases, Alpaca prompts), told apart row
by row.
"""

from __future__ import annotations

from lorry.data.catalog.catalog import Catalog, open_catalog, shipped_catalog
from lorry.data.catalog.item import NamedSetItem
from lorry.data.catalog.named import NamedSet
from lorry.data.catalog.turns import item_conversation, prompt_with_cue

__all__ = [
    "Catalog",
    "NamedSet",
    "NamedSetItem",
    "item_conversation",
    "open_catalog",
    "prompt_with_cue",
    "shipped_catalog",
]
